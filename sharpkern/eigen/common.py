"""What all solvers share: the operator they see, the result they give, checks of arguments and products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import kernels


class Space(Protocol):
    """How the processes of an operator hold its vectors: each a part of every vector, or each the whole."""

    @property
    def n(self) -> int:
        """Length of a whole vector; the operator's own ``n`` is that of this process's part."""

    @property
    def whole(self) -> bool:
        """Whether each process holds the whole of every vector."""

    def total(self, partial: Tensor) -> Tensor:
        """Turn inner products of the parts into those of the whole vectors, the same bits on every process."""

    def random_rows(self, rows: int, generator: torch.Generator) -> Tensor:
        """Return this process's part of standard normal vectors, ``[rows, operator.n]``."""


class SymmetricOperator(Protocol):
    """What a solver needs; an attribute ``space`` besides, where several processes work on the same vectors."""

    n: int
    dtype: torch.dtype
    device: torch.device

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply with the columns of ``[n, k]``."""


@dataclass(frozen=True)
class EigenResult:
    """Extreme eigenvalues, as far as a solver got.

    Attributes:
        eigenvalues: ``[k]`` float64, descending; Ritz values.
        eigenvectors: ``[k, n]``, unit rows, the operator's dtype; Ritz vectors.
        residual_norms: ``[k]`` float64, ``|A v - theta v|``.
        error_bounds: ``[k]`` float64; some eigenvalue lies this close to the Ritz value: the residual norm,
            and ten roundings of the largest Ritz value seen.
        error_estimates: ``[k]`` float64, at most ``error_bounds``: ``r^2 / gap`` where the solver's own
            neighbouring Ritz interval ``[theta +- r]`` leaves a gap, plus rounding. It holds if no eigenvalue
            lies in that gap, which a Krylov space makes likely and cannot prove.
        matvecs: products spent, counted by columns.
        converged: every residual norm is at most ``tol * |theta|``, or at rounding level.
        reason: why the solver stopped, in a sentence.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residual_norms: Tensor
    error_bounds: Tensor
    error_estimates: Tensor
    matvecs: int
    converged: bool
    reason: str


def space_of(op: SymmetricOperator) -> Space | None:
    """Return how processes share the operator's vectors; None where this process holds them alone."""
    return getattr(op, "space", None)


def check_whole(op: Any, purpose: str) -> None:
    """Check that this process holds the whole of the operator's vectors.

    Raises:
        ValueError: it holds a part, with which the purpose would give numbers of the part.
    """
    space = space_of(op)
    if space is not None and not space.whole:
        raise ValueError(
            f"{purpose} needs whole vectors, and this operator's are sharded over processes: use the eigenvalue "
            "solvers, or an operator of a model that is not under fully_shard."
        )


def dimension(op: SymmetricOperator) -> int:
    """Return the length of a whole vector."""
    space = space_of(op)
    return op.n if space is None else space.n


def gram(op: SymmetricOperator, V: Tensor, W: Tensor) -> Tensor:
    """Return the inner products of whole vectors, see ``kernels.gram``; one small sum where processes hold parts."""
    space, products = space_of(op), kernels.gram(V, W)
    return products if space is None else space.total(products)


def lengths_of(op: SymmetricOperator, rows: Tensor) -> Tensor:
    """Return the Euclidean norms of whole vectors, ``[k, n] -> [k]``, in the rows' dtype."""
    space = space_of(op)
    if space is None:
        return torch.linalg.vector_norm(rows, dim=1)
    # row by row, because only the diagonal of a Gram matrix is wanted
    squares = torch.stack([kernels.gram(row, row)[0, 0] for row in rows.contiguous().split(1)])
    return space.total(squares).sqrt().to(rows.dtype)


def random_rows(rows: int, op: SymmetricOperator, generator: torch.Generator) -> Tensor:
    """Standard normal ``[rows, n]``, the same on every device."""
    if (space := space_of(op)) is not None:
        return space.random_rows(rows, generator)
    # Drawn on the CPU: a CUDA generator gives other numbers, and results would depend on the device.
    return torch.randn(rows, op.n, dtype=op.dtype, generator=generator).to(op.device)


def multiply(op: SymmetricOperator, rows: Tensor) -> Tensor:
    """``[k, n] -> [k, n]``."""
    # Solvers keep vectors as rows, contiguous for the vector kernels; the public protocol has columns, as SciPy's.
    products = op.matmat(rows.t()).detach().t().contiguous()
    if products.shape != rows.shape:
        raise ValueError(
            f"the operator must map [{op.n}, {len(rows)}] to the same shape, got {list(products.t().shape)}."
        )
    return products


class NonFiniteProductError(RuntimeError):
    """A product of the operator holds NaN or infinity: no number can be made of it."""


def check_finite(block: Tensor, before: int) -> None:
    """Check ``Q W'`` ``[m, k]`` of k new products, of which some were made before."""
    # Through the small Gram block that is needed anyway: a NaN anywhere in a product spoils its column.
    bad = ~block.isfinite().all(0)
    if bool(bad.any()):
        index = before + int(bad.nonzero()[0]) + 1
        raise NonFiniteProductError(f"product {index} of the operator is not finite: its values cannot be trusted.")


def rounding_level(op: SymmetricOperator, theta: Tensor) -> float:
    """Return a residual norm that rounding alone may leave, from all Ritz values at hand."""
    # An error of a product is relative to the operator's norm, so a small Ritz value gets the largest one's rounding.
    return 10 * torch.finfo(op.dtype).eps * float(theta.abs().max())


def start_rows(op: SymmetricOperator, k: int, v0: Tensor | None, generator: torch.Generator) -> Tensor:
    """Check v0 and fill it up to k rows with random ones."""
    if v0 is None:
        return random_rows(k, op, generator)
    rows = (v0[None] if v0.ndim == 1 else v0).detach()
    if rows.ndim != 2 or rows.shape[1] != op.n or not len(rows):
        raise ValueError(f"v0 must be [{op.n}] or [m, {op.n}], got {list(v0.shape)}.")
    if rows.dtype != op.dtype or rows.device != op.device:
        raise ValueError(f"v0 must be {op.dtype} on {op.device}, got {rows.dtype} on {rows.device}.")
    lengths = lengths_of(op, rows)
    if not bool((lengths.isfinite() & (lengths > 0)).all()):
        raise ValueError(f"v0's rows must be finite and not zero; their lengths are {lengths.tolist()}.")
    # Fewer rows than wanted eigenvalues could not see a multiple eigenvalue at all.
    missing = k - len(rows)
    return (rows if missing <= 0 else torch.cat([rows, random_rows(missing, op, generator)])).contiguous()


def check_arguments(op: SymmetricOperator, k: int, tol: float, max_matvecs: int) -> None:
    """Raise a ValueError for what no solver can take."""
    n = dimension(op)
    if not 1 <= k <= n:
        raise ValueError(f"k must lie between 1 and n = {n}, got {k}.")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}.")
    if max_matvecs < k:
        raise ValueError(f"max_matvecs must be at least k = {k}, got {max_matvecs}.")
