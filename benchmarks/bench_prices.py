"""What each way of tracking costs a step, and how wrong its values are: FCN-4-256 on real images, through warmup.

    python benchmarks/bench_prices.py [--steps 110] [--full-batch-steps 80]

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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from report import between
from run import machine, versions
from torch import Tensor

import sharpkern as sk
from sharpkern.curvature.preconditioned import PreconditionedOperator
from sharpkern.optimizers.preconditioner import Preconditioner, threshold_preconditioner
from sharpkern.train.config import DataConfig
from sharpkern.train.data import load
from sharpkern.train.models import FCN

ROOT = Path(__file__).parents[1]
UNTIMED, TRUTH_EVERY, FULL, WARMUP, WIDTH = 10, 10, 256, 60, 256
SETTINGS: dict[str, dict[str, Any]] = {
    "`budget=0.05`": {"budget": 0.05}, "`every=20`": {"every": 20}, "`budget=0.3`": {"budget": 0.3},
    "`products=False`": {"products": False}, "`every=4`": {"every": 4}, "`budget=2`": {"budget": 2.0}, "default": {},
}  # fmt: skip
RUNS = {
    f"SGD, full batch of {FULL}": (None, torch.optim.SGD, 0.3),
    "SGD, batch 128": (128, torch.optim.SGD, 0.3),
    "Adam, batch 128": (128, torch.optim.Adam, 1e-3),
}


class Contender:
    """A copy of the model, its optimizer and schedule, and a tracker or none."""

    def __init__(self, model: FCN, cls: Any, lr: float, warmup: int, options: dict[str, Any] | None) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = cls(self.model.parameters(), lr=0.0)
        self.schedule = sk.WarmupLR(self.optimizer, lr, warmup)
        self.tracker = None
        if options is not None:
            self.tracker = sk.SharpnessTracker(self.model, F.mse_loss, self.optimizer, **options)
        self.seconds: list[float] = []
        self.products: list[int] = []
        self.errors: list[float] = []
        self.record: Any = None

    def measure(self, batch: tuple[Tensor, Tensor]) -> float:
        """Find loss, gradient and sharpness; return the seconds."""
        start = time.process_time()
        if self.tracker is None:
            self.optimizer.zero_grad()
            F.mse_loss(self.model(batch[0]), batch[1]).backward()
        else:
            self.tracker._left_at = None  # the other contenders' time is none of this run's own
            self.record = self.tracker.step(batch)
        return time.process_time() - start

    def update(self) -> float:
        """Take the step; return the seconds."""
        start = time.process_time()
        self.optimizer.step()
        seconds = time.process_time() - start
        self.schedule.step()
        return seconds


class Truth:
    """The converged value at the parameters of a contender, by a float64 copy."""

    def __init__(self, model: FCN) -> None:
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
    size, cls, lr = RUNS[name]
    model = FCN(784, 10, depth=4, width=WIDTH, activation="relu", parameterisation="sp", seed=0)
    choices = {"without": None, **SETTINGS}
    contenders = {key: Contender(model, cls, lr, WARMUP, options) for key, options in choices.items()}
    generator, truth = torch.Generator().manual_seed(1), Truth(model)
    for step in range(steps):
        rows = torch.arange(FULL) if size is None else torch.randperm(len(x), generator=generator)[:size]
        batch = x[rows], y[rows]
        measured = {key: contender.measure(batch) for key, contender in contenders.items()}
        if step >= UNTIMED and step % TRUTH_EVERY == 0:
            judge(contenders, truth.at(contenders["default"], batch))
        for key, contender in contenders.items():
            seconds = measured[key] + contender.update()
            if step >= UNTIMED:
                contender.seconds.append(seconds)
                contender.products.append(0 if contender.record is None else contender.record.matvecs)
    own = contenders["without"].seconds
    return {"run": name, "steps": steps, "without": own, "settings": [
        {"setting": key, "seconds": c.seconds, "products": c.products, "errors": c.errors}
        for key, c in contenders.items() if key != "without"
    ]}  # fmt: skip


def judge(contenders: dict[str, Contender], truth: tuple[float, float]) -> None:
    """Note every contender's error; all that track train alike, to the bit."""
    first = contenders["default"].model
    for contender in contenders.values():
        if contender.tracker is None:
            continue
        pairs = zip(first.parameters(), contender.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), "tracking has changed the training"
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
    counts = ", ".join(f"{len(e['without'])} of {e['run']}" for e in result["entries"])
    errors = len(result["entries"][0]["settings"][0]["errors"])
    return "\n".join([
        *lines, "",
        f"FCN-4-256 (0.4 million parameters) on Fashion-MNIST, mean squares, {where}; steps timed: {counts}; "
        f"errors at every tenth (at least {errors}). `benchmarks/bench_prices.py`.", "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--full-batch-steps", type=int, default=80)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load(DataConfig("fashion-mnist-5k"))
    x, y = data.train_inputs, F.one_hot(data.train_targets, 10).float()
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(), "machine": machine(), "versions": versions(), "entries": [],
    }  # fmt: skip
    for name, (size, *_) in RUNS.items():
        result["entries"].append(run(name, options.full_batch_steps if size is None else options.steps, x, y))
        print(table({**result, "entries": result["entries"][-1:]}), flush=True)
    (ROOT / "benchmarks" / "results" / "prices.json").write_text(json.dumps(result))
    between(ROOT / "docs" / "explain" / "cost.md", table(result))


if __name__ == "__main__":
    main()
