"""A probe of a size that a budget pays for: the first examples of a batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..curvature.chunked import MicroBatches
from ..curvature.operators import HessianOperator
from ..eigen import ShortLanczos
from .pace import PRODUCTS

_LEAST = 16  # examples: fewer say too little of the data, and cost hardly less
_TIMED = 64  # examples of the larger probe that is timed
_STEPS = 4.0  # from one look to the next, for which the largest probe is taken
_ROUNDS = 3


def fitted_probe(
    make: Callable[[Any], HessianOperator],
    batch: Any,
    *,
    fraction: float,
    operators: int,
    beside: bool,
    chunk: int | None,
) -> Any:
    """Return the first examples of a batch, as many as let a budget look about every fourth step.

    Args:
        make: batch -> its Hessian.
        batch: of a step; of ``MicroBatches`` the first one is cut.
        fraction: of a step's own time that may be spent.
        operators: how many are solved at a look.
        beside: a look costs the batch's own loss and gradient too.
        chunk: the most examples that may be differentiated at a time.

    Returns:
        A copy, of 16, 32, 64, ... examples or of all.

    Raises:
        ValueError: the batch cannot be cut into examples.

    Cost: two exports, and four looks at up to 64 examples.
    """
    first = batch.batches[0] if isinstance(batch, MicroBatches) else batch
    # Of a class that pytree does not know, as ``HessianOperator`` takes it.
    if isinstance(first, Mapping) and pytree.tree_structure(first) == pytree.tree_structure(0):
        first = dict(first)
    rows = _rows(first)
    if rows <= _LEAST:
        return _head(first, rows)
    small, large = (min(size, rows, chunk or rows) for size in (_LEAST, _TIMED))
    primal, look = _seconds(make(_head(first, small)), operators)
    if small == large:
        primal_slope, look_slope = primal / small, look / small
    else:
        more_primal, more_look = _seconds(make(_head(first, large)), operators)
        primal_slope, look_slope = (
            max(0.0, more - less) / (large - small) for more, less in ((more_primal, primal), (more_look, look))
        )
    whole = sum(map(_rows, batch.batches)) if isinstance(batch, MicroBatches) else rows
    own = primal + primal_slope * (whole - small)
    paid = _STEPS * fraction * own - (own if beside else 0.0)
    fitting = [size for size in _sizes(rows) if look + look_slope * (size - small) <= paid]
    return _head(first, max(fitting, default=_LEAST))


def _sizes(rows: int) -> Iterator[int]:
    """Powers of two, so that a clock's noise seldom changes the choice; and all examples."""
    size = _LEAST
    while size < rows:
        yield size
        size *= 2
    yield rows


def _seconds(hessian: HessianOperator, operators: int) -> tuple[float, float]:
    """Time loss and gradient, and a look; the least of some rounds each."""
    solver = ShortLanczos(tol=1e-12, max_matvecs=PRODUCTS)  # never reached, so that every solve has all its products
    solver.step(hessian)
    primals, looks = [], []
    for _ in range(_ROUNDS + 1):
        start = time.perf_counter()
        hessian.refresh()
        float(hessian.gradient[0])  # waits for the device
        middle = time.perf_counter()
        for _ in range(operators):
            solver.step(hessian, at_most=PRODUCTS)
        primals.append(middle - start)
        looks.append(time.perf_counter() - start)
    # Not the first round: it records sweeps, and touches memory.
    return min(primals[1:]), min(looks[1:])


def _rows(batch: Any) -> int:
    lengths = [len(leaf) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    if not lengths or min(lengths) != max(lengths):
        raise ValueError(
            f'probe="auto" cuts examples off the first batch, whose tensors have lengths {lengths}: they must have one '
            "row per example. Give probe= a batch of your own."
        )
    return lengths[0]


def _head(batch: Any, size: int) -> Any:
    """Copy the first examples: a loader may write the next batch into the same memory."""

    def cut(leaf: Any) -> Any:
        return leaf[:size].detach().clone() if isinstance(leaf, Tensor) and leaf.ndim else leaf

    with torch.no_grad():
        return pytree.tree_map(cut, batch)
