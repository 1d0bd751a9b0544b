"""Adam against GI-Adam, full batch: the initial preconditioned sharpness, and the learning rates that each survives.

    python examples/gi_adam.py [SEED ...]               # three seeds by default, about 4 minutes

After figures 2, 6 and 26 of Kalra and Barkeshli, Why warmup the learning rate? (2024): FCN-4, mean squares, no warmup.
Failed is a training accuracy below 1.5 times chance after 200 steps.
"""

from __future__ import annotations

import itertools
import sys

import numpy as np
import torch
from common import Batch, figure, images, loss_fn, network, save, tracked, trained

import sharpkern as sk

OPTIMIZERS = {"Adam": (torch.optim.Adam, "#1f5fa8"), "GI-Adam": (sk.GIAdam, "#d98a00")}
RATE = 1e-3
GRID = [1e-5 * 2.0**x for x in range(5, 16)]


def final_loss(cls: type[torch.optim.Adam], parameterisation: str, seed: int, lr: float, batch: Batch) -> float | None:
    """Train without a warmup; None if the run failed."""
    model = network(parameterisation, seed)
    optimizer = cls(model.parameters(), lr=lr)
    losses = trained(model, optimizer, sk.WarmupLR(optimizer, lr, 1), batch, 200)
    with torch.no_grad():
        accuracy = float((model(batch[0]).argmax(1) == batch[1].argmax(1)).float().mean())
    outcome = sk.training_outcome(losses, accuracy=[accuracy], chance=0.1)
    return losses[-1] if outcome.name == "trained" else None


def main(seeds: list[int]) -> None:
    """Track a run of each optimizer, then go through the learning rates."""
    batch = images()
    made, axes = figure(3, 2, f"Adam and GI-Adam without warmup, FCN-4-128, 500 images, seed {seeds[0]}")
    for column, (parameterisation, title) in enumerate((("sp", "SP"), ("mup", "muP"))):
        top, middle, bottom = axes[:, column]
        for name, (cls, colour) in OPTIMIZERS.items():
            model = network(parameterisation, seeds[0])
            optimizer = cls(model.parameters(), lr=RATE)
            records = tracked(model, optimizer, sk.WarmupLR(optimizer, RATE, 1), itertools.repeat(batch), 120)
            step = [r.step for r in records]
            top.plot(step, [r.loss for r in records], color=colour, label=name)
            middle.plot(step, [r.preconditioned_sharpness for r in records], color=colour, label=name)
            losses = [final_loss(cls, parameterisation, seeds[0], lr, batch) for lr in GRID]
            bottom.plot(GRID, [np.nan if x is None else x for x in losses], "o-", color=colour, label=name)
            failed = [lr for lr, x in zip(GRID, losses, strict=True) if x is None]
            bottom.plot(failed, [0.3] * len(failed), "x", color=colour, markersize=8, label=f"{name} fails")
        middle.axhline(38 / RATE, color="#c0392b", label="38/η")
        middle.axhline(20 / RATE, color="#c0392b", linestyle=":", label="20/η, first step")
        top.set(title=f"{title}, lr {RATE:g}", xlabel="step", yscale="log", ylabel="loss")
        middle.set(xlabel="step", yscale="log", ylabel="preconditioned sharpness")
        bottom.set(xlabel="learning rate", xscale="log", yscale="log", ylabel="loss after 200 steps")
        for panel in (top, middle, bottom):
            panel.legend(fontsize=8)
        for seed in seeds:
            compare(parameterisation, seed, batch)
    save(made, "gi_adam")


def compare(parameterisation: str, seed: int, batch: Batch) -> None:
    """Print what a seed shows."""
    model = network(parameterisation, seed)
    values, largest, losses = [], [], []
    for cls, _ in OPTIMIZERS.values():
        optimizer = cls(model.parameters(), lr=RATE)
        values.append(sk.preconditioned_sharpness(model, loss_fn, batch, optimizer).value)
        losses.append([final_loss(cls, parameterisation, seed, lr, batch) for lr in GRID])
        ends = itertools.takewhile(lambda pair: pair[1] is not None, zip(GRID, losses[-1], strict=True))
        largest.append(max(lr for lr, _ in ends))
    better = [lr for lr, a, b in zip(GRID, *losses, strict=True) if b is not None and (a is None or b < a)]
    best = [min(x for x in row if x is not None) for row in losses]
    print(
        f"{parameterisation}, seed {seed}: initial preconditioned sharpness {values[0]:.3g} and {values[1]:.3g}, ratio "
        f"{values[0] / values[1]:.1f}; largest lr that trains {largest[0]:.3g} and {largest[1]:.3g}; best loss "
        f"{best[0]:.2g} and {best[1]:.2g}; GI-Adam's loss is lower from lr {min(better):.2g} on "
        f"(at {len(better)} of {len(GRID)} rates)",
        flush=True,
    )


if __name__ == "__main__":
    main([int(s) for s in sys.argv[1:]] or [0, 1, 2])
