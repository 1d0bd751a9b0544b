"""What the estimators share: their result, probe vectors, checked products, and the span of a block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .. import kernels
from ..eigen.common import SymmetricOperator, multiply

AT_ONCE = 16  # vectors in a block: what the engines take at once, and a bound on memory
T = TypeVar("T", float, Tensor)


@dataclass(frozen=True)
class Estimate(Generic[T]):
    """A number or tensor that was estimated from random probes, or computed.

    Attributes:
        value: float, or float64 tensor.
        standard_error: like ``value``; one standard deviation of the estimate. It is itself estimated from the spread
            of the probes, so that it is rough where there are few of them. It leaves rounding out. Zero if ``exact``;
            infinite where there was a single probe, which has no spread.
        matvecs: vectors that the operator was applied to, as product or as quadratic form.
        exact: no probe was random: n was small enough for the identity.
        method: what was done, in words.
    """

    value: T
    standard_error: T
    matvecs: int
    exact: bool
    method: str


def seeded(generator: torch.Generator | None) -> torch.Generator:
    """Return the generator, or one of seed 0: results repeat unless asked otherwise."""
    return generator or torch.Generator().manual_seed(0)


def signs(rows: int, op: SymmetricOperator, generator: torch.Generator) -> Tensor:
    """Return random signs ``[rows, n]``, the same on every device."""
    # Eight signs from each random byte: drawing one by one takes as long as a product of a small model. On the CPU,
    # because a CUDA generator gives other numbers.
    drawn = torch.randint(0, 256, (rows, -(-op.n // 8), 1), dtype=torch.uint8, generator=generator)
    bits = drawn.bitwise_right_shift(torch.arange(8, dtype=torch.uint8)).bitwise_and_(1)
    return bits.view(rows, -1)[:, : op.n].to(op.device).to(op.dtype).mul_(2).sub_(1)


def identity(op: SymmetricOperator) -> Iterator[tuple[int, Tensor]]:
    """Yield the rows of the identity in blocks, each with the number of its first row."""
    for start in range(0, op.n, AT_ONCE):
        rows = torch.zeros(min(AT_ONCE, op.n - start), op.n, dtype=op.dtype, device=op.device)
        rows[:, start:].fill_diagonal_(1)
        yield start, rows


def blocks(count: int) -> Iterator[int]:
    """Yield the sizes of blocks for a number of vectors."""
    for start in range(0, count, AT_ONCE):
        yield min(AT_ONCE, count - start)


def in_blocks(function: Callable[[SymmetricOperator, Tensor], Tensor], op: SymmetricOperator, rows: Tensor) -> Tensor:
    """Apply ``products`` or ``forms`` to a block of any length."""
    return torch.cat([function(op, part) for part in rows.split(AT_ONCE)]) if len(rows) else rows.new_zeros(0)


def products(op: SymmetricOperator, rows: Tensor) -> Tensor:
    """Return ``A v`` of rows, ``[k, n] -> [k, n]``.

    Raises:
        RuntimeError: a product is not finite.
    """
    result = multiply(op, rows)
    _check_finite(torch.linalg.vector_norm(result, dim=1, dtype=torch.float64))
    return result


def forms(op: SymmetricOperator, rows: Tensor) -> Tensor:
    """Return ``v'Av`` of rows, ``[k, n] -> [k]`` float64 on the CPU; at half a product's cost where the operator can.

    Raises:
        RuntimeError: a value is not finite.
    """
    # Solvers' operators need no more than matmat; those of this package have the cheaper form too.
    if hasattr(op, "quadratic_form"):
        values = op.quadratic_form(rows.t())
    else:
        values = torch.linalg.vecdot(products(op, rows).double(), rows.double())
    _check_finite(values)
    return values.cpu()


def span(rows: Tensor) -> Tensor:
    """Return an orthonormal basis ``[r, n]`` of the rows' span, without directions that are lost in rounding.

    Dependent rows are expected: the products of an operator of low rank are. Any basis keeps the estimators unbiased,
    if only it is orthonormal.
    """
    for _ in range(2):  # the first pass leaves rounding times the condition number, the second rounding alone
        values, vectors = torch.linalg.eigh(kernels.gram(rows, rows).cpu())
        # A Gram matrix squares the condition number, so float64 itself sees no ratio below 3e-7.
        smallest = max(1e-13, (30 * torch.finfo(rows.dtype).eps) ** 2)
        kept = values > smallest * values[-1].clamp(min=torch.finfo(torch.float64).tiny)
        C = (vectors[:, kept] / values[kept].sqrt()).t().contiguous()
        if not len(C):  # the zero operator
            return rows[:0]
        rows = kernels.combine(C.to(rows.device), rows)
    return rows


def without(rows: Tensor, Q: Tensor) -> Tensor:
    """Project orthonormal rows Q out of rows: ``(I - Q'Q) v``."""
    if not len(Q):
        return rows
    return rows - kernels.combine(kernels.gram(rows, Q), Q)


def spread(samples: Tensor) -> tuple[float, float]:
    """Return mean and standard error of independent samples, ``[k]`` float64."""
    # One sample has no spread: an infinite error says so, where zero would be taken for certainty.
    if len(samples) < 2:
        return float(samples.mean()), math.inf
    return float(samples.mean()), float(samples.std() / len(samples) ** 0.5)


def _check_finite(values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise RuntimeError("a product of the operator is not finite: no estimate from it can be trusted.")
