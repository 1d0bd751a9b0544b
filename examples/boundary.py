"""How far a warmup moves the largest learning rate that gradient descent holds: SP a lot, muP little.

    python examples/boundary.py [SEED ...]              # three seeds by default, about 5 minutes

For each warmup length, targets c / lambda_0 with c = 1, 2, 4, ... are tried from the last boundary on, up while they
train and down while they do not; 320 full-batch steps each, mean squares. Diverged is a loss of 1e5 times the first.
"""

from __future__ import annotations

import itertools
import sys

import torch
from common import Batch, colours, figure, images, loss_fn, network, save, trained

import sharpkern as sk

WARMUPS = (1, 4, 16, 64, 256)
STEPS = 320


def holds(parameterisation: str, seed: int, target: float, warmup: int, batch: Batch) -> bool:
    """Train once; does the loss stay finite and fall?"""
    model = network(parameterisation, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    losses = trained(model, optimizer, sk.WarmupLR(optimizer, target, warmup), batch, STEPS)
    return sk.training_outcome(losses).name == "trained"


def boundary(parameterisation: str, seed: int, batch: Batch) -> list[float]:
    """Return the largest c of each warmup length."""
    initial = sk.sharpness(network(parameterisation, seed), loss_fn, batch).value
    found: list[float] = []
    c = 4.0
    for warmup in WARMUPS:
        while not holds(parameterisation, seed, c / initial, warmup, batch):
            c /= 2
        while holds(parameterisation, seed, 2 * c / initial, warmup, batch):
            c *= 2
        found.append(c)
    return found


def main(seeds: list[int]) -> None:
    """Find the boundaries and draw them."""
    batch = images()
    made, axes = figure(1, 2, "Largest target learning rate that trains, FCN-4-128, full batch", height=3.2)
    for column, (parameterisation, title) in enumerate((("sp", "SP"), ("mup", "muP"))):
        panel = axes[0, column]
        for seed, colour, marker in zip(seeds, colours(len(seeds)), itertools.cycle("os^"), strict=False):
            found = boundary(parameterisation, seed, batch)
            print(f"{parameterisation}, seed {seed}: {found}, moves by {max(found) / found[0]:g}", flush=True)
            panel.plot(
                WARMUPS, found, marker + "-", color=colour, alpha=0.7, label=f"seed {seed}: × {max(found) / found[0]:g}"
            )
        panel.set_xscale("log", base=4)
        panel.set_yscale("log", base=2)
        panel.set_xticks(WARMUPS, [str(w) for w in WARMUPS])
        panel.set(title=title, xlabel="warmup steps", ylabel="lr target × λ₀", ylim=(0.7, 1500))
        panel.legend(fontsize=9, loc="lower right")
    save(made, "boundary")


if __name__ == "__main__":
    main([int(s) for s in sys.argv[1:]] or [0, 1, 2])
