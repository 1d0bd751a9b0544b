"""Where the batch sharpness settles: 2/lr without momentum, (2 - 2b)/lr and (2 + 2b)/lr with it.

    python examples/batch_sharpness.py [SEED]        # about 3 minutes

After Andreyev and Beneventano, Edge of stochastic stability (arXiv 2412.20553), and its sequel on momentum (arXiv
2604.14108): a ReLU network, mean squares, real images, a short warmup to a constant learning rate. The expectations of
``E[g'Hg] / E[g'g]`` are taken over 100 steps. No Hessian-vector product is needed.
"""

from __future__ import annotations

import itertools
import sys

import numpy as np
import torch
from common import figure, images, loss_fn, minibatches, save
from torch import nn

import sharpkern as sk
from sharpkern.optimizers.threshold import minibatch_thresholds

WINDOW, WARMUP = 100, 200
# Momentum, learning rate, examples, batch size, steps, and which plateau belongs to it.
RUNS = [(0.0, 4.0, 5000, 16, 6000, 0), (0.9, 0.4, 5000, 16, 6000, 0), (0.9, 1.0, 1000, 1000, 1500, 1)]


def main(seed: int) -> None:
    """Train, and compare the median of the second half with the plateau."""
    made, axes = figure(1, len(RUNS), f"784-64-64-10 ReLU network, mean squares, seed {seed}", width=4, height=3.4)
    for (momentum, lr, examples, size, steps, which), ax in zip(RUNS, axes.flat, strict=True):
        data = images(examples)
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
        schedule = sk.WarmupLR(optimizer, lr, WARMUP)  # the network does not survive the rate at once
        tracker = sk.SharpnessTracker(model, loss_fn, optimizer, products=False)
        along, squares = np.zeros(steps), np.zeros(steps)
        for step, batch in enumerate(itertools.islice(minibatches(data, size, seed), steps)):
            record = tracker.step(batch)
            squares[step] = record.grad_norm**2
            along[step] = record.lr * record.batch_sharpness * squares[step]
            optimizer.step()
            schedule.step()
        plateau = minibatch_thresholds(optimizer)[which]
        window = np.ones(WINDOW)
        values = np.convolve(along, window, "valid") / np.convolve(squares, window, "valid")
        settled = float(np.median(values[steps // 2 :]))
        name = f"momentum {momentum:g}, batches of {size}"
        print(f"{name}: batch sharpness x lr {settled:.3f}, plateau {plateau:.3g}: {settled / plateau - 1:+.0%}")
        ax.plot(np.arange(WINDOW, steps + 1), values, color="#1f5fa8", linewidth=1)
        ax.axhline(plateau, color="#c0392b", label=f"plateau {plateau:.3g}")
        ax.set(title=name, xlabel="step", ylabel=f"η E[g'Hg] / E[g'g] over {WINDOW} steps")
        ax.set(ylim=(0, 2.5 * plateau))
        ax.legend(fontsize=8)
    save(made, "batch_sharpness")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
