"""What tracking costs a training run, and how wrong its values are: FCN-4-512 on real images, through warmup.

    python benchmarks/bench_slowdown.py [--steps 300] [--full-batch-steps 60] [--only NAME]

An untracked copy of the model makes the same steps in turn; both are timed step by step. The truth at every fifth
step is a cold Lanczos solve to a relative residual of 1e-4, not timed.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

import sharpkern as sk
from sharpkern.train.config import DataConfig
from sharpkern.train.data import load
from sharpkern.train.models import FCN


@dataclass
class Case:
    """One way to track."""

    name: str
    batch: int | None
    options: dict[str, Any]
    plain: list[float] = field(default_factory=list)
    tracked: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    covered: list[bool] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    products: int = 0


def run(case: Case, steps: int, x: torch.Tensor, y: torch.Tensor) -> None:
    """Train two copies side by side."""
    plain = FCN(784, 10, depth=4, width=512, activation="relu", parameterisation="sp", seed=0)
    tracked = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.0) for m in (plain, tracked)]
    schedules = [sk.WarmupLR(o, 0.5, steps // 2) for o in optimizers]
    tracker = sk.SharpnessTracker(tracked, F.mse_loss, optimizers[1], **case.options)
    generator = torch.Generator().manual_seed(1)
    exact = None
    for step in range(steps):
        rows = slice(None) if case.batch is None else torch.randperm(len(x), generator=generator)[: case.batch]
        batch = x[rows], y[rows]
        if step % 5 == 0:
            goal = tracker.probe or batch
            if exact is None:
                exact = sk.HessianOperator(tracked, F.mse_loss, goal)
            else:
                exact.refresh(goal)
            truth = float(sk.lanczos(exact, tol=1e-4, v0=torch.randn(2, exact.n)).eigenvalues[0])
        start = time.perf_counter()
        optimizers[0].zero_grad()
        F.mse_loss(plain(batch[0]), batch[1]).backward()
        optimizers[0].step()
        between = time.perf_counter()
        record = tracker.step(batch)
        optimizers[1].step()
        end = time.perf_counter()
        for schedule in schedules:
            schedule.step()
        tracker._left_at = None  # the truth and the other copy are not this run's own time
        if step >= 1:  # the export is done, and the first solve
            case.plain.append(between - start)
            case.tracked.append(end - between)
            case.products += record.matvecs
            case.seen.append(record.status)
            if step % 5 == 0:
                case.error.append(abs(record.sharpness / truth - 1))
                case.covered.append(abs(record.sharpness - truth) <= record.sharpness_error + 1e-4 * truth)


def row(case: Case) -> str:
    """One line of the table."""
    n = len(case.plain)
    slowdown = sum(case.tracked) / sum(case.plain)
    typical = float(torch.tensor(case.tracked).median() / torch.tensor(case.plain).median())
    error = 100 * torch.tensor(case.error)
    shares = [f"{sum(s == kind for s in case.seen) / n:.0%}" for kind in ("measured", "bounded")]
    cells = [f"{slowdown:.2f}", f"{typical:.2f}", f"{case.products / n:.2f}", *shares, f"{float(error.median()):.2f}"]
    cells += [f"{float(error.quantile(0.95)):.1f}", f"{sum(case.covered) / len(case.covered):.0%}"]
    return f"| {case.name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--full-batch-steps", type=int, default=60)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    options = parser.parse_args()
    data = load(DataConfig("fashion-mnist-5k"))
    x, y = data.train_inputs, F.one_hot(data.train_targets, 10).float()
    probe = (x[:128], y[:128])
    cases = [
        Case("batch 128, budget 0.25, fixed probe of 128", 128, {"budget": 0.25, "probe": probe}),
        Case("batch 128, budget 0.25, the step's own batch", 128, {"budget": 0.25}),
        Case("batch 128, every step, own batch", 128, {}),
        Case("full batch, tol 0.02, every step", None, {"tol": 0.02}),
        Case("full batch, tol 0.02, every=5", None, {"tol": 0.02, "every": 5}),
        Case("full batch, budget 0.25", None, {"budget": 0.25}),
    ]
    heads = ["run", "slowdown", "of the median step", "products a step", "measured", "bounded"]
    heads += ["median error %", "p95 %", "covered"]
    print(f"{torch.get_num_threads()} threads\n\n| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    for case in (c for c in cases if options.only in c.name):
        run(case, options.full_batch_steps if case.batch is None else options.steps, x, y)
        print(row(case), flush=True)


if __name__ == "__main__":
    main()
