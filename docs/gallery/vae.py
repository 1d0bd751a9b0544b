"""A variational autoencoder: a loss with random numbers in it, computed by the model, and its critical learning rate.

python vae.py        # writes vae.png
"""

import copy
import os

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import sharpkern as sk
from sharpkern.train.config import DataConfig
from sharpkern.train.data import load

STEPS = int(os.environ.get("GALLERY_STEPS", 300))
LR = 3e-3


class VAE(nn.Module):
    """Gaussian code of 8 numbers; returns its loss, as many training scripts have it."""

    def __init__(self, code: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(196, 128), nn.SiLU(), nn.Linear(128, 2 * code))
        self.decoder = nn.Sequential(nn.Linear(code, 128), nn.SiLU(), nn.Linear(128, 196))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Minus the evidence lower bound, a pixel's mean; a new sample of the code at each call."""
        mean, log_var = self.encoder(images).chunk(2, -1)
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        error = 0.5 * (self.decoder(z) - images.flatten(1)).square().sum(-1)
        divergence = 0.5 * (mean.square() + log_var.exp() - log_var - 1).sum(-1)
        return (error + divergence).mean() / 196


def loss_fn(loss, _):
    """Hand on the model's own loss."""
    return loss


def loss_after(step_size, seed):
    """Take one step of Adam on copies, and evaluate the loss with the noise of a seed."""
    trial, adam = copy.deepcopy((model, optimizer))
    adam.param_groups[0]["lr"] = step_size
    torch.manual_seed(1)
    trial(batch[0]).backward()
    adam.step()
    torch.manual_seed(seed)
    return trial(batch[0]).item()


torch.manual_seed(0)
images = nn.functional.avg_pool2d(load(DataConfig("fashion-mnist-5k")).train_inputs, 2)  # 14 x 14
model = VAE()
optimizer = torch.optim.Adam(model.parameters(), lr=LR)
steps, critical = [], []
for step in range(1, STEPS + 1):
    batch = images[torch.randint(0, len(images), (128,))], None  # a model that returns its loss needs no targets
    if step % 10 == 1:
        found = sk.critical_learning_rate(model, loss_fn, batch, optimizer, start=critical[-1] if critical else None)
        steps.append(step)
        critical.append(found)
    model(batch[0]).backward()
    optimizer.step()
    optimizer.zero_grad()

torch.manual_seed(1)  # the noise of the search, and of the curve below
found = sk.critical_learning_rate(model, loss_fn, batch, optimizer, tol=0.01)
grid = np.linspace(0, 1.5 * found.value, 31)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
left.plot(steps, [c.value for c in critical], ".-", label="critical learning rate of Adam's next step")
left.axhline(LR, color="k", linestyle="--", label="learning rate in use")
left.set(xlabel="step", yscale="log")
left.legend()
right.plot(
    grid, [loss_after(x, seed) for seed, x in enumerate(grid, 2)], ".", color="0.6", label="fresh noise each time"
)
right.plot(grid, [loss_after(x, 1) for x in grid], label="one noise")
right.axvline(found.value, color="C3", linestyle="--", label="critical learning rate")
right.axhline(found.loss, color="k", linewidth=0.5)
right.set(xlabel="learning rate of the step", ylabel="loss after the step", title=f"after {STEPS} steps")
right.locator_params("x", nbins=6)
right.legend()
figure.savefig("vae.png", dpi=110)

H = sk.HessianOperator(model, loss_fn, batch)  # draws the noise once; every product sees it
v = torch.randn(H.n)
print(f"loss {found.loss:.4f}, critical learning rate {found.value:.3g}, {found.forward_passes} forward passes")
print(f"one operator, twice the same product: they differ by {(H @ v - H @ v).abs().max():.1g}")
noises = [sk.sharpness(model, loss_fn, batch, tol=0.01).value for _ in range(4)]
print("sharpness under four noises:", ", ".join(f"{value:.4g}" for value in noises))
