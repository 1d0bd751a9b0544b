"""Batched power iteration, shifted so that the algebraically largest eigenvalue wins."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .. import kernels
from ..kernels.cholesky_qr import cholesky_qr
from .common import (
    OF_PRODUCTS,
    EigenResult,
    SymmetricOperator,
    check_arguments,
    check_finite,
    dimension,
    gram,
    multiply,
    norms_of,
    random_rows,
    rounding_level,
    space_of,
    start_rows,
    unit_rows,
)
from .stopping import converged, reason_of

_SMALL, _LARGE = 1e-30, 1e30  # sizes between which no square of either dtype is lost


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
        v0: ``[n]`` or ``[m, n]``, m <= k, of any length, filled up to k with random vectors. Where they have converged
            as they are, a random one is looked at besides; where they are eigenvectors to rounding, they are stirred.
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
    check_arguments(op, k, tol, max_matvecs)
    generator = generator or torch.Generator().manual_seed(0)
    start = start_rows(op, k, v0, generator)
    if len(start) > k:
        raise ValueError(f"v0 must have at most k = {k} rows, got {len(start)}: lanczos takes any number.")
    V = _orthonormal_block(unit_rows(op, start) if v0 is not None else start, op, generator)
    lowest = shift = largest = 0.0
    matvecs = 0
    before = None
    while True:
        products = multiply(op, V)
        T = gram(op, V, products).cpu()
        check_finite(T, matvecs, products)
        matvecs += k
        # Ritz vectors of the block instead of the block: else the k vectors stay a mixture of the k eigenvectors.
        if k > 1:
            rotation = torch.linalg.eigh((T + T.t()) / 2)[1].flip(1).t().contiguous().to(V.device)
            V, products = kernels.combine(rotation, V), kernels.combine(rotation, products)
        theta, norms, following = _power_step(op, V, products)
        largest = max(largest, float(torch.hypot(theta, norms).max()))
        lowest = min(lowest, float(theta.min()), _lower_end(op, V, products, before))
        before = V, products
        needed = -lowest * (1.05 if float(theta.min()) <= 0 else 0.55)
        # A shift within 10% of what is needed is left as it is: each growth stirs the block, and progress is lost.
        settled = shift >= 0.9 * needed or k == dimension(op)
        rounding = rounding_level(op, largest)
        done = settled and converged(norms, theta, tol, rounding)
        blind = False
        if done and v0 is not None and matvecs == k < min(dimension(op), max_matvecs):
            # A start that is an eigenvector tells nothing of the others, nor how large the operator's rounding is.
            largest = max(largest, float(norms_of(op, multiply(op, _random_unit(op, generator)))[0]))
            matvecs += 1
            rounding = rounding_level(op, largest)
            blind = float(norms.min()) <= rounding
        if (done and not blind) or matvecs + k > max_matvecs:
            break
        shift = needed
        if not settled or blind:
            V = _orthonormal_block(V + 0.1 * random_rows(k, op, generator) / dimension(op) ** 0.5, op, generator)
        elif k == 1 and shift == 0:
            V = following  # power_step has normalised it in the same pass
        else:
            if (factor := _near_one(largest, op.dtype)) != 1:
                products = products * factor
            V = _orthonormal_block(torch.add(products, V, alpha=shift * factor), op, generator)
    order = theta.argsort(descending=True)
    theta, norms, V = theta[order], norms[order], V[order.to(V.device)]
    reason = reason_of(done, norms, theta, tol, max_matvecs)
    bounds = norms + OF_PRODUCTS * rounding
    return EigenResult(theta, V, norms, bounds, bounds, matvecs, done, reason)


def _power_step(op: SymmetricOperator, V: Tensor, products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Rayleigh quotients and residual norms on the CPU, and normalised products, see ``kernels.power_step``."""
    if space_of(op) is None:
        theta, norms, following = kernels.power_step(V, products)
        theta, norms = theta.cpu(), norms.cpu()
        sizes = torch.hypot(theta, norms)
        if bool(((sizes > _SMALL) & (sizes < _LARGE)).all()):  # else a square may have under- or overflowed
            return theta, norms, following
    theta = gram(op, V, products).diagonal()
    norms = norms_of(op, torch.addcmul(products, V, theta[:, None].to(V.dtype), value=-1))
    return theta.cpu(), norms.cpu(), unit_rows(op, products)


def _random_unit(op: SymmetricOperator, generator: torch.Generator) -> Tensor:
    return unit_rows(op, random_rows(1, op, generator))


def _near_one(size: float, dtype: torch.dtype) -> float:
    """Return the power of two that brings numbers near 1 whose squares may under- or overflow; 1 for others."""
    if _SMALL < size < _LARGE:
        return 1.0
    most = 1000 if dtype == torch.float64 else 120
    return 2.0 ** min(max(-math.frexp(size)[1], -most), most)


def _lower_end(op: SymmetricOperator, V: Tensor, products: Tensor, before: tuple[Tensor, Tensor] | None) -> float:
    """Return the lowest Ritz value of this block and the one before it; 0 without one."""
    if before is None:
        return 0.0
    S, P = torch.cat([V, before[0]]), torch.cat([products, before[1]])
    length, B = torch.linalg.eigh(gram(op, S, S).cpu())
    # A negative component changes its sign from block to block, so it is never among the directions dropped
    # here, whose Ritz values would be rounding.
    B = (B / length.clamp(min=1e-3).sqrt())[:, length > 1e-3]
    T = B.t() @ gram(op, S, P).cpu() @ B
    return float(torch.linalg.eigvalsh((T + T.t()) / 2)[0])


def _orthonormal_block(V: Tensor, op: SymmetricOperator, generator: torch.Generator) -> Tensor:
    """Orthonormalise k rows; a block that has lost its rank is stirred first."""
    try:
        return _orthonormalised(V, op)
    except kernels.RankError:
        # unit rows, so that the random ones weigh the same in each; a zero row becomes random
        return _orthonormalised(unit_rows(op, V) + random_rows(len(V), op, generator) / dimension(op) ** 0.5, op)


def _orthonormalised(V: Tensor, op: SymmetricOperator) -> Tensor:
    """See ``kernels.orthonormalise``."""
    if space_of(op) is None:
        return kernels.orthonormalise(V)
    return cholesky_qr(V, functools.partial(gram, op), kernels.combine)
