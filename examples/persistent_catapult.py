"""Persistent catapult warmup: after every catapult up to the critical learning rate again; no warmup length to choose.

    python examples/persistent_catapult.py [SEED ...]   # about a minute a seed; the first is drawn

After figure 7 and algorithm 3 of Kalra and Barkeshli, Why warmup the learning rate? (2024): FCN-4 in standard
parameterisation, mean squares, full batch, target 32 / lambda_0, against linear warmups.
"""

from __future__ import annotations

import itertools
import sys

import torch
from common import colours, figure, images, loss_fn, network, save, tracked

import sharpkern as sk

STEPS = 160
LINEAR = (16, 64, 128)


def main(seeds: list[int]) -> None:
    """Train with each schedule."""
    batch = images()
    made, axes = figure(3, 1, f"Standard parameterisation, target 32/λ₀, FCN-4-128, seed {seeds[0]}")
    loss, rate, sharp = axes[:, 0]
    for seed in seeds:
        for warmup, colour in zip((None, *LINEAR), ("black", *colours(len(LINEAR))), strict=True):
            model = network("sp", seed)
            initial = sk.sharpness(model, loss_fn, batch).value
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            schedule = (
                sk.PersistentCatapultLR(optimizer, 32 / initial, (model, loss_fn, batch))
                if warmup is None
                else sk.WarmupLR(optimizer, 32 / initial, warmup)
            )
            records = tracked(model, optimizer, schedule, itertools.repeat(batch), STEPS)
            step, rates = [r.step for r in records], [r.lr * initial for r in records]
            name = f"linear, {warmup} steps" if warmup else "persistent catapult"
            reached = next((t for t, lr in zip(step, rates, strict=True) if lr >= 31.999), "never")
            cost = f", {schedule.searches} searches, {schedule.forward_passes} forward passes" if warmup is None else ""
            print(
                f"seed {seed}, {name}: target reached at step {reached}, loss {records[0].loss:.3g} to "
                f"{records[-1].loss:.3g} in {len(records)} steps, at most {max(r.loss for r in records):.3g}{cost}"
            )
            if seed == seeds[0]:
                loss.plot(step, [r.loss for r in records], color=colour, label=name)
                rate.plot(step, rates, color=colour, label=name)
                sharp.plot(step, [r.ratio for r in records], color=colour, label=name)
    loss.set(yscale="log", ylabel="loss")
    rate.set(yscale="log", ylabel="learning rate × λ₀")
    sharp.axhline(1, color="#c0392b", linestyle="--", label="threshold")
    sharp.set(yscale="log", ylabel="lr × sharpness / 2", xlabel="step")
    for panel in (loss, rate, sharp):
        panel.legend(fontsize=8)
    save(made, "persistent_catapult")


if __name__ == "__main__":
    main([int(s) for s in sys.argv[1:]] or [0])
