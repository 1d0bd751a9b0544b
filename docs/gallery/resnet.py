"""A small ResNet under mini-batch SGD: batch sharpness and sharpness through warmup, against 2 / lr.

python resnet.py        # writes resnet.png
"""

import os

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import sharpkern as sk
from sharpkern.train.config import DataConfig
from sharpkern.train.data import load

STEPS = int(os.environ.get("GALLERY_STEPS", 400))


class Residual(nn.Module):
    """Two convolutions with batch norm, added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[batch, channels, height, width]`` to the same shape."""
        return torch.relu(x + self.body(x))


torch.manual_seed(0)
data = load(DataConfig("fashion-mnist-5k"))  # 5,000 images that come with the package
images = nn.functional.avg_pool2d(data.train_inputs, 2)  # 14 x 14
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), Residual(16), Residual(16),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
)  # fmt: skip
optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
schedule = sk.WarmupLR(optimizer, 1.0, STEPS // 2)
tracker = sk.SharpnessTracker(model, nn.functional.cross_entropy, optimizer, every=10, directions=True)

records = []
for _ in range(STEPS):
    chosen = torch.randint(0, len(images), (32,))
    records.append(tracker.step((images[chosen], data.train_targets[chosen])))
    optimizer.step()
    schedule.step()

step = np.arange(1, STEPS + 1)
square = np.array([r.grad_norm**2 for r in records])
window = np.ones(20)
# E[g'Hg] / E[g'g], the expectations over the last 20 batches
along = np.convolve([r.batch_sharpness for r in records] * square, window) / np.convolve(square, window)
measured = [r for r in records if r.measured]

figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
top.plot(step, [r.loss for r in records], linewidth=0.8)
top.set(ylabel="loss of the batch", yscale="log")
bottom.plot([r.step for r in measured], [r.sharpness for r in measured], ".-", label="sharpness of one batch")
bottom.plot(step, along[:STEPS], label="batch sharpness, mean of 20")
bottom.plot(step, [2 / r.lr for r in records], "k--", label="2 / learning rate")
bottom.set(xlabel="step", ylabel="curvature", yscale="log")
bottom.legend()
figure.savefig("resnet.png", dpi=110)
late = np.median((along[:STEPS] * [r.lr for r in records])[-STEPS // 4 :])
sharp = np.median([r.sharpness * r.lr for r in measured if r.step > STEPS - STEPS // 4])
print(f"medians of the last quarter, times the learning rate: batch sharpness {late:.2f}, sharpness {sharp:.2f}")
