"""LOBPCG without a preconditioner."""

from __future__ import annotations

import torch
from torch import Tensor

from .basis import Basis
from .common import EigenResult, SymmetricOperator, check_arguments, dimension, random_rows, start_rows
from .stopping import converged, reason_of


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
        v0: ``[n]`` or ``[m, n]``, m <= k, of any length, filled up to k with random vectors. Where they have converged
            as they are, k random ones are looked at besides.
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
    check_arguments(op, k, tol, max_matvecs)
    if 3 * k > (n := dimension(op)):
        raise ValueError(f"lobpcg needs 3k <= n = {n}, got k = {k}: use lanczos.")
    generator = generator or torch.Generator().manual_seed(0)
    start = start_rows(op, k, v0, generator)
    if len(start) > k:
        raise ValueError(f"v0 must have at most k = {k} rows, got {len(start)}: lanczos takes any number.")
    basis = Basis(op, 3 * k, generator)
    basis.extend(start)
    while True:
        theta, Y = basis.ritz()
        residuals, norms = basis.residuals(theta[:k], Y[:, :k])
        done = converged(norms, theta[:k], tol, basis.rounding())
        # A start that is an eigenvector tells nothing of the others, nor how large the operator's rounding is.
        blind = done and v0 is not None and basis.size == k
        if (done and not blind) or basis.matvecs + k > max_matvecs:
            break
        # X is a combination of the old X and of what was added to it: without the rows of the old X, the second part
        # remains. Orthogonalised against X it is the conjugate direction, which saves the products of a full Krylov
        # basis. The first iteration has added nothing yet.
        added = Y[:, :k].clone()
        added[:k] = 0  # rows of the old X
        kept = torch.linalg.qr(torch.cat([Y[:, :k], added], 1))[0] if basis.size > k else Y[:, :k]
        basis.restart(kept)
        basis.extend(random_rows(k, op, generator) if blind else residuals)
    reason = reason_of(done, norms, theta[:k], tol, max_matvecs)
    return basis.result(theta, Y, list(range(k)), norms, done=done, reason=reason)
