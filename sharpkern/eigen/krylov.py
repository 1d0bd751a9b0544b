"""Lanczos with full reorthogonalisation and thick restarts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .basis import Basis
from .common import OF_PRODUCTS, EigenResult, SymmetricOperator, check_arguments, dimension, random_rows, start_rows
from .stopping import allowed_norms, converged, reason_of

Which = Literal["largest", "smallest", "both"]
_COLD = 0.1  # of tol, from a random start: see tol in the docstring


def lanczos(
    op: SymmetricOperator,
    k: int = 1,
    tol: float = 1e-3,
    v0: Tensor | None = None,
    max_matvecs: int = 200,
    generator: torch.Generator | None = None,
    *,
    which: Which = "largest",
    max_basis: int | None = None,
) -> EigenResult:
    """Find extreme algebraic eigenvalues by Lanczos with full reorthogonalisation and thick restarts.

    Rayleigh-Ritz over all vectors multiplied so far, expanded by the residual of the wanted pair that is
    furthest from ``tol``: from one start vector this is Lanczos. The products are kept, so the residuals are
    exact and a restart costs none. A residual without a new direction (an invariant subspace) is replaced by
    a random vector.

    Args:
        op: symmetric operator.
        k: how many eigenvalues, of each end. The start holds at least k vectors, so that a multiple eigenvalue
            is seen.
        tol: relative residual norm at which a result has converged. Without v0 the solve goes on to a tenth of
            it: a random start stops more easily on a lower eigenvalue of a cluster (with a gap of 3%: 12% of
            starts at a residual of 1e-2, 0.5% at 1e-3, none of 200 at 1e-4, and each step costs 1 to 3 products).
        v0: ``[n]`` or ``[m, n]``, of any length; all m are multiplied before anything else, and random ones
            are added up to k. Where they have converged as they are,
            a random vector is looked at besides. None for random
            vectors.
        max_matvecs: the most products to spend; at least k and m.
        generator: of random vectors, on the CPU; None for seed 0.
        which: "largest", "smallest", or "both": 2k eigenvalues, descending, of one basis.
        max_basis: the most vectors to keep before a restart; default max(2k + 20, 40), at least k + 2 (4k for 2k
            with "both").
            Memory: twice that many vectors and two more, and the operator's product.

    Returns:
        An ``EigenResult``; ``converged`` is False when ``max_matvecs`` ran out.

    Raises:
        ValueError: k, tol, max_matvecs, max_basis, which or v0 do not fit the operator.
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
    check_arguments(op, k, tol, max_matvecs)
    n, ends = dimension(op), 2 if which == "both" else 1
    if which not in ("largest", "smallest", "both") or ends * k > n:
        raise ValueError(f"which must be 'largest', 'smallest' or 'both' (2k <= n = {n}), got {which!r}, k = {k}.")
    # Twice the wanted and some room: a restart keeps half, and a short basis converges slowly.
    limit = max(2 * ends * k + 20, 40) if max_basis is None else max_basis
    if limit < ends * k + 2:
        raise ValueError(f"max_basis must be at least {ends * k + 2}, got {limit}.")
    generator = generator or torch.Generator().manual_seed(0)
    start = start_rows(op, ends * k, v0, generator)
    if len(start) > min(max_matvecs, n):
        raise ValueError(f"v0 must have at most max_matvecs = {max_matvecs} and n = {n} rows, got {len(start)}.")
    basis = Basis(op, min(max(limit, len(start) + 1), n), generator)
    # From several rows this is no block Lanczos: they are multiplied at once, and then one residual at a time.
    basis.extend(start)
    del start  # a vector less in memory
    goal = tol if v0 is not None else _COLD * tol
    while True:
        theta, Y = basis.ritz()
        wanted = _wanted(which, k, basis.size)
        complete = basis.size == n
        residuals, norms = basis.residuals(theta[wanted], Y[:, wanted])
        rounding = basis.rounding() * (OF_PRODUCTS if complete else 1.0)
        reached = converged(norms, theta[wanted], goal, rounding)
        # A start that is an eigenvector tells nothing of the others, nor how large the operator's rounding is.
        blind = reached and v0 is not None and basis.size == ends * k
        if (reached and not blind) or complete or basis.matvecs >= max_matvecs:
            break
        if basis.size == basis.limit:
            basis.restart(Y[:, _wanted(which, max(k + 1, basis.limit // (2 * ends)), basis.size)])
        # A residual beside its own limit: with both ends wanted, the eigenvalues may differ much in size.
        worst = int((norms / allowed_norms(theta[wanted], goal, rounding)).argmax())
        basis.extend(random_rows(1, op, generator) if blind else residuals[worst : worst + 1])
    done = converged(norms, theta[wanted], tol, rounding)
    # A whole space has exact eigenvectors: a residual that is left is the operator's fault, not the budget's.
    if complete and not done:
        reason = (
            f"stopped with a basis of the whole space, yet a residual norm of {float(norms.max()):.1e}: the "
            f"operator is not symmetric, or its products differ from call to call."
        )
    else:
        reason = reason_of(done, norms, theta[wanted], tol, max_matvecs)
    return basis.result(theta, Y, wanted, norms, done=done, reason=reason)


def _wanted(which: Which, k: int, size: int) -> list[int]:
    """Return places in a descending list."""
    first = range(min(k, size)) if which != "smallest" else ()
    last = range(max(size - k, 0), size) if which != "largest" else ()
    return sorted({*first, *last})
