"""Small networks trained together, their parameters stacked, against one after the other: gradient, product, step.

    python benchmarks/bench_stacked.py [--rounds 5]

FCN-3 on 784 inputs, mean squares, one thread; CPU milliseconds a cell, the smallest of interleaved rounds. ``vmap`` is
``torch.func`` mapped over stacked parameters, ``batched`` autograd through ``torch.baddbmm``; the better one counts.
Tracked: a gradient and 2.5 products, where a stack's own solver would make every cell wait for the slowest, which is
left out. Untracked: a step of ``Run`` that carries the sharpness, its row and all, against a stacked gradient step that
writes nothing. So the gains are the most that a stacked runner could have.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from interleave import interleave
from torch import Tensor
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

import sharpkern as sk
from sharpkern.train.config import DataConfig, ModelConfig, OptimizerConfig, TrackingConfig, TrainConfig
from sharpkern.train.loop import Run
from sharpkern.train.losses import half_mean_squares
from sharpkern.train.models import FCN

CASES = ((16, 32, 32), (64, 32, 8), (64, 32, 32), (16, 128, 8), (64, 128, 8), (64, 500, 8), (64, 1000, 8))
PRODUCTS = 2.5  # of a tracked step, on average
CALLS = 5  # of each contender in a round
LR = 1e-3


def batched_loss(weights: list[Tensor], biases: list[Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the sum of the cells' losses, by batched matrix products: weights ``[cells, out, in]``."""
    h = batch[0].expand(len(weights[0]), *batch[0].shape)
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        h = torch.baddbmm(bias[:, None], h.relu() if i else h, weight.mT)
    return 0.5 * (h - batch[1]).square().mean((1, 2)).sum()


def contenders(width: int, size: int, cells: int, folder: Path) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name; those that begin with "stacked" do all cells at once."""
    config = TrainConfig(
        ModelConfig(width=width, depth=3), DataConfig(limit=max(1000, size)), OptimizerConfig(lr=LR),
        TrackingConfig(every=10**9), loss="mse", steps=10**9, eval_every=10**9, checkpoint_every=10**9,
        batch_size=None if size >= 1000 else size, threads=1, out=folder,
    )  # fmt: skip
    run = Run(config)
    steps = run.steps()
    x, y = run.task.batch(1)
    batch = x.flatten(1), y
    models = [FCN(784, 10, depth=3, width=width, seed=seed) for seed in range(cells)]
    hessian = sk.HessianOperator(models[0], half_mean_squares, batch)
    v = torch.randn(hessian.n)

    stacked, _ = stack_module_state(models)  # type: ignore[arg-type]
    fixed = {name: p.detach() for name, p in stacked.items()}
    directions = {name: torch.randn_like(p) for name, p in fixed.items()}
    one = grad(lambda p: 0.5 * (functional_call(models[0], p, batch[0]) - batch[1]).square().mean())
    mapped_gradient = vmap(one)
    mapped_product = vmap(lambda p, d: jvp(one, (p,), (d,))[1])

    leaves = [p.clone().requires_grad_() for p in fixed.values()]
    weights, biases = leaves[::2], leaves[1::2]
    graph = torch.autograd.grad(batched_loss(weights, biases, batch), leaves, create_graph=True)

    trained = [p.clone().requires_grad_() for p in fixed.values()]

    def batched_step() -> None:
        gradients = torch.autograd.grad(batched_loss(trained[::2], trained[1::2], batch), trained)
        with torch.no_grad():
            torch._foreach_add_(trained, gradients, alpha=-LR)

    return {
        "gradient": hessian.refresh,
        "product": lambda: hessian.matvec(v),
        "step": lambda: next(steps),
        "stacked gradient, vmap": lambda: mapped_gradient(fixed),
        "stacked gradient, batched": lambda: torch.autograd.grad(batched_loss(weights, biases, batch), leaves),
        "stacked product, vmap": lambda: mapped_product(fixed, directions),
        "stacked product, batched": lambda: torch.autograd.grad(
            graph, leaves, list(directions.values()), retain_graph=True
        ),
        "stacked step": batched_step,
    }


def cpu_seconds(call: Callable[[], object]) -> Callable[[], float]:
    """Return a call that reports the processor time of one of ``CALLS`` calls."""

    def timed() -> float:
        start = time.process_time()
        for _ in itertools.repeat(None, CALLS):
            call()
        return (time.process_time() - start) / CALLS

    return timed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    heads = ["width, batch, cells", "gradient", "vmap", "batched", "product", "vmap", "batched", "tracked step"]
    heads += ["untracked step", "stacked", "untracked step"]
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    for width, size, cells in CASES:
        with tempfile.TemporaryDirectory() as folder:
            calls = contenders(width, size, cells, Path(folder) / "run")
            seconds = interleave({name: cpu_seconds(call) for name, call in calls.items()}, rounds)
        t = {n: 1e3 * min(s) / (cells if n.startswith("stacked") else 1) for n, s in seconds.items()}
        best = {
            k: min(v for n, v in t.items() if n.startswith(f"stacked {k}")) for k in ("gradient", "product", "step")
        }
        tracked = (t["gradient"] + PRODUCTS * t["product"]) / (best["gradient"] + PRODUCTS * best["product"])
        shown = [t["gradient"], t["stacked gradient, vmap"], t["stacked gradient, batched"], t["product"]]
        shown += [t["stacked product, vmap"], t["stacked product, batched"]]
        cells_of_row = [f"{width}, {size}, {cells}", *(f"{x:.2f}" for x in shown), f"× {tracked:.2f}"]
        cells_of_row += [f"{t['step']:.2f}", f"{best['step']:.2f}", f"× {t['step'] / best['step']:.2f}"]
        print(f"| {' | '.join(cells_of_row)} |", flush=True)


if __name__ == "__main__":
    main()
