"""What all solvers share: the operator they see, the result they give, checks of arguments and products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import kernels

# Rounding levels (of ten units) that a product may be off by: float32 products of networks with 10^5 parameters were
# off by up to 95 units, relative to the operator's norm. Also what a basis of the whole space, which has nothing left
# to improve, may leave.
OF_PRODUCTS = 10.0

# Float64 squared norms within these lose nothing to under- or overflow; a row outside is multiplied before it is
# squared, by powers of two, which do not round.
_LEAST_SQUARE, _LARGEST_SQUARE = 1e-270, 1e300
_ENLARGED, _REDUCED = 2.0**900, 2.0**-600


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
    """What a solver needs; an attribute ``space`` besides, where several processes work on the same vectors.

    And ``product_rounding``, where products round more than their dtype does: relative, of a product's norm.
    """

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
            and a hundred roundings of the largest product seen (of its norm, for a unit vector), which is what the
            operator's products may be off by.
        gap_estimates: ``[k]`` float64, at most ``error_bounds``: ``r^2 / gap`` where the solver's own
            neighbouring Ritz interval ``[theta +- r]`` leaves a gap, plus rounding. No bound: it holds if no
            eigenvalue lies in that gap, and of the random operators in docs/lab/reliability.md one in twenty or
            thirty has one there. For error bars use ``error_bounds``.
        matvecs: products spent, counted by columns.
        converged: every residual norm is at most ``tol * |theta|``, or at rounding level.
        reason: why the solver stopped, in a sentence.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residual_norms: Tensor
    error_bounds: Tensor
    gap_estimates: Tensor
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


def norms_of(op: SymmetricOperator, rows: Tensor) -> Tensor:
    """Return the Euclidean norms of whole vectors, ``[k, n] -> [k]`` float64; right for numbers of every size."""
    factors, squares = _in_range(op, rows)
    return squares.sqrt() / factors


def lengths_of(op: SymmetricOperator, rows: Tensor) -> Tensor:
    """Return ``norms_of`` in the rows' dtype, where it may overflow to infinity."""
    return norms_of(op, rows).to(rows.dtype)


def unit_rows(op: SymmetricOperator, rows: Tensor) -> Tensor:
    """Divide whole vectors by their norms, ``[k, n] -> [k, n]``; rows of zeros stay."""
    factors, squares = _in_range(op, rows)
    # In float64: a subnormal float32 norm has a few bits only, and the quotient must be of length 1.
    scaled = rows.double() * factors[:, None]
    return (scaled / torch.where(squares > 0, squares, 1.0).sqrt()[:, None]).to(rows.dtype)


def _in_range(op: SymmetricOperator, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return a power of two for each row, and the squared norm of the row times it: no square under- or overflows.

    One pass, as without; more where a float64 row is so small or large that its square says nothing. Squares of float32
    numbers always fit into the float64 sums.
    """
    squares = _squares(op, rows)
    factors = range_factors(squares, rows.dtype)
    if rows.dtype == torch.float64 and bool((factors != 1).any()):  # the dtype first: a GPU need not be waited for
        squares = _squares(op, rows * factors[:, None])
    return factors, squares


def range_factors(squares: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the powers of two by which rows of a dtype, with these squared norms, must be multiplied to be squared."""
    factors = torch.ones_like(squares)
    if dtype != torch.float64:
        return factors
    # Constants and no largest element: processes that hold parts of a vector need not exchange it.
    factors = factors.masked_fill(squares < _LEAST_SQUARE, _ENLARGED)
    return factors.masked_fill(squares >= _LARGEST_SQUARE, _REDUCED)


def _squares(op: SymmetricOperator, rows: Tensor) -> Tensor:
    # row by row, because only the diagonal of a Gram matrix is wanted
    squares = torch.stack([kernels.gram(row, row)[0, 0] for row in rows.contiguous().split(1)])
    space = space_of(op)
    return squares if space is None else space.total(squares)


def random_rows(rows: int, op: SymmetricOperator, generator: torch.Generator) -> Tensor:
    """Standard normal ``[rows, n]``, the same on every device."""
    if (space := space_of(op)) is not None:
        return space.random_rows(rows, generator)
    # Drawn on the CPU: a CUDA generator gives other numbers, and results would depend on the device.
    return torch.randn(rows, op.n, dtype=op.dtype, generator=generator).to(op.device)


def multiply(op: SymmetricOperator, rows: Tensor) -> Tensor:
    """``[k, n] -> [k, n]``."""
    # Solvers keep vectors as rows, contiguous for the vector kernels; the public protocol has columns, as SciPy's.
    products = kernels.transpose(op.matmat(rows.t()).detach())
    if products.shape != rows.shape:
        raise ValueError(
            f"the operator must map [{op.n}, {len(rows)}] to the same shape, got {list(products.t().shape)}."
        )
    return products


class NonFiniteProductError(RuntimeError):
    """A product of the operator holds NaN or infinity: no number can be made of it."""


def check_finite(block: Tensor, before: int, products: Tensor) -> None:
    """Check k new products ``[k, n]`` by ``Q W'`` ``[m, k]``; so many were made before.

    Raises:
        NonFiniteProductError: which product; and where it overflowed, the largest number of its dtype.
    """
    # Through the small Gram block that is needed anyway: a NaN anywhere in a product spoils its column.
    bad = ~block.isfinite().all(0)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        why = "its values cannot be trusted."
        if bool(products[first].isinf().any()):
            kind, most = str(products.dtype).removeprefix("torch."), torch.finfo(products.dtype).max
            why = f"it holds a number above {most:.2g}, the largest of {kind}. Scale the loss down, or use float64."
        raise NonFiniteProductError(f"product {before + first + 1} of the operator is not finite: {why}")


def rounding_level(op: SymmetricOperator, size: float) -> float:
    """Return a residual norm that rounding alone may leave.

    Args:
        op: the operator.
        size: the largest norm of a product with a unit vector that was seen, a lower bound of the operator's norm. An
            error of a product is relative to that norm, so a small Ritz value gets the largest one's rounding.
    """
    finfo = torch.finfo(op.dtype)
    relative = max(10 * finfo.eps, getattr(op, "product_rounding", 0.0))
    # Below the normal numbers the error of each element is absolute.
    return relative * size + 10 * dimension(op) ** 0.5 * finfo.eps * finfo.smallest_normal


def start_rows(op: SymmetricOperator, k: int, v0: Tensor | None, generator: torch.Generator) -> Tensor:
    """Check v0 and fill it up to k rows with random ones."""
    if v0 is None:
        return random_rows(k, op, generator)
    rows = (v0[None] if v0.ndim == 1 else v0).detach()
    if rows.ndim != 2 or rows.shape[1] != op.n or not len(rows):
        raise ValueError(f"v0 must be [{op.n}] or [m, {op.n}], got {list(v0.shape)}.")
    if rows.dtype != op.dtype or rows.device != op.device:
        raise ValueError(f"v0 must be {op.dtype} on {op.device}, got {rows.dtype} on {rows.device}.")
    # The squares of scaled rows: the norm of a finite row may be infinite.
    squares = _in_range(op, rows)[1]
    if not bool((squares.isfinite() & (squares > 0)).all()):
        raise ValueError(f"v0's rows must be finite and not zero; their lengths are {norms_of(op, rows).tolist()}.")
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
