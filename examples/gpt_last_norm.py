"""A small GPT with and without its last layer norm: without it the loss starts ten times sharper.

    python examples/gpt_last_norm.py [SEED]             # about 3 minutes

After figure 17 of Kalra and Barkeshli, Why warmup the learning rate? (2024): pre-norm transformer, next-character
cross-entropy on English text, gradient descent on one batch of 16 x 32 characters, warmup from 0 to 4 / lambda_0.
"""

from __future__ import annotations

import itertools
import sys

import torch
from common import figure, save, tracked

import sharpkern as sk
from sharpkern.train.config import DataConfig
from sharpkern.train.data import load
from sharpkern.train.losses import token_cross_entropy
from sharpkern.train.models import GPT

STEPS = WARMUP = 192


def main(seed: int) -> None:
    """Warm both models up through the threshold."""
    data = load(DataConfig("text", context=32, limit=16))
    batch = data.train_inputs, data.train_targets
    made, axes = figure(2, 2, f"GPT, 4 blocks, width 64, gradient descent, warmup of {WARMUP} steps, seed {seed}")
    for (top, bottom), last_norm in zip(axes.T, (True, False), strict=True):
        model = GPT(data.classes, 32, width=64, heads=4, blocks=4, last_norm=last_norm, seed=seed)
        initial = sk.sharpness(model, token_cross_entropy, batch).value
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        schedule = sk.WarmupLR(optimizer, 4 / initial, WARMUP)
        records = tracked(model, optimizer, schedule, itertools.repeat(batch), STEPS, token_cross_entropy)
        step, sharpness, rates = zip(*((r.step, r.sharpness, r.lr) for r in records), strict=True)
        top.plot(step, [r.loss for r in records], color="#1f5fa8")
        top.set(title=f"{'with' if last_norm else 'without'} last layer norm, λ₀ = {initial:.3g}", ylabel="loss")
        bottom.plot(step, sharpness, color="#1f5fa8", label="sharpness")
        bottom.plot(step, [r.threshold for r in records], "--", color="#c0392b", label="threshold 2/η")
        bottom.set(xlabel="step", yscale="log", ylabel="sharpness", ylim=(min(sharpness) / 2, 4 * max(sharpness)))
        bottom.legend(fontsize=8)
        regime = sk.classify_regime(sharpness, rates, 2.0)
        print(
            f"{'with' if last_norm else 'without'} last norm: initial sharpness {initial:.3g}, loss "
            f"{records[0].loss:.3g} to {records[-1].loss:.3g} in {len(records)} steps; {regime.name}: {regime.evidence}"
        )
    save(made, "gpt_last_norm")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
