"""How does the cost of a product grow with parameters, batch, depth, context and number of vectors?"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from interleave import interleave
from peers import Peer
from workloads import Workload, gpt, mlp

from . import Effort
from .product import GRADIENT, gradient

Build = Callable[[int], tuple[Workload, int]]  # -> workload, number of vectors
AXES: dict[str, tuple[tuple[int, ...], Build]] = {
    "width": ((64, 128, 256, 512, 1024), lambda size: (mlp(width=size, batch=128), 1)),
    "batch": ((32, 64, 128, 256, 512), lambda size: (mlp(width=256, batch=size), 1)),
    "depth": ((2, 4, 8, 16), lambda size: (mlp(width=256, hidden=size, batch=128), 1)),
    "context": ((32, 64, 128, 256), lambda size: (gpt(context=size), 1)),
    "GPT width": ((96, 192, 384, 768), lambda size: (gpt(batch=1, d=size), 1)),
    "vectors": ((1, 2, 4, 8, 16), lambda size: (mlp(width=256, batch=128), size)),
}


def ask(axis: str, found: dict[str, type[Peer]], effort: Effort) -> dict[str, Any]:
    """Time one axis; the sizes are interleaved too. A quick run takes every other size."""
    sizes, build = AXES[axis]
    sizes = sizes[::2] if effort.quick else sizes
    calls: dict[str, Callable[[], object]] = {}
    for size in sizes:
        torch.manual_seed(0)
        work, k = build(size)
        V = torch.randn(sum(p.numel() for p in work.model.parameters()), k)
        calls[f"{GRADIENT} {size}"] = partial(gradient, work)
        for name, cls in found.items():
            peer = cls(work)
            peer.prepare()
            calls[f"{name} {size}"] = partial(peer.multiply, peer.native(V))
    seconds = interleave(calls, effort.rounds, effort.seconds, effort.untimed)
    exponents = {}
    for name in (GRADIENT, *found):
        exponents[name] = _slope([(size, min(seconds[f"{name} {size}"])) for size in sizes])
    return {
        "question": "growth", "axis": axis, "sizes": list(sizes), "contenders": [GRADIENT, *found],
        "base": f"{GRADIENT} {sizes[0]}", "seconds": seconds, "exponents": exponents,
    }  # fmt: skip


def _slope(points: list[tuple[float, float]]) -> float:
    """Least squares of log against log."""
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    x0, y0 = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - x0) * (y - y0) for x, y in zip(xs, ys, strict=True)) / sum((x - x0) ** 2 for x in xs)
