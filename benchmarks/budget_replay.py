"""What a budget sees of a fixed probe: ``python benchmarks/budget_replay.py [--steps 110]``.

FCN-4-512 on real images, mean squares, batch 128: SGD through warmup and its first catapult, and Adam. At each overhead
three ways are compared on the same run: ``probe="auto"``; the rule for any operator (``Budget``) on a probe of 128; and
an oracle that buys as many exact values as the first way took looks, at steps chosen in hindsight. The error is that of
the value a record holds, measured or carried, against the same probe's true value, at every step. For Adam it is of the
preconditioned sharpness.

The clock that the trackers read is not the machine's: a step, the sweeps of a loss, a product, a form and the vector
passes of a solve advance it by their prices, the least processor time of some interleaved rounds before the run. So
other work on the machine does not decide which steps are measured. ``--real`` lets the trackers read the processor's
time instead, at 1.3 only, each beside an untracked copy. Writes
results/budget_replay_<what was asked>.json and prints the table.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from budget_floor import errors, oracle
from run import machine, versions
from torch import Tensor

import sharpkern as sk
from sharpkern.curvature.preconditioned import PreconditionedOperator
from sharpkern.eigen import ShortLanczos, WarmLanczos
from sharpkern.optimizers.preconditioner import threshold_preconditioner
from sharpkern.tracking.budget import Budget
from sharpkern.train.config import DataConfig
from sharpkern.train.data import load
from sharpkern.train.models import FCN

BATCH, SIZES, ROUNDS = 128, (16, 32, 64, 128), 15
FRACTIONS = [0.1, 0.3, 1.0]
WAYS = ["auto", "any"]
RUNS = {"SGD": (torch.optim.SGD, 0.5, 150), "Adam": (torch.optim.Adam, 1e-3, 60)}
ROOT = Path(__file__).parents[1]


class Clock:
    """Time of a tracker, which passes only where a price is paid."""

    def __init__(self) -> None:
        self.now = 0.0


class Prices:
    """Seconds of the parts of a run, and the clock that they are charged to."""

    def __init__(self, model: FCN, cls: Any, x: Tensor, y: Tensor) -> None:
        self.clock: Clock | None = None
        optimizer = cls(model.parameters(), lr=0.0)
        parts: dict[str, Callable[[], object]] = {"own": lambda: _own_step(model, optimizer, x, y)}
        for m in SIZES:
            H = sk.HessianOperator(model, F.mse_loss, (x[:m], y[:m]))
            v = torch.randn(H.n)
            parts[f"primal {m}"] = lambda H=H: (H.refresh(), H.gradient)
            parts[f"product {m}"] = lambda H=H, v=v: H @ v
            parts[f"form {m}"] = lambda H=H, v=v: H.quadratic_form(v)
            if m == SIZES[0]:
                for name, solver, most in (
                    ("short", ShortLanczos(tol=1e-12, max_matvecs=4), (2, 4)),
                    ("warm", WarmLanczos(tol=1e-12, max_matvecs=4), (2, 4)),
                ):
                    solver.step(H)
                    for k in most:
                        parts[f"{name} {k}"] = lambda s=solver, H=H, k=k, v=v: _solve(s, H, k, v)
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        for _ in range(ROUNDS):
            for name, part in parts.items():
                start = time.process_time()
                part()
                seconds[name].append(time.process_time() - start)
        self.of = {name: min(values[1:]) for name, values in seconds.items()}
        for name in ("short", "warm"):
            passes = [self.of[f"{name} {k}"] - k * self.of[f"product {SIZES[0]}"] for k in (2, 4)]
            self.of[f"{name} each"] = max(0.0, (passes[1] - passes[0]) / 2)
            self.of[f"{name} once"] = max(0.0, passes[0] - 2 * self.of[f"{name} each"])

    def pay(self, name: str, times: int = 1) -> None:
        if self.clock is not None:
            self.clock.now += times * self.of[name]

    def _pay_refresh(self, operator: Any, batch: Any = None, **_: Any) -> None:
        self.pay(f"primal {_rows(operator.batch if batch is None else batch)}")

    def install(self) -> None:
        """Let the package's work be charged, and its clock be ours."""
        H = sk.HessianOperator
        _before(H, "refresh", self._pay_refresh)
        _before(H, "_product", lambda op, block: self.pay(f"product {_rows(op.batch)}", len(block)))
        _before(H, "form_rows", lambda op, block: self.pay(f"form {_rows(op.batch)}", len(block)))
        long = [0]
        for cls, name in ((WarmLanczos, "warm"), (ShortLanczos, "short")):
            self._price_solves(cls, name, long)
        time.perf_counter = lambda: 0.0 if self.clock is None else self.clock.now

    def _price_solves(self, cls: Any, name: str, long: list[int]) -> None:
        method = cls.step

        def step(*args: Any, **kwargs: Any) -> Any:
            before = long[0]
            result = method(*args, **kwargs)
            if name == "warm" or long[0] == before:  # a short solver's long solve has been paid for
                self.pay(f"{name} once")
                self.pay(f"{name} each", result.matvecs)
            long[0] += name == "warm"
            return result

        cls.step = step


def _solve(solver: WarmLanczos, H: sk.HessianOperator, products: int, v: Tensor) -> None:
    """Solve from a random vector, so that all products are made."""
    solver._block = (v / v.norm())[None].clone()
    assert solver.step(H, None, products).matvecs == products


def _own_step(model: FCN, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.mse_loss(model(x[:BATCH]), y[:BATCH]).backward()
    optimizer.step()


def _before(owner: Any, name: str, action: Callable[..., None]) -> None:
    method = getattr(owner, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        action(*args, **kwargs)
        return method(*args, **kwargs)

    setattr(owner, name, run)


def _rows(batch: Any) -> int:
    return len(batch[0])


def tracker_of(model: FCN, optimizer: Any, way: str, fraction: float, probe: Any) -> sk.SharpnessTracker:
    if way == "auto":
        return sk.SharpnessTracker(model, F.mse_loss, optimizer, budget=fraction, probe="auto")
    tracker = sk.SharpnessTracker(model, F.mse_loss, optimizer, budget=fraction, probe=probe)
    tracker._following.budget = Budget(fraction, tracker.tol)  # the rule for an operator of any kind
    return tracker


class Truth:
    """The (preconditioned) sharpness of the first examples, to a residual of 1e-3."""

    def __init__(self, model: FCN, batch: tuple[Tensor, Tensor]) -> None:
        self.H = sk.HessianOperator(model, F.mse_loss, batch)
        self.vector: Tensor | None = None

    def find(self, optimizer: Any) -> float:
        self.H.refresh()
        params = list(self.H.params.values())
        P = threshold_preconditioner(optimizer, {p: p.grad for p in params})
        op: Any = self.H if isinstance(optimizer, torch.optim.SGD) else PreconditionedOperator(self.H, P)
        start = torch.randn(1, op.n)
        found = sk.lanczos(op, tol=1e-3, v0=start if self.vector is None else torch.cat([self.vector, start]))
        self.vector = found.eigenvectors
        return float(found.eigenvalues[0])


def replay(name: str, steps: int, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Train once, with all trackers on the same model."""
    cls, lr, warmup = RUNS[name]
    model = FCN(784, 10, depth=4, width=512, activation="relu", parameterisation="sp", seed=0)
    prices = Prices(copy.deepcopy(model), cls, x, y)
    originals = [(o, n, getattr(o, n)) for o, n in (
        (sk.HessianOperator, "refresh"), (sk.HessianOperator, "_product"), (sk.HessianOperator, "form_rows"),
        (WarmLanczos, "step"), (ShortLanczos, "step"), (time, "perf_counter"),
    )]  # fmt: skip
    prices.install()
    optimizer = cls(model.parameters(), lr=0.0)
    schedule = sk.WarmupLR(optimizer, lr, warmup)
    generator = torch.Generator().manual_seed(1)
    first = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:BATCH]  # the first batch
    contenders = {
        (way, f): (tracker_of(model, optimizer, way, f, (x[first], y[first])), Clock())
        for f in FRACTIONS
        for way in WAYS
    }
    values: dict[Any, list[float]] = {key: [] for key in contenders}
    looks: dict[Any, list[int]] = {key: [] for key in contenders}
    started: dict[Any, float] = {}
    truths: dict[int, Truth] = {}
    series: dict[int, list[float]] = {}
    losses = []
    for step in range(steps):
        rows = torch.randperm(len(x), generator=generator)[:BATCH]
        for key, (tracker, clock) in contenders.items():
            prices.clock = clock
            record = tracker.step((x[rows], y[rows]))
            adaptive = record.preconditioned_sharpness is not None
            values[key].append(record.preconditioned_sharpness if adaptive else record.sharpness)
            looks[key].append(record.matvecs)
            clock.now += prices.of["own"] - prices.of[f"primal {BATCH}"]
            if step == 0:
                started[key] = clock.now
        prices.clock = None
        losses.append(record.loss)
        # Probes of one size are the same: the first examples of the first batch.
        for m, probe in {_rows(t.probe): t.probe for t, _ in contenders.values()}.items():
            if m not in truths:
                truths[m], series[m] = Truth(model, probe), []
            series[m].append(truths[m].find(optimizer))
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            print(f"{name} {step}: loss {losses[-1]:.3f}", {k: round(v[-1], 2) for k, v in series.items()}, flush=True)
    for owner, attribute, value in originals:
        setattr(owner, attribute, value)
    table = []
    for key, (tracker, clock) in contenders.items():
        m = _rows(tracker.probe)
        realised = (clock.now - started[key]) / ((steps - 1) * prices.of["own"])
        taken = sum(n > 0 for n in looks[key])
        e = [abs(v / t - 1) for v, t in zip(values[key], series[m], strict=True)]
        table.append([name, *key, m, realised, taken / steps, *_quantiles(e)])
        if key[0] == "auto":
            best = oracle(series[m], taken)
            table.append([name, "oracle", key[1], m, realised, taken / steps, *_quantiles(errors(series[m], best))])
    return {"rows": table, "prices": prices.of, "loss": losses, "series": series,
            "values": [[*k, v] for k, v in values.items()]}  # fmt: skip


def _quantiles(e: list[float]) -> list[float]:
    found = torch.tensor(e, dtype=torch.float64)
    return [float(found.quantile(q)) for q in (0.5, 0.95, 1.0)]


def real(name: str, steps: int, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Train a tracked and an untracked copy in turn, timed by the processor; the error at every step."""
    cls, lr, warmup = RUNS[name]
    plain = FCN(784, 10, depth=4, width=512, activation="relu", parameterisation="sp", seed=0)
    tracked = copy.deepcopy(plain)
    optimizers = [cls(m.parameters(), lr=0.0) for m in (plain, tracked)]
    schedules = [sk.WarmupLR(o, lr, warmup) for o in optimizers]
    tracker = sk.SharpnessTracker(tracked, F.mse_loss, optimizers[1], budget=0.3, probe="auto")
    generator = torch.Generator().manual_seed(1)
    clock, time.perf_counter = time.perf_counter, time.process_time
    seconds: list[tuple[float, float]] = []
    e, taken, truth = [], 0, None
    for step in range(steps):
        rows = torch.randperm(len(x), generator=generator)[:BATCH]
        batch = x[rows], y[rows]
        start = time.process_time()
        optimizers[0].zero_grad()
        F.mse_loss(plain(batch[0]), batch[1]).backward()
        optimizers[0].step()
        middle = time.process_time()
        record = tracker.step(batch)
        before = time.process_time()
        truth = truth or Truth(tracked, tracker.probe)
        found = truth.find(optimizers[1])
        after = time.process_time()
        optimizers[1].step()
        end = time.process_time()
        for schedule in schedules:
            schedule.step()
        # The update is this run's own time; truth and the other copy are not.
        tracker._left_at = None if step == 0 else time.process_time() - (end - after)
        adaptive = record.preconditioned_sharpness is not None
        e.append(abs((record.preconditioned_sharpness if adaptive else record.sharpness) / found - 1))
        taken += record.matvecs > 0
        if step:
            seconds.append((middle - start, end - after + before - middle))
    time.perf_counter = clock
    realised = sum(b for _, b in seconds) / sum(a for a, _ in seconds)
    return {"rows": [[name, "auto, real", 0.3, _rows(tracker.probe), realised, taken / steps, *_quantiles(e)]]}


def printed(rows: list[list[Any]]) -> str:
    lines = ["| run | allowed | way | probe | realised | looks, of steps | median error % | p95 % | largest % |"]
    lines.append("|---" * 9 + "|")
    for name, way, fraction, m, realised, share, *e in rows:
        numbers = " | ".join(f"{100 * q:.3g}" for q in e)
        lines.append(f"| {name} | {1 + fraction:g} | {way} | {m} | {realised:.2f} | {share:.0%} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--only", default="", help="one of the runs")
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--real", action="store_true")
    options = parser.parse_args()
    FRACTIONS[:], WAYS[:] = options.fractions, options.ways
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = load(DataConfig("fashion-mnist-5k"))
    x, y = data.train_inputs, F.one_hot(data.train_targets, 10).float()
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(), "machine": machine(), "versions": versions(),
        "runs": {name: (real if options.real else replay)(name, options.steps, x, y)
                 for name in RUNS if options.only in name},
    }  # fmt: skip
    suffix = (
        ("_real" if options.real else "") + (f"_{options.only.lower()}" if options.only else "") + f"_{options.steps}"
    )
    (ROOT / "benchmarks" / "results" / f"budget_replay{suffix}.json").write_text(json.dumps(result))
    print(printed([row for run in result["runs"].values() for row in run["rows"]]))


if __name__ == "__main__":
    main()
