"""What the examples share: real images, a tracked run, an untracked run, and how a figure is written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import sharpkern as sk
from sharpkern.curvature.losses import NonFiniteLossError
from sharpkern.train.config import DataConfig
from sharpkern.train.data import load
from sharpkern.train.losses import half_mean_squares
from sharpkern.train.models import FCN

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
Batch = tuple[torch.Tensor, torch.Tensor]
loss_fn = half_mean_squares
torch.set_num_threads(1)  # small networks: more threads gain nothing


def images(examples: int = 500) -> Batch:
    """Return the first real images of the packaged Fashion-MNIST subset, standardised, and one-hot classes."""
    data = load(DataConfig("fashion-mnist-5k", limit=examples))
    return data.train_inputs, torch.nn.functional.one_hot(data.train_targets, 10).float()


def network(parameterisation: str, seed: int = 0, width: int = 128) -> FCN:
    """FCN-4: three hidden layers."""
    return FCN(784, 10, width=width, parameterisation=parameterisation, seed=seed)


def minibatches(batch: Batch, size: int, seed: int = 0) -> Iterator[Batch]:
    """Endless epochs, each a new permutation."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(batch[0]), generator=generator).split(size):
            if len(chosen) == size:
                yield batch[0][chosen], batch[1][chosen]


def tracked(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    batches: Iterable[Batch],
    steps: int,
    loss_fn: Any = loss_fn,
) -> list[sk.Record]:
    """Train, and return a record of every step; a run that diverges ends early."""
    tracker = sk.SharpnessTracker(model, loss_fn, optimizer, tol=0.03)
    records: list[sk.Record] = []
    for batch in itertools.islice(batches, steps):
        try:
            records.append(tracker.step(batch))
        except NonFiniteLossError:
            break
        optimizer.step()
        schedule.step()
    return records


def trained(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, batch: Batch, steps: int
) -> list[float]:
    """Train on the full batch without tracking, and return the loss of every step, up to 1e5 times the first."""
    losses: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_fn(model(batch[0]), batch[1])
        losses.append(float(loss.detach()))
        if not losses[-1] <= 1e5 * losses[0]:
            return [*losses[:-1], math.nan]
        loss.backward()
        optimizer.step()
        schedule.step()
    return losses


def colours(count: int) -> list[Any]:
    """From dark to light."""
    return [colormaps["plasma"](0.85 * i / max(1, count - 1)) for i in range(count)]


def figure(
    rows: int, columns: int, title: str, *, width: float = 5.2, height: float = 2.6
) -> tuple[Figure, np.ndarray[Any, Any]]:
    """Return a figure, and its axes as ``[rows, columns]``."""
    made = Figure(figsize=(width * columns, height * rows + 0.5), layout="constrained")
    made.suptitle(title, fontsize=12)
    return made, made.subplots(rows, columns, squeeze=False)


def save(made: Figure, name: str) -> None:
    """Write a figure beside the documentation, with a grid everywhere."""
    for axes in made.axes:
        axes.grid(alpha=0.3)
    IMAGES.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(made).print_figure(IMAGES / f"{name}.png", dpi=110)
    print(f"plot: docs/images/{name}.png")
