"""Warmup from zero against warmup from the critical learning rate: phase diagrams, steps to the target, final loss.

    python examples/critical_start.py                   # about 4 minutes on two cores

The diagrams are the sweep of critical_start.toml (in runs/critical-start; a second call only draws). After figures 3
and 5 of Kalra and Barkeshli, Why warmup the learning rate? (2024): mean squares, full batch; the diagrams are SP's.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import IMAGES, Batch, figure, images, loss_fn, network, trained
from matplotlib.backends.backend_agg import FigureCanvasAgg

import sharpkern as sk
from sharpkern.sweep.collect import table
from sharpkern.sweep.executors import local, run_sweep
from sharpkern.sweep.grid import read_sweep

TARGETS = {"sp": 32.0, "mup": 8.0}  # in units of 1 / lambda_0
STEPS = 384


def diagrams() -> None:
    """Run the sweep, and draw best test accuracy with and without the critical start."""
    sweep = read_sweep(Path(__file__).with_suffix(".toml"), Path("runs/critical-start"))
    for outcome in run_sweep(sweep, local()):
        if outcome.status == "error":
            raise RuntimeError(f"{outcome.name}: {outcome.message}")
    rows = table(sweep)
    rates = sorted({row["optimizer.lr"] for row in rows})
    warmups = sorted({row["optimizer.warmup_steps"] for row in rows})
    made, axes = figure(1, 2, "Best test accuracy in 160 steps, FCN-4-64, 500 images; grey: diverged", height=3)
    shades: Any = None
    for panel, critical in zip(axes[0], (False, True), strict=True):
        values = np.full((len(warmups), len(rates)), np.nan)
        for row in rows:
            if row["optimizer.critical_start"] == critical and row["status"] == "trained":
                place = warmups.index(row["optimizer.warmup_steps"]), rates.index(row["optimizer.lr"])
                values[place] = row["best_test_accuracy"]
        panel.set_facecolor("#cccccc")
        shades = panel.imshow(values, origin="lower", aspect="auto", cmap="viridis", vmin=0.55, vmax=0.8)
        for (y, x), value in np.ndenumerate(values):
            if not math.isnan(value):
                panel.text(x, y, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.72 else "black")
        panel.set_xticks(range(len(rates)), [f"{c:g}" for c in rates])
        panel.set_yticks(range(len(warmups)), [str(w) for w in warmups])
        start = "the critical learning rate" if critical else "zero"
        panel.set(title=f"warmup from {start}", xlabel="lr target × λ₀", ylabel="warmup steps")
        print(f"warmup from {start}: {np.isfinite(values).sum()} of {values.size} cells trained")
    made.colorbar(shades, ax=list(axes[0]))
    FigureCanvasAgg(made).print_figure(IMAGES / "critical_start.png", dpi=110)
    print("plot: docs/images/critical_start.png")


def compare(parameterisation: str, seed: int, warmup: int, batch: Batch) -> float:
    """Train both ways to one target; print and return the ratio of the final losses (mean of ten steps)."""
    initial = sk.sharpness(network(parameterisation, seed), loss_fn, batch).value
    target = TARGETS[parameterisation] / initial
    losses: list[float] = []
    for start in (0.0, "critical"):
        model = network(parameterisation, seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        schedule = sk.WarmupLR(optimizer, target, warmup, lr_init=start, probe=(model, loss_fn, batch))
        rates: list[float] = []
        run = trained(model, optimizer, _Watched(schedule, rates), batch, STEPS)
        losses.append(statistics.fmean(run[-10:]))
    reached = next(t for t, lr in enumerate(rates, 1) if lr >= target)
    exactly = warmup * (1 - schedule.lr_init[0] / target)
    predicted = max(1, math.ceil(exactly - 1e-6))  # it may be a whole number, but for rounding
    print(
        f"{parameterisation}, seed {seed}, warmup {warmup}: starts at {schedule.lr_init[0] * initial:.2f}/λ₀ "
        f"({schedule.forward_passes} forward passes), target reached at step {reached}, predicted {predicted}; final "
        f"loss {losses[0]:.3g} from zero, {losses[1]:.3g} from critical, ratio {losses[1] / losses[0]:.2f}",
        flush=True,
    )
    return losses[1] / losses[0]


class _Watched:
    """A schedule that writes down the learning rate of every step."""

    def __init__(self, schedule: sk.WarmupLR, rates: list[float]) -> None:
        self.schedule, self.rates = schedule, rates

    def step(self) -> None:
        """Note the learning rate just used, then go on."""
        self.rates.append(self.schedule.get_last_lr()[0])
        self.schedule.step()


if __name__ == "__main__":  # the sweep's processes import this file
    several = images()
    for kind in TARGETS:
        ratios = [compare(kind, seed, warmup, several) for seed in (0, 1, 2) for warmup in (64, 256)]
        print(f"{kind}: no worse (ratio at most 1.05) in {sum(r <= 1.05 for r in ratios)} of {len(ratios)}")
    diagrams()
