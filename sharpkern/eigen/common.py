"""Solvers for the largest algebraic eigenvalues of a symmetric operator: Lanczos and batched power iteration.

A solver sees ``n``, ``dtype``, ``device`` and ``matmat``, and works on blocks of vectors as rows ``[k, n]``.
Both report Ritz values: lower bounds of the eigenvalues they stand for, up to rounding. A residual norm r
certifies that *some* eigenvalue lies within r of the Ritz value; that no larger one was missed is likely from
a random start, not certain.
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
        error_bounds: ``[k]`` float64; some eigenvalue lies this close to the Ritz value: the residual norm,
            and ten roundings of the largest Ritz value seen. The sharper ``r^2 / gap`` would need a proven
            bound on the next eigenvalue, which a Krylov space does not give.
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

    Rayleigh-Ritz over all vectors multiplied so far, expanded by the residual of the wanted pair that is
    furthest from ``tol``: from one start vector this is Lanczos. The products are kept, so the residuals are
    exact and a restart costs none. A residual without a new direction (an invariant subspace) is replaced by
    a random vector.

    Args:
        op: symmetric operator.
        k: how many eigenvalues. With k > 1 the start holds at least k vectors, so that a multiple eigenvalue
            is seen.
        tol: relative residual norm at which to stop.
        v0: ``[n]`` or ``[m, n]``, of any length; all m are multiplied before anything else, and random ones
            are added up to k. None for random vectors.
        max_matvecs: the most products to spend; at least k and m.
        generator: of random vectors, on the CPU; None for seed 0.
        max_basis: the most vectors to keep before a restart; default max(2k + 20, 40), at least k + 2.
            Memory: twice that many vectors, and half of them again while restarting.

    Returns:
        An ``EigenResult``; ``converged`` is False when ``max_matvecs`` ran out.

    Raises:
        ValueError: k, tol, max_matvecs, max_basis or v0 do not fit the operator.
        RuntimeError: a product is not finite.

    Cost: ``matvecs`` products; with m vectors in the basis about 5mn numbers moved per product.
    Source: Parlett, The Symmetric Eigenvalue Problem (1998), chapter 13; Wu and Simon, Thick-restart Lanczos
    method for large symmetric eigenvalue problems (2000).

    >>> class Diagonal:
    ...     n, dtype, device = 3, torch.float64, torch.device("cpu")
    ...
    ...     def matmat(self, V):
    ...         return torch.tensor([[-9.0], [1.0], [2.0]]).double() * V
    >>> round(lanczos(Diagonal(), tol=1e-8).eigenvalues.item(), 6)
    2.0
    """
    limit = max(2 * k + 20, 40) if max_basis is None else max_basis
    _check(op, k, tol, max_matvecs)
    if limit < k + 2:
        raise ValueError(f"max_basis must be at least k + 2 = {k + 2}, got {limit}.")
    generator = generator or torch.Generator().manual_seed(0)
    start = _start(op, k, v0, generator)
    if len(start) > min(max_matvecs, op.n):
        raise ValueError(f"v0 must have at most max_matvecs = {max_matvecs} and n = {op.n} rows, got {len(start)}.")
    basis = _Basis(op, min(max(limit, len(start) + 1), op.n), generator)
    basis.extend(basis.orthonormal(start))
    while True:
        theta, Y = basis.ritz()
        complete = basis.size == op.n
        residuals, norms = basis.residuals(theta[:k], Y[:, :k])
        rounding = _rounding(op, theta)
        allowed = (tol * theta[:k].abs()).clamp(min=10 * rounding if complete else rounding)
        done = bool((norms <= allowed).all())
        if done or complete or basis.matvecs >= max_matvecs:
            break
        if basis.size == basis.limit:
            basis.restart(Y[:, : max(k + 1, basis.limit // 2)])
        worst = int((norms / allowed).argmax())
        basis.extend(basis.orthonormal(residuals[worst : worst + 1]))
    if complete and not done:
        reason = (
            f"stopped with a basis of the whole space, yet a residual norm of {float(norms.max()):.1e}: the "
            f"operator is not symmetric, or its products differ from call to call."
        )
    else:
        reason = _reason(done, norms, theta[:k], tol, max_matvecs)
    vectors = basis.combination(Y[:, :k])
    return EigenResult(theta[:k], vectors, norms, norms + rounding, basis.matvecs, done, reason)


def lobpcg(
    op: SymmetricOperator,
    k: int = 1,
    tol: float = 1e-3,
    v0: Tensor | None = None,
    max_matvecs: int = 200,
    generator: torch.Generator | None = None,
) -> EigenResult:
    """Find the k largest algebraic eigenvalues by LOBPCG without a preconditioner: little memory, more products.

    Rayleigh-Ritz over the block X, its residuals, and the part of X that the last step added. Products are
    kept with their vectors, so an iteration costs k products.

    Args:
        op: symmetric operator.
        k: how many eigenvalues, and vectors in the block; 3k <= n.
        tol: relative residual norm at which to stop.
        v0: ``[n]`` or ``[m, n]``, m <= k, of any length, filled up to k with random vectors.
        max_matvecs: the most products to spend; at least k.
        generator: of random vectors, on the CPU; None for seed 0.

    Returns:
        An ``EigenResult``; ``converged`` is False when ``max_matvecs`` ran out.

    Raises:
        ValueError: k, tol, max_matvecs or v0 do not fit the operator.
        RuntimeError: a product is not finite.

    Cost: ``matvecs`` products. Memory: 6k vectors, and 5k while the basis turns.
    Source: Knyazev, Toward the optimal preconditioned eigensolver (2001).
    """
    _check(op, k, tol, max_matvecs)
    if 3 * k > op.n:
        raise ValueError(f"lobpcg needs 3k <= n = {op.n}, got k = {k}: use lanczos.")
    generator = generator or torch.Generator().manual_seed(0)
    start = _start(op, k, v0, generator)
    if len(start) > k:
        raise ValueError(f"v0 must have at most k = {k} rows, got {len(start)}: lanczos takes any number.")
    basis = _Basis(op, 3 * k, generator)
    basis.extend(basis.orthonormal(start))
    while True:
        theta, Y = basis.ritz()
        residuals, norms = basis.residuals(theta[:k], Y[:, :k])
        rounding = _rounding(op, theta)
        done = bool((norms <= (tol * theta[:k].abs()).clamp(min=rounding)).all())
        if done or basis.matvecs + k > max_matvecs:
            break
        added = Y[:, :k].clone()
        added[:k] = 0  # rows of the old X
        kept = torch.linalg.qr(torch.cat([Y[:, :k], added], 1))[0] if basis.size > k else Y[:, :k]
        basis.restart(kept)
        basis.extend(basis.orthonormal(residuals))
    reason = _reason(done, norms, theta[:k], tol, max_matvecs)
    return EigenResult(theta[:k], basis.combination(Y[:, :k]), norms, norms + rounding, basis.matvecs, done, reason)


class _Basis:
    """Orthonormal rows Q, their products W = A Q, and T = Q W'; grown a few rows at a time."""

    def __init__(self, op: SymmetricOperator, limit: int, generator: torch.Generator) -> None:
        self.op, self.limit, self.generator = op, limit, generator
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
        self.Q[m : m + j], self.W[m : m + j] = rows, _multiply(self.op, rows)
        self.size = m + j
        block = kernels.gram(self.Q[: self.size], self.W[m : self.size]).cpu()
        _check_finite(block, self.matvecs)
        self.matvecs += j
        self.T[: self.size, m : self.size] = block
        self.T[m : self.size, : self.size] = block.t()

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Return Ritz values, descending, and their coordinates as columns."""
        T = self.T[: self.size, : self.size]
        theta, Y = torch.linalg.eigh((T + T.t()) / 2)
        return theta.flip(0), Y.flip(1)

    def residuals(self, theta: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``A v - theta v`` ``[k, n]`` of Ritz pairs, from the kept products, and their norms."""
        R = self.combination(Y, self.W).sub_(self.combination(Y * theta, self.Q))
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

    def orthonormal(self, rows: Tensor) -> Tensor:
        """Orthonormalise rows against Q and each other; a row without a new direction becomes random."""
        result: list[Tensor] = []
        for i in range(len(rows)):
            unit = self._unit(rows[i : i + 1], result)
            while unit is None:
                unit = self._unit(_random(1, self.op, self.generator), result)
            result.append(unit)
        return torch.cat(result)

    def _unit(self, row: Tensor, others: list[Tensor]) -> Tensor | None:
        """Project out Q and others until little is left (twice is enough); None if nothing remains."""
        row = row / torch.linalg.vector_norm(row)
        for _ in range(3):
            for block in [self.Q[: self.size], *others]:
                if len(block):
                    row = row - kernels.combine(kernels.gram(row, block), block)
            length = float(torch.linalg.vector_norm(row))
            if not length > 100 * torch.finfo(row.dtype).eps:
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

        V <- orthonormal basis of (A + s) V,   rotated to Ritz vectors

    Unshifted, the iteration finds the eigenvalues of largest magnitude. So Rayleigh-Ritz on the last two
    blocks together, which costs no product, watches the lower end of the spectrum. Once that is negative, s
    becomes 0.55 times its size: enough for positive eigenvalues to win; or 1.05 times, which makes the whole
    spectrum positive, while the block itself holds a negative Ritz value. Each time s grows, the block is
    stirred with random numbers, so that it can leave negative eigenvectors. Nothing counts as converged
    before s is as large as needed.

    Args:
        op: symmetric operator.
        k: how many eigenvalues, and vectors in the block.
        tol: relative residual norm at which to stop.
        v0: ``[n]`` or ``[m, n]``, m <= k, of any length, filled up to k with random vectors.
        max_matvecs: the most products to spend; at least k.
        generator: of random vectors, on the CPU; None for seed 0.

    Returns:
        An ``EigenResult``; ``converged`` is False when ``max_matvecs`` ran out.

    Raises:
        ValueError: k, tol, max_matvecs or v0 do not fit the operator.
        RuntimeError: a product is not finite.

    Cost: ``matvecs`` products and a few passes over the block each; Lanczos needs far fewer products. Memory:
    3 blocks.
    Source: Parlett, The Symmetric Eigenvalue Problem (1998), chapters 4 and 14.
    """
    _check(op, k, tol, max_matvecs)
    generator = generator or torch.Generator().manual_seed(0)
    start = _start(op, k, v0, generator)
    if len(start) > k:
        raise ValueError(f"v0 must have at most k = {k} rows, got {len(start)}: lanczos takes any number.")
    V = _orthonormal_block(start, op, generator)
    lowest = shift = 0.0
    matvecs = 0
    before = None
    while True:
        products = _multiply(op, V)
        T = kernels.gram(V, products).cpu()
        _check_finite(T, matvecs)
        matvecs += k
        if k > 1:
            rotation = torch.linalg.eigh((T + T.t()) / 2)[1].flip(1).t().contiguous().to(V.device)
            V, products = kernels.combine(rotation, V), kernels.combine(rotation, products)
        theta, norms, following = kernels.power_step(V, products)
        theta, norms = theta.cpu(), norms.cpu()
        lowest = min(lowest, float(theta.min()), _lower_end(V, products, before))
        before = V, products
        needed = -lowest * (1.05 if float(theta.min()) <= 0 else 0.55)
        settled = shift >= 0.9 * needed or k == op.n
        rounding = _rounding(op, theta)
        done = settled and bool((norms <= (tol * theta.abs()).clamp(min=rounding)).all())
        if done or matvecs + k > max_matvecs:
            break
        shift = needed
        if not settled:
            V = _orthonormal_block(V + 0.1 * _random(k, op, generator) / op.n**0.5, op, generator)
        elif k == 1 and shift == 0:
            V = following
        else:
            V = _orthonormal_block(torch.add(products, V, alpha=shift), op, generator)
    order = theta.argsort(descending=True)
    theta, norms, V = theta[order], norms[order], V[order.to(V.device)]
    reason = _reason(done, norms, theta, tol, max_matvecs)
    return EigenResult(theta, V, norms, norms + rounding, matvecs, done, reason)


def _lower_end(V: Tensor, products: Tensor, before: tuple[Tensor, Tensor] | None) -> float:
    """Return the lowest Ritz value of this block and the one before it; 0 without one."""
    if before is None:
        return 0.0
    S, P = torch.cat([V, before[0]]), torch.cat([products, before[1]])
    length, B = torch.linalg.eigh(kernels.gram(S, S).cpu())
    # A negative component changes its sign from block to block, so it is never among the directions dropped
    # here, whose Ritz values would be rounding.
    B = (B / length.clamp(min=1e-3).sqrt())[:, length > 1e-3]
    T = B.t() @ kernels.gram(S, P).cpu() @ B
    return float(torch.linalg.eigvalsh((T + T.t()) / 2)[0])


def _orthonormal_block(V: Tensor, op: SymmetricOperator, generator: torch.Generator) -> Tensor:
    """Orthonormalise k rows by Cholesky QR, twice; a block that has lost its rank is stirred first."""
    V = V / torch.linalg.vector_norm(V, dim=1, keepdim=True).clamp(min=torch.finfo(V.dtype).tiny)
    for _ in range(2):
        L, info = torch.linalg.cholesky_ex(kernels.gram(V, V).cpu())
        if int(info) or float(L.diagonal().min()) < 1e-5:
            V = V + _random(len(V), op, generator) / op.n**0.5
            L = torch.linalg.cholesky(kernels.gram(V, V).cpu())
        inverse = torch.linalg.solve_triangular(L, torch.eye(len(V), dtype=torch.float64), upper=False)
        V = kernels.combine(inverse.to(V.device), V)
    return V


def _random(rows: int, op: SymmetricOperator, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, op.n, dtype=op.dtype, generator=generator).to(op.device)


def _multiply(op: SymmetricOperator, rows: Tensor) -> Tensor:
    """``[k, n] -> [k, n]``."""
    products = op.matmat(rows.t()).detach().t().contiguous()
    if products.shape != rows.shape:
        raise ValueError(
            f"the operator must map [{op.n}, {len(rows)}] to the same shape, got {list(products.t().shape)}."
        )
    return products


def _check_finite(block: Tensor, before: int) -> None:
    """Check ``Q W'`` ``[m, k]`` of k new products, of which some were made before."""
    bad = ~block.isfinite().all(0)
    if bool(bad.any()):
        index = before + int(bad.nonzero()[0]) + 1
        raise RuntimeError(f"product {index} of the operator is not finite: its values cannot be trusted.")


def _rounding(op: SymmetricOperator, theta: Tensor) -> float:
    """Return a residual norm that rounding alone may leave, from all Ritz values at hand."""
    return 10 * torch.finfo(op.dtype).eps * float(theta.abs().max())


def _start(op: SymmetricOperator, k: int, v0: Tensor | None, generator: torch.Generator) -> Tensor:
    """Check v0 and fill it up to k rows with random ones."""
    if v0 is None:
        return _random(k, op, generator)
    rows = (v0[None] if v0.ndim == 1 else v0).detach()
    if rows.ndim != 2 or rows.shape[1] != op.n or not len(rows):
        raise ValueError(f"v0 must be [{op.n}] or [m, {op.n}], got {list(v0.shape)}.")
    if rows.dtype != op.dtype or rows.device != op.device:
        raise ValueError(f"v0 must be {op.dtype} on {op.device}, got {rows.dtype} on {rows.device}.")
    lengths = torch.linalg.vector_norm(rows, dim=1)
    if not bool((lengths.isfinite() & (lengths > 0)).all()):
        raise ValueError(f"v0's rows must be finite and not zero; their lengths are {lengths.tolist()}.")
    missing = k - len(rows)
    return (rows if missing <= 0 else torch.cat([rows, _random(missing, op, generator)])).contiguous()


def _check(op: SymmetricOperator, k: int, tol: float, max_matvecs: int) -> None:
    if not 1 <= k <= op.n:
        raise ValueError(f"k must lie between 1 and n = {op.n}, got {k}.")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}.")
    if max_matvecs < k:
        raise ValueError(f"max_matvecs must be at least k = {k}, got {max_matvecs}.")


def _reason(done: bool, norms: Tensor, theta: Tensor, tol: float, max_matvecs: int) -> str:
    worst = int((norms / theta.abs().clamp(min=torch.finfo(torch.float64).tiny)).argmax())
    pair = f"residual norm {float(norms[worst]):.1e} at eigenvalue {float(theta[worst]):.4g}"
    if done:
        return f"converged: {pair}; tol was {tol:.1e}."
    return f"stopped at max_matvecs={max_matvecs}, {pair}; tol was {tol:.1e}."
