"""What each way of tracking costs a step, and how wrong its values are: two networks on real images, through warmup.

    python benchmarks/bench_prices.py [--steps 110] [--full-batch-steps 80] [--only CNN]

Writes results/prices.json and the table of docs/explain/cost.md. Every contender trains a copy of its own in turn, step
by step, beside one without a tracker. The truth at every tenth step is a Lanczos solve of a float64 copy to a residual
of 1e-6, from the last truth's vector and two random ones; not timed, like the first ten steps. Times are those of the
processor, of one thread: other programs on the machine do not count.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from report import between
from run import machine, versions
from torch import Tensor, nn

import sharpkern as sk
from sharpkern.curvature.preconditioned import PreconditionedOperator
from sharpkern.optimizers.preconditioner import Preconditioner, threshold_preconditioner
from sharpkern.train.config import DataConfig
from sharpkern.train.data import load
from sharpkern.train.models import CNN, FCN

ROOT = Path(__file__).parents[1]
UNTIMED, TRUTH_EVERY, FULL, WARMUP, WIDTH, CHANNELS = 10, 10, 256, 60, 256, 16
SETTINGS: dict[str, dict[str, Any]] = {
    "`budget=0.05`": {"budget": 0.05}, "`every=20`": {"every": 20}, "`budget=0.3`": {"budget": 0.3},
    "`products=False`": {"products": False}, "`every=4`": {"every": 4}, "`budget=2`": {"budget": 2.0}, "default": {},
}  # fmt: skip
OBSERVED = {f"{name}, observed": SETTINGS[name] for name in ("`budget=0.05`", "`budget=0.3`", "`every=20`")}


class Setup(NamedTuple):
    """A model, its batch size (None for the full batch), optimizer and target rate."""

    model: str
    size: int | None
    optimizer: Any
    lr: float


RUNS = {
    f"FCN, SGD, full batch of {FULL}": Setup("FCN", None, torch.optim.SGD, 0.3),
    "FCN, SGD, batch 128": Setup("FCN", 128, torch.optim.SGD, 0.3),
    "FCN, Adam, batch 128": Setup("FCN", 128, torch.optim.Adam, 1e-3),
    "CNN, SGD, batch 128": Setup("CNN", 128, torch.optim.SGD, 0.3),
    "CNN, Adam, batch 128": Setup("CNN", 128, torch.optim.Adam, 1e-3),
}


def network(kind: str) -> nn.Module:
    if kind == "FCN":
        return FCN(784, 10, depth=4, width=WIDTH, activation="relu", parameterisation="sp", seed=0)
    return CNN(1, 10, width=CHANNELS, seed=0)


class Contender:
    """A copy of the model, its optimizer and schedule, and a tracker or none.

    Observed, torch's own backward pass sets the gradients, and the tracker looks on.
    """

    def __init__(
        self, model: nn.Module, cls: Any, lr: float, warmup: int, options: dict[str, Any] | None, *, observed: bool
    ) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = cls(self.model.parameters(), lr=0.0)
        self.schedule = sk.WarmupLR(self.optimizer, lr, warmup)
        self.tracker, self.observed = None, observed
        if options is not None:
            self.tracker = sk.SharpnessTracker(self.model, F.mse_loss, self.optimizer, **options)
        self.seconds: list[float] = []
        self.products: list[int] = []
        self.errors: list[float] = []
        self.record: Any = None
        self.own = 0.0  # seconds of the last update

    def measure(self, batch: tuple[Tensor, Tensor]) -> float:
        """Find loss, gradient and sharpness; return the seconds."""
        start = time.process_time()
        if self.tracker is None or self.observed:
            self.optimizer.zero_grad()
            F.mse_loss(self.model(batch[0]), batch[1]).backward()
        if self.tracker is not None:
            # The other contenders' time is none of this run's own, which ``observe`` counts from its last call on.
            own = self.own + time.process_time() - start
            self.tracker._left_at = time.perf_counter() - own if self.observed else None
            self.record = self.tracker.observe(batch) if self.observed else self.tracker.step(batch)
        return time.process_time() - start

    def update(self) -> float:
        """Take the step; return the seconds."""
        start = time.process_time()
        self.optimizer.step()
        self.own = time.process_time() - start
        self.schedule.step()
        return self.own


class Truth:
    """The converged value at the parameters of a contender, by a float64 copy."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).double()
        self.hessian: sk.HessianOperator | None = None
        self.vector: Tensor | None = None

    def at(self, contender: Contender, batch: tuple[Tensor, Tensor]) -> tuple[float, float]:
        """Return the (preconditioned) sharpness and the batch sharpness."""
        with torch.no_grad():
            for mine, theirs in zip(self.model.parameters(), contender.model.parameters(), strict=True):
                mine.copy_(theirs)
        wide = batch[0].double(), batch[1].double()
        if self.hessian is None:
            self.hessian = sk.HessianOperator(self.model, F.mse_loss, wide)
        self.hessian.refresh(wide)
        operator: Any = self.hessian
        if isinstance(contender.optimizer, torch.optim.Adam):
            params = list(contender.model.parameters())
            P = threshold_preconditioner(contender.optimizer, {p: p.grad for p in params})
            parts = P.inv_sqrt(params).double().split([p.numel() for p in params])
            own = list(self.hessian.params.values())
            operator = PreconditionedOperator(self.hessian, Preconditioner(own, dict(zip(own, parts, strict=True))))
        start = torch.randn(2, operator.n, dtype=torch.float64)
        start = start if self.vector is None else torch.cat([self.vector, start])
        found = sk.lanczos(operator, tol=1e-6, v0=start, max_matvecs=1000)
        assert found.converged, found.reason
        self.vector = found.eigenvectors
        g = self.hessian.gradient
        g = g / g.norm()
        return float(found.eigenvalues[0]), float(self.hessian.quadratic_form(g))


def run(name: str, steps: int, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Train all contenders side by side."""
    kind, size, cls, lr = RUNS[name]
    model = network(kind)
    choices = {"without": None, **SETTINGS, **OBSERVED}
    contenders = {
        key: Contender(model, cls, lr, WARMUP, options, observed=key in OBSERVED) for key, options in choices.items()
    }
    generator, truths = torch.Generator().manual_seed(1), {key: Truth(model) for key in ("default", "without")}
    for step in range(steps):
        rows = torch.arange(FULL) if size is None else torch.randperm(len(x), generator=generator)[:size]
        batch = x[rows], y[rows]
        measured = {key: contender.measure(batch) for key, contender in contenders.items()}
        if step >= UNTIMED and step % TRUTH_EVERY == 0:
            judge(contenders, {key: truth.at(contenders[key], batch) for key, truth in truths.items()})
        for key, contender in contenders.items():
            seconds = measured[key] + contender.update()
            if step >= UNTIMED:
                contender.seconds.append(seconds)
                contender.products.append(0 if contender.record is None else contender.record.matvecs)
    own = contenders["without"].seconds
    parameters = sum(p.numel() for p in model.parameters())
    return {"run": name, "steps": steps, "parameters": parameters, "without": own, "settings": [
        {"setting": key, "seconds": c.seconds, "products": c.products, "errors": c.errors}
        for key, c in contenders.items() if key != "without"
    ]}  # fmt: skip


def judge(contenders: dict[str, Contender], truths: dict[str, tuple[float, float]]) -> None:
    """Note every contender's error. All that step train alike to the bit, and all that look on like none."""
    for contender in contenders.values():
        if contender.tracker is None:
            continue
        twin = "without" if contender.observed else "default"
        pairs = zip(contenders[twin].model.parameters(), contender.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), "tracking has changed the training"
        truth = truths[twin]
        record = contender.record
        if not contender.tracker.products:
            contender.errors.append(abs(record.batch_sharpness / truth[1] - 1))
            continue
        adaptive = record.preconditioned_sharpness is not None
        value = record.preconditioned_sharpness if adaptive else record.sharpness
        contender.errors.append(abs(value / truth[0] - 1))


def quantile(values: list[float], q: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def table(result: dict[str, Any]) -> str:
    """Return the table of the page."""
    lines = ["| run | setting | times a step | products a step | median error % | 90% of errors below | largest |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for entry in result["entries"]:
        for s in entry["settings"]:
            price = sum(s["seconds"]) / sum(entry["without"])
            e = [100 * error for error in s["errors"]]
            mark = " (of the batch sharpness)" if s["setting"] == "`products=False`" else ""
            lines.append(
                f"| {entry['run']} | {s['setting']} | {price:.2f} | {statistics.mean(s['products']):.2f} | "
                f"{quantile(e, 0.5):.2g}{mark} | {quantile(e, 0.9):.2g} | {max(e):.2g} |"
            )
    m, v = result["machine"], result["versions"]
    where = f"{m['cpu']}, {m['threads']} thread, torch {v['torch']}, commit {v['commit']}, {result['date']}"
    runs = "; ".join(
        f"{e['run']}: {e['parameters']:,} parameters, {len(e['without'])} steps of "
        f"{1e3 * statistics.median(e['without']):.0f} ms"
        for e in result["entries"]
    )
    errors = len(result["entries"][0]["settings"][0]["errors"])
    return "\n".join([
        *lines, "",
        f"Fashion-MNIST, mean squares, {where}. Timed, processor time of a step without tracking: {runs}. Errors at "
        f"every tenth step (at least {errors}). FCN: 4 layers, width {WIDTH}; CNN: 4 convolutions with norms, width "
        f"{CHANNELS}. `benchmarks/bench_prices.py`.", "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--full-batch-steps", type=int, default=80)
    parser.add_argument("--only", default="", help="what the names of the runs must contain; nothing is written then")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load(DataConfig("fashion-mnist-5k"))
    x, y = data.train_inputs, F.one_hot(data.train_targets, 10).float()
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine(), "versions": versions(), "entries": [],
    }  # fmt: skip
    for name, setup in RUNS.items():
        if options.only not in name:
            continue
        steps = options.full_batch_steps if setup.size is None else options.steps
        result["entries"].append(run(name, steps, x, y))
        print(table({**result, "entries": result["entries"][-1:]}), flush=True)
    if options.only:
        return
    (ROOT / "benchmarks" / "results" / "prices.json").write_text(json.dumps(result))
    between(ROOT / "docs" / "explain" / "cost.md", table(result))


if __name__ == "__main__":
    main()
