"""Solvers for the largest algebraic eigenvalues of a symmetric operator: Lanczos and batched power iteration.

A solver sees ``n``, ``dtype``, ``device`` and ``matmat``, and works on blocks of k vectors as rows ``[k, n]``. Both
report Ritz values: lower bounds of the eigenvalues they stand for, up to rounding. A residual norm r certifies that
*some* eigenvalue lies within r of the Ritz value; that no larger one was missed is likely from a random start, not
certain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import kernels


class SymmetricOperator(Protocol):
    """What a solver needs."""

    n: int
    dtype: torch.dtype
    device: torch.device

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply with the columns of ``[n, k]``."""


@dataclass(frozen=True)
class EigenResult:
    """The largest algebraic eigenvalues, as far as a solver got.

    Attributes:
        eigenvalues: ``[k]`` float64, descending; Ritz values.
        eigenvectors: ``[k, n]``, unit rows, the operator's dtype; Ritz vectors.
        residual_norms: ``[k]`` float64, ``|A v - theta v|``.
        error_bounds: ``[k]`` float64; an eigenvalue lies this close to the Ritz value. Equal to the residual norms: the
            sharper ``r^2 / gap`` would need a proven bound on the next eigenvalue, which no Krylov space gives.
        matvecs: products spent, counted by columns.
        converged: every residual norm is at most ``tol * |theta|``, or at rounding level.
        reason: why the solver stopped, in a sentence.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residual_norms: Tensor
    error_bounds: Tensor
    matvecs: int
    converged: bool
    reason: str


def lanczos(
    op: SymmetricOperator,
    k: int = 1,
    tol: float = 1e-3,
    v0: Tensor | None = None,
    max_matvecs: int = 200,
    generator: torch.Generator | None = None,
    *,
    max_basis: int | None = None,
) -> EigenResult:
    """Find the k largest algebraic eigenvalues by Lanczos with full reorthogonalisation and thick restarts.

    Rayleigh-Ritz over all vectors multiplied so far, expanded by the residual of the worst wanted pair: from one start
    vector this is Lanczos. Several start vectors are all used, so a warm start may hold any number of guesses. The
    products are kept, so the residuals are exact and a restart costs none.

    Args:
        op: symmetric operator.
        k: how many eigenvalues. With k > 1 the random start has k vectors, so that a multiple eigenvalue is seen.
        tol: relative residual norm at which to stop.
        v0: ``[n]`` or ``[m, n]``, any length; None for random vectors.
        max_matvecs: the most products to spend.
        generator: of random vectors, on the CPU; None for seed 0.
        max_basis: the most vectors to keep before a restart; default max(2k + 20, 40). Memory: twice that many vectors.

    Returns:
        An ``EigenResult``; ``converged`` is False when ``max_matvecs`` ran out.

    Raises:
        ValueError: k, tol, max_matvecs, max_basis or v0 do not fit the operator.
        RuntimeError: a product is not finite.

    Cost: ``matvecs`` products; about 5mn numbers moved per product, m vectors in the basis.
    Source: Parlett, The Symmetric Eigenvalue Problem (1998), chapter 13; Wu and Simon (2000) for thick restarts.

    >>> class Diagonal:
    ...     n, dtype, device = 3, torch.float64, torch.device("cpu")
    ...     def matmat(self, V): return torch.tensor([[-9.0], [1.0], [2.0]]).double() * V
    >>> round(lanczos(Diagonal(), tol=1e-8).eigenvalues.item(), 6)
    2.0
    """
    limit = max(2 * k + 20, 40) if max_basis is None else max_basis
    _check(op, k, tol, max_matvecs)
    if limit < k + 2:
        raise ValueError(f"max_basis must be at least k + 2 = {k + 2}, got {limit}.")
    generator = generator or torch.Generator().manual_seed(0)
    basis = _Basis(op, min(limit, op.n))
    start = _start(op, k, v0, generator)[: min(max_matvecs, op.n, limit)]
    basis.extend(basis.orthonormal(start, generator))
    while True:
        theta, Y = basis.ritz()
        wanted = min(k, len(theta))
        residuals, norms = basis.residuals(theta[:wanted], Y[:, :wanted])
        floor = 10 * torch.finfo(op.dtype).eps * float(theta.abs().max())
        met = norms <= torch.clamp(tol * theta[:wanted].abs(), min=floor)
        done = wanted == k and bool(met.all())
        if done or basis.matvecs >= max_matvecs or basis.size == op.n:
            break
        if basis.size == basis.limit:
            basis.restart(Y[:, : max(k + 1, basis.limit // 2)])
        worst = int(torch.where(met, -1.0, norms / theta[:wanted].abs().clamp(min=floor)).argmax())
        direction = residuals[worst : worst + 1] if float(norms[worst]) > floor else None
        basis.extend(basis.orthonormal(direction, generator))
    vectors = basis.combination(Y[:, :wanted])
    complete = basis.size == op.n
    return EigenResult(
        theta[:wanted], vectors, norms, norms.clone(), basis.matvecs, done or complete,
        _reason(done, complete, norms, theta, tol, max_matvecs),
    )  # fmt: skip


class _Basis:
    """Orthonormal rows Q, their products W = A Q, and T = Q W'; grown a few rows at a time."""

    def __init__(self, op: SymmetricOperator, limit: int) -> None:
        self.op, self.limit = op, limit
        self.size = self.matvecs = 0
        self.Q = self.W = torch.empty(0, op.n, dtype=op.dtype, device=op.device)
        self.T = torch.zeros(limit, limit, dtype=torch.float64)

    def _reserve(self, rows: int) -> None:
        if rows <= len(self.Q):
            return
        capacity = min(self.limit, max(4, 2 * rows))
        for name in ("Q", "W"):
            old = getattr(self, name)
            new = old.new_empty(capacity, self.op.n)
            new[: self.size] = old[: self.size]
            setattr(self, name, new)

    def extend(self, rows: Tensor) -> None:
        """Add orthonormal rows: multiply them and complete T."""
        m, j = self.size, len(rows)
        self._reserve(m + j)
        products = self.op.matmat(rows.t()).t()
        self.matvecs += j
        self.Q[m : m + j], self.W[m : m + j] = rows, products
        self.size = m + j
        block = kernels.gram(self.Q[: self.size], self.W[m : self.size]).cpu()
        if not bool(block.isfinite().all()):
            raise RuntimeError(f"product {self.matvecs} of the operator is not finite: the operator cannot be trusted.")
        self.T[: self.size, m : self.size] = block
        self.T[m : self.size, : self.size] = block.t()

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Return Ritz values, descending, and their coordinates as columns."""
        T = self.T[: self.size, : self.size]
        theta, Y = torch.linalg.eigh((T + T.t()) / 2)
        return theta.flip(0), Y.flip(1)

    def residuals(self, theta: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``A v - theta v`` ``[k, n]`` of the Ritz pairs, from the kept products, and the norms ``[k]``."""
        R = self.combination(Y, self.W)
        Z = self.combination(Y * theta, self.Q)
        R -= Z
        return R, kernels.gram(R, R).diagonal().sqrt().cpu()

    def combination(self, Y: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return ``Y' Q`` (or of other rows)."""
        rows = self.Q if rows is None else rows
        return kernels.combine(Y.t().contiguous().to(rows.device), rows[: self.size])

    def restart(self, Y: Tensor) -> None:
        """Keep only the span of some Ritz vectors; their products are known."""
        Q, W = self.combination(Y), self.combination(Y, self.W)
        kept = Y.t() @ self.T[: self.size, : self.size] @ Y
        self.size = Y.shape[1]
        self.Q[: self.size], self.W[: self.size] = Q, W
        self.T[: self.size, : self.size] = kept

    def orthonormal(self, rows: Tensor | None, generator: torch.Generator) -> Tensor:
        """Orthonormalise rows against Q and each other; rows without a new direction are replaced by random ones."""
        result: list[Tensor] = []
        for row in [None] if rows is None else rows.split(1):
            for attempt in range(5):
                candidate = _random(1, self.op, generator) if row is None or attempt else row
                unit = self._unit(candidate, result)
                if unit is not None:
                    result.append(unit)
                    break
        return torch.cat(result)

    def _unit(self, row: Tensor, others: list[Tensor]) -> Tensor | None:
        """Project out Q and others until nothing is left to project (twice is enough); None if nothing remains."""
        row = row / torch.linalg.vector_norm(row)
        for _ in range(3):
            for block in [self.Q[: self.size], *others]:
                if len(block):
                    row = row - kernels.combine(kernels.gram(row, block), block)
            length = float(torch.linalg.vector_norm(row))
            if length < 100 * torch.finfo(row.dtype).eps:
                return None
            row /= length
            if length > 0.7:
                break
        return row


def power_iteration(
    op: SymmetricOperator,
    k: int = 1,
    tol: float = 1e-3,
    v0: Tensor | None = None,
    max_matvecs: int = 200,
    generator: torch.Generator | None = None,
) -> EigenResult:
    """Find the k largest algebraic eigenvalues by shifted power iteration on a block, with Rayleigh-Ritz.

    Each step multiplies all k vectors at once and rotates them to Ritz vectors. A power iteration alone finds the
    eigenvalue of largest magnitude; here the spectrum is shifted up as soon as a negative Ritz value is seen (by half
    its size, which already makes the algebraic top dominant; by all of it while no positive one is known), and the
    block is stirred with random numbers so that it can leave the negative direction.

    Args:
        op: symmetric operator.
        k: how many eigenvalues, and vectors in the block.
        tol: relative residual norm at which to stop.
        v0: ``[n]`` or ``[m, n]``, m <= k, any length; None for random vectors.
        max_matvecs: the most products to spend; at least k.
        generator: of random vectors, on the CPU; None for seed 0.

    Returns:
        An ``EigenResult``; ``converged`` is False when ``max_matvecs`` ran out.

    Raises:
        ValueError: k, tol, max_matvecs or v0 do not fit the operator.
        RuntimeError: a product is not finite.

    Cost: ``matvecs`` products and a few passes over the block each; Lanczos needs fewer products. Memory: 3 blocks.
    Source: Parlett, The Symmetric Eigenvalue Problem (1998), chapters 4 and 14.
    """
    _check(op, k, tol, max_matvecs)
    generator = generator or torch.Generator().manual_seed(0)
    start = _start(op, k, v0, generator)
    if len(start) > k:
        raise ValueError(f"v0 must have at most k = {k} rows, got {len(start)}: Lanczos takes any number.")
    V = _orthonormal_block(start, op, generator)
    lowest = shift = 0.0
    matvecs = 0
    while True:
        products = op.matmat(V.t()).t().contiguous()
        matvecs += k
        T = kernels.gram(V, products).cpu()
        if not bool(T.isfinite().all()):
            raise RuntimeError(f"product {matvecs} of the operator is not finite: the operator cannot be trusted.")
        if k > 1:
            rotation = torch.linalg.eigh((T + T.t()) / 2)[1].flip(1).t().contiguous().to(V.device)
            V, products = kernels.combine(rotation, V), kernels.combine(rotation, products)
        theta, norms, following = (t.cpu() if t.ndim == 1 else t for t in kernels.power_step(V, products))
        if float(theta.min()) < 0:
            # theta - residual, not theta: a vector between two ends of equal size would hide both behind its mean.
            lowest = min(lowest, float((theta - norms).min()))
        needed = -lowest * (1.05 if float(theta[0]) <= 0 else 0.55)
        floor = 10 * torch.finfo(op.dtype).eps * float(theta.abs().max())
        settled = shift >= 0.9 * needed
        done = settled and bool((norms <= torch.clamp(tol * theta.abs(), min=floor)).all())
        if done or matvecs + k > max_matvecs:
            break
        if not settled:
            shift = needed
            V = _orthonormal_block(V + 0.1 * _random(k, op, generator) / op.n**0.5, op, generator)
        elif k == 1 and shift == 0.0:
            V = following
        else:
            V = _orthonormal_block(products.add_(V, alpha=shift), op, generator)
    return EigenResult(
        theta, V, norms, norms.clone(), matvecs, done, _reason(done, False, norms, theta, tol, max_matvecs)
    )


def _orthonormal_block(V: Tensor, op: SymmetricOperator, generator: torch.Generator) -> Tensor:
    """Orthonormalise k rows by Cholesky QR, twice; a block that has lost its rank is stirred first."""
    V = V / torch.linalg.vector_norm(V, dim=1, keepdim=True).clamp(min=torch.finfo(V.dtype).tiny)
    for _ in range(2):
        G = kernels.gram(V, V).cpu()
        L, info = torch.linalg.cholesky_ex(G)
        if int(info) or float(L.diagonal().min()) < 1e-5:
            V = V + _random(len(V), op, generator) / op.n**0.5
            L = torch.linalg.cholesky(kernels.gram(V, V).cpu())
        inverse = torch.linalg.solve_triangular(L, torch.eye(len(V), dtype=torch.float64), upper=False)
        V = kernels.combine(inverse.to(V.device), V)
    return V


def _random(rows: int, op: SymmetricOperator, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, op.n, dtype=op.dtype, generator=generator).to(op.device)


def _start(op: SymmetricOperator, k: int, v0: Tensor | None, generator: torch.Generator) -> Tensor:
    """Check v0 and fill it up to k rows with random ones."""
    if v0 is None:
        return _random(k, op, generator)
    rows = v0[None] if v0.ndim == 1 else v0
    if rows.ndim != 2 or rows.shape[1] != op.n or not len(rows):
        raise ValueError(f"v0 must be [{op.n}] or [m, {op.n}], got {list(v0.shape)}.")
    if rows.dtype != op.dtype or rows.device != op.device:
        raise ValueError(f"v0 must be {op.dtype} on {op.device}, got {rows.dtype} on {rows.device}.")
    lengths = torch.linalg.vector_norm(rows, dim=1)
    if not bool((lengths.isfinite() & (lengths > 0)).all()):
        raise ValueError(f"v0's rows must be finite and not zero; their lengths are {lengths.tolist()}.")
    missing = k - len(rows)
    return rows if missing <= 0 else torch.cat([rows, _random(missing, op, generator)])


def _check(op: SymmetricOperator, k: int, tol: float, max_matvecs: int) -> None:
    if not 1 <= k <= op.n:
        raise ValueError(f"k must lie between 1 and n = {op.n}, got {k}.")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}.")
    if max_matvecs < k:
        raise ValueError(f"max_matvecs must be at least k = {k}, got {max_matvecs}.")


def _reason(done: bool, complete: bool, norms: Tensor, theta: Tensor, tol: float, max_matvecs: int) -> str:
    worst = float((norms / theta[: len(norms)].abs().clamp(min=1e-300)).max())
    if done:
        return f"converged: relative residual {worst:.1e}; tol was {tol:.1e}."
    if complete:
        return "the basis spans the whole space: the eigenvalues are exact up to rounding."
    return f"stopped at max_matvecs={max_matvecs} with relative residual {worst:.1e}; tol was {tol:.1e}."
