"""Where momentum and minibatches put the edge of stability: 2/lr, (2 + 2b)/lr, or below.

    python examples/minibatch_momentum.py [SEED]        # about 2 minutes

After figures 8 to 10 of Kalra and Barkeshli, Why warmup the learning rate? (2024): FCN-4 in standard parameterisation,
mean squares, 1,000 images, warmup of 64 steps to 16 / lambda_0. Minibatch sharpness is that of each batch.
"""

from __future__ import annotations

import itertools
import statistics
import sys

import numpy as np
import torch
from common import figure, images, loss_fn, minibatches, network, save, tracked

import sharpkern as sk

STEPS, WARMUP, SIZE, SMOOTH = 320, 64, 64, 10


def mean_of_neighbours(values: list[float]) -> np.ndarray:
    """Return the mean over ten steps, from the tenth on."""
    return np.convolve(values, np.full(SMOOTH, 1 / SMOOTH), "valid")


def main(seed: int) -> None:
    """Train with and without momentum, on the full batch and on minibatches."""
    batch = images(1000)
    made, axes = figure(2, 4, f"SP, warmup of {WARMUP} steps, FCN-4-128, seed {seed}", width=3.4, height=3)
    settings = itertools.product((None, SIZE), (0.0, 0.9))
    for (size, momentum), (top, bottom) in zip(settings, axes.T, strict=True):
        model = network("sp", seed)
        batches = itertools.repeat(batch) if size is None else minibatches(batch, size, seed)
        several = [next(batches) for _ in range(1 if size is None else 10)]  # one minibatch's sharpness is noisy
        initial = statistics.fmean(sk.sharpness(model, loss_fn, b).value for b in several)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=momentum)
        records = tracked(model, optimizer, sk.WarmupLR(optimizer, 16 / initial, WARMUP), batches, STEPS)
        step, sharpness = [r.step for r in records], [r.sharpness for r in records]
        name = f"{'full batch' if size is None else f'batch {size}'}, momentum {momentum:g}"
        top.plot(step, [r.loss for r in records], color="#1f5fa8", linewidth=1)
        top.set(title=name, yscale="log", ylabel="loss")
        bottom.plot(
            step, sharpness, color="#1f5fa8", linewidth=1, alpha=1.0 if size is None else 0.3, label="sharpness"
        )
        if size is not None:
            bottom.plot(step[SMOOTH - 1 :], mean_of_neighbours(sharpness), color="#1f5fa8", label="mean over 10 steps")
        rate = np.array([r.lr for r in records])
        bottom.plot(step, 2 / rate, ":", color="#c0392b", label="2/η")
        if momentum:
            bottom.plot(step, 3.8 / rate, "-", color="#c0392b", label="(2+2β)/η = 3.8/η")
        bottom.set(xlabel="step", yscale="log", ylabel="sharpness", ylim=(min(sharpness) / 2, 4 * max(sharpness)))
        bottom.legend(fontsize=8)
        q = sk.edge_of_stability([r.ratio for r in records], start=STEPS // 2).median if len(records) == STEPS else None
        print(
            f"{name}: {len(records)} steps, loss {records[0].loss:.3g} to {records[-1].loss:.3g}, late median of ",
            end="",
        )
        print(f"lr x sharpness / kappa: {q and f'{q:.2f}'}, of lr x sharpness / 2: {q and f'{q * (1 + momentum):.2f}'}")
    save(made, "minibatch_momentum")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
