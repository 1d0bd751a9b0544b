"""Full-batch gradient descent through warmups of several lengths: muP sharpens first (C1), SP flattens (C2).

    python examples/warmup_regimes.py [SEED ...]        # about 2 minutes a seed; the first is drawn

After figure 1 of Kalra and Barkeshli, Why warmup the learning rate? (2024): FCN-4, mean squares, targets of
1 / lambda_0 for muP and 32 / lambda_0 for SP.
"""

from __future__ import annotations

import itertools
import statistics
import sys

import torch
from common import colours, figure, images, loss_fn, network, save, tracked

import sharpkern as sk

STEPS = 384
SETTINGS = (
    ("mup", 1.0, (1, 64, 256, 512), "muP, target 1/λ₀ (C1)"),
    ("sp", 32.0, (1, 16, 64, 256), "SP, target 32/λ₀ (C2)"),
)


def main(seeds: list[int]) -> None:
    """Train both networks through all warmups, and draw loss and sharpness of the first seed."""
    batch = images()
    made, axes = figure(2, 2, f"Full-batch gradient descent, 500 Fashion-MNIST images, FCN-4-128, seed {seeds[0]}")
    for (parameterisation, target, warmups, title), (top, bottom) in zip(SETTINGS, axes.T, strict=True):
        for seed, (warmup, colour) in itertools.product(seeds, zip(warmups, colours(len(warmups)), strict=True)):
            model = network(parameterisation, seed)
            initial = sk.sharpness(model, loss_fn, batch).value
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            schedule = sk.WarmupLR(optimizer, target / initial, warmup)
            records = tracked(model, optimizer, schedule, itertools.repeat(batch), STEPS)
            tell(f"{parameterisation}, seed {seed}, warmup {warmup}", records, initial)
            if seed != seeds[0]:
                continue
            step = [r.step for r in records]
            top.plot(step, [r.loss for r in records], color=colour, label=f"warmup {warmup}")
            bottom.plot(step, [r.sharpness / initial for r in records], color=colour)
            bottom.plot(step, [r.threshold / initial for r in records], "--", color=colour, linewidth=1)
            if len(records) < STEPS:
                top.plot(step[-1], 5 * records[0].loss, "x", color=colour, markersize=9, markeredgewidth=2)
            start = records[0].loss
            top.set(title=title, yscale="log", ylabel="loss (× diverges)", ylim=(start / 500, 15 * start))
        top.legend(fontsize=8, loc="upper right", ncols=2)
        bottom.plot([], [], "--", color="black", linewidth=1, label="threshold 2/η")
        bottom.plot([], [], color="black", label="sharpness")
        bottom.set(xlabel="step", yscale="log", ylabel="in units of λ₀", ylim=(0.02, 30))
        bottom.legend(fontsize=8, loc="upper right")
    save(made, "warmup_regimes")


def tell(name: str, records: list[sk.Record], initial: float) -> None:
    """Print how a run met the threshold."""
    ratio = [r.ratio for r in records]
    losses, sharpness, rates = zip(*((r.loss, r.sharpness, r.lr) for r in records), strict=True)
    outcome = "diverges" if len(records) < STEPS else f"loss {losses[0]:.3g} to {losses[-1]:.3g}"
    crossing = sk.first_crossing(ratio)
    if outcome == "diverges" or crossing is None:
        print(f"{name}: {outcome}")
        return
    found = sk.detect_catapults(losses, sharpness, rates, 2.0)
    first = found[0].start + 1 if found else "none"
    largest = max((c.loss_ratio for c in found), default=1.0)
    print(
        f"{name}: {outcome}; crosses at step {crossing + 1}, lr {rates[crossing] * initial:.2f}/λ₀, sharpness "
        f"{sharpness[crossing] / initial:.2f} λ₀; afterwards lr x sharpness / 2 has median "
        f"{statistics.median(ratio[crossing + 1 :]):.2f}; first catapult at step {first}, "
        f"largest {largest:.2f} times the loss"
    )


if __name__ == "__main__":
    main([int(s) for s in sys.argv[1:]] or [0])
