"""What the gate costs: at the first step, at every refresh, and now and then.

    OMP_NUM_THREADS=1 python benchmarks/bench_gate.py [--rounds 15]

Processor seconds, the smallest of interleaved rounds. A first step is that of a program just built: its primal sweeps
run once and are recorded; with the gate an eager pass and a comparison come before. What it shares with an export that
nothing checks, the export above all, is in neither. A refresh is a replay of the primal sweeps, and its look for
changes a part of it; a step that is measured has a product at least.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from interleave import interleave
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from workloads import images

import sharpkern as sk
from sharpkern.curvature.eager import run_eagerly
from sharpkern.curvature.engines import CHECK_EVERY
from sharpkern.curvature.gate import compare
from sharpkern.rop import Program, ReplayedProgram
from sharpkern.train.config import DataConfig
from sharpkern.train.data import load
from sharpkern.train.models import CNN, FCN, GPT

_LOOKS = 100  # timed together, for one is too short


class Case(NamedTuple):
    """One model with its loss and batch."""

    name: str
    model: nn.Module
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    batch: tuple[Tensor, Tensor]


def cases() -> list[Case]:
    """A fully connected network, a CNN with batch norm, a GPT; each trains in milliseconds a step."""
    cnn = CNN(1, 10, width=8)
    cnn.norms = nn.ModuleList(nn.BatchNorm2d(norm.num_channels) for norm in cnn.norms)
    text = load(DataConfig("text", context=64, limit=8))
    return [
        Case("FCN, 4 layers of 256, batch 128", FCN(784, 10, width=256), F.cross_entropy, images(128)),
        Case("CNN, 4 convolutions, batch norm, batch 32", cnn, F.cross_entropy, images(32)),
        Case(
            "GPT, 4 blocks of 128, batch 8 of 64",
            GPT(256, 64),
            lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()),
            (text.train_inputs, text.train_targets),
        ),
    ]


def timed(call: Callable[[], object], times: int = 1) -> Callable[[], float]:
    """Return a call that gives its processor seconds."""

    def run() -> float:
        start = time.process_time()
        for _ in range(times):
            call()
        return (time.process_time() - start) / times

    return run


def seconds(case: Case, rounds: int) -> dict[str, float]:
    """Time each part of the gate on one case: name -> the smallest processor seconds."""
    H = sk.HessianOperator(case.model, case.loss_fn, case.batch, verify=False)
    assert isinstance(H.engine, ReplayedProgram), "this model is to have a program"
    module, engines, graph = H.module, H._engines, H.engine.program.graph
    leaves, spec = pytree.tree_flatten(case.batch)
    params, v = list(H.params.values()), torch.randn(H.n)

    def gradient() -> None:
        torch.autograd.grad(case.loss_fn(case.model(case.batch[0]), case.batch[1]), params)

    def first_step(*, gate: bool) -> float:
        engine = ReplayedProgram(Program(graph, H.params, keep_outputs=False))
        start = time.process_time()
        if gate:
            eager = run_eagerly(module, case.batch, H.params)
            assert compare(engine, module, leaves, spec, H.params, eager).agrees
        if not gate or engine.program.new_buffers():  # else those of the comparison serve
            engine.forward(module, leaves)
            engine.backward()
        engine.gradient()
        return time.process_time() - start

    def look() -> None:
        engines.unchanged()
        assert engines.for_batch(leaves, spec) is H.engine

    def check() -> None:
        assert engines._checked(H.engine, leaves, spec) is H.engine

    parts = {
        "gradient": timed(gradient),
        "first, trusted": lambda: first_step(gate=False),
        "first, gated": lambda: first_step(gate=True),
        "eager pass": timed(lambda: run_eagerly(module, case.batch, H.params)),
        "look": timed(look, _LOOKS),
        "refresh": timed(H.refresh),
        "product": timed(lambda: H @ v),
        "check": timed(check),
    }
    return {name: min(times) for name, times in interleave(parts, rounds).items()}


def row(case: Case, rounds: int) -> str:
    """One line of the table."""
    s = seconds(case, rounds)
    gate = s["first, gated"] - s["first, trusted"]
    cells = [
        f"{1e3 * s['gradient']:.2f} ms",
        f"{gate / s['gradient']:.2f}",
        f"{s['eager pass'] / s['gradient']:.2f}",
        f"{1e6 * s['look']:.0f} us",
        f"{s['look'] / s['refresh']:.2%}",
        f"{s['check'] / s['gradient']:.2f}",
        f"{s['check'] / (CHECK_EVERY * s['refresh']):.2%}",
        f"{s['check'] / (CHECK_EVERY * (s['refresh'] + s['product'])):.2%}",
    ]
    return f"| {case.name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    heads = ["model", "one gradient", "first step's gate, in gradients", "of it the eager pass", "look for changes"]
    heads += ["of a refresh", "comparison, in gradients", f"of {CHECK_EVERY} refreshes", "with a product each"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    for case in cases():
        print(row(case, rounds), flush=True)


if __name__ == "__main__":
    main()
