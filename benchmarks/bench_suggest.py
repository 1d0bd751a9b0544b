"""Is the suggested warmup good? ``python benchmarks/bench_suggest.py`` writes suggest.json and docs/lab/warmup.md.

Each problem is trained for the same steps on the same batches by four ways to choose the learning rate: the best of a
grid, ``suggest_warmup``, a learning-rate range test, and a plain warmup to a usual rate. All keep the rate constant
after the warmup. A way's loss is the mean over the last tenth of the steps.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from report import between
from run import versions
from torch import Tensor, nn

import sharpkern as sk
from sharpkern.train.config import DataConfig
from sharpkern.train.data import load
from sharpkern.train.losses import token_cross_entropy
from sharpkern.train.models import CNN, FCN, GPT

ROOT = Path(__file__).parents[1]
STEPS, WARMUP, BATCH = 400, 40, 64
HALVINGS = 12  # rates of the grid, each half the one before
RANGE = 100  # steps of a range test
Make = Callable[[Any], torch.optim.Optimizer]
# Name -> optimizer by rate, the largest rate of the grid, and the rate that people take.
OPTIMIZERS: dict[str, tuple[Callable[[Any, float], torch.optim.Optimizer], float, float]] = {
    "SGD": (lambda p, lr: torch.optim.SGD(p, lr), 8.0, 0.1),
    "momentum": (lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), 2.0, 0.1),
    "Adam": (lambda p, lr: torch.optim.Adam(p, lr), 0.125, 1e-3),
    "AdamW": (lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.01), 0.125, 1e-3),
}


class NormedCNN(nn.Module):
    """Three convolutions with batch norm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        widths, layers = [1, width, 2 * width, 2 * width], []
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ViT(nn.Module):
    """Two transformer blocks over patches of 7 x 7 pixels."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches, self.place = nn.Conv2d(1, width, 7, 7), nn.Parameter(0.02 * torch.randn(16, width))
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).mT + self.place).mean(1))


def autoencoder() -> nn.Module:
    """784-128-16-128-784, tanh."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), nn.Tanh(), nn.Linear(128, 16), nn.Tanh(), nn.Linear(16, 128), nn.Tanh(),
        nn.Linear(128, 784),
    )  # fmt: skip


@dataclass
class Problem:
    """One model on real data with one optimizer."""

    name: str
    optimizer: str
    make: Callable[[], nn.Module]
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    batches: list[tuple[Tensor, Tensor]]

    def start(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return the model at its initial state, the same every time, and its optimizer."""
        torch.manual_seed(0)
        model = self.make()
        return model, OPTIMIZERS[self.optimizer][0](model.parameters(), 1e-3)


def problems() -> list[Problem]:
    """Return the models with the optimizers that people train them with."""
    images = load(DataConfig("fashion-mnist-5k"))
    x, y = images.train_inputs, images.train_targets
    pictures = _batches(x, y)
    itself = [(x, x.flatten(1)) for x, _ in pictures]
    text = load(DataConfig("text", context=32))
    tokens = _batches(text.train_inputs, text.train_targets, 16)
    cross = F.cross_entropy
    kinds: dict[str, tuple[Callable[[], nn.Module], Any, Any, tuple[str, ...]]] = {
        "FCN": (lambda: FCN(784, 10, width=128), cross, pictures, ("SGD", "momentum", "Adam")),
        "CNN": (lambda: CNN(1, 10, width=8), cross, pictures, ("SGD", "Adam")),
        "CNN, batch norm": (NormedCNN, cross, pictures, ("momentum", "AdamW")),
        "ViT": (ViT, cross, pictures, ("momentum", "AdamW")),
        "GPT": (lambda: GPT(256, 32, width=64, heads=2, blocks=2), token_cross_entropy, tokens, ("momentum", "AdamW")),
        "autoencoder": (autoencoder, F.mse_loss, itself, ("momentum", "Adam")),
    }
    return [
        Problem(name, optimizer, make, loss_fn, batches)
        for name, (make, loss_fn, batches, optimizers) in kinds.items()
        for optimizer in optimizers
    ]


def _batches(x: Tensor, y: Tensor, size: int = BATCH) -> list[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    return [(x[i], y[i]) for i in order.split(size) if len(i) == size]


def train(problem: Problem, target: float, start: float, warmup: int) -> float:
    """Return the loss after training; infinite if it diverged."""
    model, optimizer = problem.start()
    losses: list[float] = []
    for t in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = start + (target - start) * min(1.0, (t + 1) / warmup)
        losses.append(_step(problem, model, optimizer, t))
        if not losses[-1] < 100 * losses[0]:
            return math.inf
    return statistics.fmean(losses[-STEPS // 10 :])


def _step(problem: Problem, model: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> float:
    x, y = problem.batches[t % len(problem.batches)]
    loss = problem.loss_fn(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def range_test(problem: Problem) -> float:
    """Return the rate of the steepest fall of the smoothed loss while the rate rises from 1e-6 to 10.

    Source: Smith, Cyclical learning rates (2017), in the form that training libraries have made of it.
    """
    model, optimizer = problem.start()
    rates = [1e-6 * 1e7 ** (t / (RANGE - 1)) for t in range(RANGE)]
    smooth: list[float] = []
    average = 0.0
    for t, lr in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = lr
        average = 0.95 * average + 0.05 * _step(problem, model, optimizer, t)
        smooth.append(average / (1 - 0.95 ** (t + 1)))
        if not smooth[-1] <= 4 * min(smooth):
            break
    # The first ten steps are the average's own start.
    falls = [b - a for a, b in zip(smooth[10:], smooth[11:], strict=False)]
    return rates[11 + falls.index(min(falls))]


def ask(problem: Problem) -> dict[str, Any]:
    """Train one problem by every way."""
    _, largest, usual = OPTIMIZERS[problem.optimizer]
    model, optimizer = problem.start()
    begun = time.perf_counter()
    found = sk.suggest_warmup(model, problem.loss_fn, problem.batches, optimizer)
    seconds = time.perf_counter() - begun
    grid = [
        {"lr": lr, "warmup": w, "loss": train(problem, lr, 0.0, w)}
        for lr in (largest / 2**i for i in range(HALVINGS))
        for w in (1, WARMUP)
    ]
    found_by_range = range_test(problem)
    ways = {
        "suggest": (found.lr_target, found.lr_init, found.warmup_steps),
        "range test": (found_by_range, 0.0, WARMUP),
        "plain": (usual, 0.0, WARMUP),
    }
    return {
        "problem": f"{problem.name}, {problem.optimizer}",
        "first": problem.loss_fn(problem.start()[0](problem.batches[0][0]), problem.batches[0][1]).item(),
        "grid": grid,
        "ways": {name: {"lr": way[0], "warmup": way[2], "loss": train(problem, *way)} for name, way in ways.items()},
        "lr_target_max": found.lr_target_max,
        "trials": [asdict(t) for t in found.trials],
        "suggest_gradients": found.gradients + found.matvecs + found.forward_passes / 3,
        "suggest_seconds": seconds,
    }


def regret(entry: dict[str, Any], way: str) -> float:
    """Return the part of the best fall of the loss that a way misses: 0 is as good as the best of the grid."""
    best = min(run["loss"] for run in entry["grid"])
    return (entry["ways"][way]["loss"] - best) / (entry["first"] - best)


def table(result: dict[str, Any]) -> str:
    """Return the table, the worst regret of ``suggest`` first."""
    lines = [
        "| problem | best of the grid: loss, rate, warmup | suggested: rate, warmup | regret: suggested | range test "
        "| plain warmup | cost of the suggestion, gradients |",
        "|---|---|---|---|---|---|---|",
    ]
    for e in sorted(result["entries"], key=lambda e: -regret(e, "suggest")):
        best, own = min(e["grid"], key=lambda run: run["loss"]), e["ways"]["suggest"]
        regrets = " | ".join(_percent(regret(e, way)) for way in ("suggest", "range test", "plain"))
        lines.append(
            f"| {e['problem']} | {best['loss']:.3g}, {best['lr']:.3g}, {best['warmup']} | {own['lr']:.3g}, "
            f"{own['warmup']} | {regrets} | {e['suggest_gradients']:.0f} |"
        )
    cost = STEPS * 2 * HALVINGS
    lines += [
        "",
        f"{STEPS} steps each, on the same batches of {BATCH} images or 16 sequences; one initial state. The grid has "
        f"{2 * HALVINGS} runs ({cost} gradients). Regret is the part of the best run's fall that a way misses; a "
        f"negative one is better than the grid. torch {result['versions']['torch']}, commit "
        f"{result['versions']['commit']}, {result['date']}; `benchmarks/bench_suggest.py`.",
        "",
    ]
    return "\n".join(lines)


def _percent(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else "diverged"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="problems whose name holds this; nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    date = datetime.now(timezone.utc).date().isoformat()
    result: dict[str, Any] = {"date": date, "versions": versions(), "entries": []}
    for problem in problems():
        if options.only and options.only not in f"{problem.name}, {problem.optimizer}":
            continue
        entry = ask(problem)
        result["entries"].append(entry)
        own, best = entry["ways"]["suggest"], min(entry["grid"], key=lambda run: run["loss"])
        regrets = {way: _percent(regret(entry, way)) for way in entry["ways"]}
        print(f"{entry['problem']}: {regrets}, suggested {own}, best {best}", flush=True)
    if options.only:
        print(table(result))
        return
    (ROOT / "benchmarks" / "results" / "suggest.json").write_text(json.dumps(result))
    between(ROOT / "docs" / "lab" / "warmup.md", table(result))


if __name__ == "__main__":
    main()
