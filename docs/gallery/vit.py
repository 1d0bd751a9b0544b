"""A small vision transformer under AdamW: preconditioned sharpness through warmup, against its threshold.

python vit.py        # writes vit.png
"""

import os

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import sharpkern as sk
from sharpkern.train.config import DataConfig
from sharpkern.train.data import load

STEPS = int(os.environ.get("GALLERY_STEPS", 160))


class ViT(nn.Module):
    """Patches of 7 x 7 pixels, a class token, two pre-norm transformer layers."""

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 17, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map ``[batch, 1, 28, 28]`` to the classes' logits."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.layers(x)[:, 0])


data = load(DataConfig("fashion-mnist-5k"))  # 5,000 images that come with the package
figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, sharey="row", layout="constrained")
for (top, bottom), warmup in zip(axes.T, (1, STEPS // 2), strict=True):
    torch.manual_seed(0)
    model = ViT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.01)
    schedule = sk.WarmupLR(optimizer, 1e-2, warmup)
    tracker = sk.SharpnessTracker(model, nn.functional.cross_entropy, optimizer, every=4, tol=0.03)
    records = []
    for _ in range(STEPS):
        chosen = torch.randint(0, 5000, (32,))
        records.append(tracker.step((data.train_inputs[chosen], data.train_targets[chosen])))
        optimizer.step()
        schedule.step()
    measured = [r for r in records if r.measured]
    step = [r.step for r in measured]
    top.plot([r.step for r in records], [r.loss for r in records], linewidth=0.8)
    top.set(title=f"warmup of {warmup} steps" if warmup > 1 else "no warmup", ylabel="loss of the batch")
    bottom.plot(step, [r.preconditioned_sharpness for r in measured], label="preconditioned sharpness")
    bottom.plot(step, [r.threshold for r in measured], "k--", label="threshold, 38 / learning rate")
    bottom.set(xlabel="step", yscale="log")
    ratios = [r.ratio for r in measured]
    last = sum(r.loss for r in records[-20:]) / len(records[-20:])
    print(
        f"warmup of {warmup}: first step at {ratios[0]:.3g} times the threshold, median {np.median(ratios):.2g}, ",
        end="",
    )
    above = sum(ratio > 1 for ratio in ratios)
    print(f"above it at {above} of {len(measured)} measured steps; mean of the last losses {last:.2f}")
axes[1, 0].legend()
figure.savefig("vit.png", dpi=110)
