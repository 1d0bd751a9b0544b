"""Track your own network in your own loop: a small ResNet, mini-batches, Adam with warmup, and a checkpoint.

    python examples/own_model.py        # about 20 seconds on two cores

Four noisy patterns are told apart. Half way, the run is saved and goes on from the file, as a second process would.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sharpkern as sk


class Block(nn.Module):
    """Two convolutions with batch norm, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2)]
        norms = [nn.BatchNorm2d(width) for _ in range(2)]
        self.body = nn.Sequential(convolutions[0], norms[0], nn.ReLU(), convolutions[1], norms[1])

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, width, height, width]`` to the same shape."""
        return torch.relu(x + self.body(x))


def resnet() -> nn.Module:
    """Return a ResNet for images ``[batch, 3, 16, 16]`` and four classes."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Block(16), Block(16), head)


def parts() -> dict[str, Any]:
    """Build everything that a checkpoint must restore."""
    model = resnet()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    schedule = sk.WarmupLR(optimizer, 3e-3, 20)
    tracker = sk.SharpnessTracker(model, nn.functional.cross_entropy, optimizer, tol=0.02, every=5)
    return {"model": model, "optimizer": optimizer, "schedule": schedule, "tracker": tracker}


def train(run: dict[str, Any], batches: list[tuple[Tensor, Tensor]]) -> None:
    """Take one step on each batch; the tracker's pass replaces ``loss.backward()``."""
    for batch in batches:
        rec = run["tracker"].step(batch)  # sets p.grad, updates batch-norm statistics
        run["optimizer"].step()
        run["schedule"].step()
        if rec.measured:
            sharp, edge = rec.preconditioned_sharpness, rec.threshold
            print(f"step {rec.step}: loss {rec.loss:.3f}, preconditioned sharpness {sharp:.0f}, threshold {edge:.0f}")


def main() -> None:
    """Train half of the batches, save, load into new objects, and train the rest."""
    torch.manual_seed(0)
    patterns, classes = torch.randn(4, 3, 16, 16), torch.randint(0, 4, (60, 32))
    batches = [(patterns[y] + 2 * torch.randn(32, 3, 16, 16), y) for y in classes]
    run = parts()
    train(run, batches[:30])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        torch.save({name: part.state_dict() for name, part in run.items()}, path)
        resumed, saved = parts(), torch.load(path)
    for name, part in resumed.items():
        part.load_state_dict(saved[name])
    train(resumed, batches[30:])


if __name__ == "__main__":
    main()
