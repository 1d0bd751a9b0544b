"""Cholesky QR from a backend's Gram matrix and block combination: as good as Householder's, at the speed of memory.

Sources: Yamamoto et al., Roundoff error analysis of the CholeskyQR2 algorithm (2015); Fukaya et al., Shifted Cholesky
QR for computing the QR factorization of ill-conditioned matrices (2020).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .reference import rank_of
from .saved import RankError

_PASSES = 8  # two for most blocks, four for rows at the edge of dependence
_NEAR = 0.1  # deviation from the identity below which one pass ends at rounding


def cholesky_qr(V: Tensor, gram: Callable[..., Tensor], combine: Callable[..., Tensor]) -> Tensor:
    """Return the Gram-Schmidt basis of the rows of ``[k, n]``; see ``kernels.orthonormalise``.

    Each pass multiplies the rows with the inverse of a Cholesky factor of their Gram matrix. Where rounding leaves that
    matrix without a factor, a shift of the size of the rounding gives it one, and the next pass starts from rows that
    are much closer to orthonormal. The product of the factors tells the rank in the end.
    """
    k = V.shape[0]
    eps = torch.finfo(torch.float64).eps
    # k by k numbers in float64: the factorisation is done by LAPACK on the CPU, for GPUs too.
    G = gram(V, V).cpu()
    length = G.diagonal().sqrt()
    if not bool(G.isfinite().all()):
        raise ValueError("V holds numbers that are NaN, infinite, or too large to be squared.")
    if not bool((length > 0).all()):
        raise RankError(int((length > 0).sum()), k)
    # unit rows first: their lengths are no measure of dependence
    G = G / torch.outer(length, length)
    factor, inverse_length = torch.eye(k, dtype=torch.float64), 1 / length
    for index in range(_PASSES):
        # Of the rows that this pass starts from. Its result is off by the condition number of G times rounding, so from
        # nearly orthonormal rows on no further pass is needed.
        deviation = float((G - torch.eye(k, dtype=torch.float64)).abs().max())
        L, failed = torch.linalg.cholesky_ex(G)
        # Above the error of G, about k eps for unit rows, and far below what matters to the next pass.
        shift = 100 * k * eps
        while int(failed):
            L, failed = torch.linalg.cholesky_ex(G + shift * torch.eye(k, dtype=torch.float64))
            shift *= 10
        inverse = torch.linalg.solve_triangular(L, torch.eye(k, dtype=torch.float64), upper=False)
        if index == 0:
            # The lengths of the rows go into the combination, and cost no pass over V.
            inverse *= inverse_length
        V = combine(inverse.contiguous().to(V.device), V)
        # V = L1 L2 ... Q, up to the lengths: the factor of Gram-Schmidt, and its singular values those of the unit
        # rows.
        factor = factor @ L
        if deviation <= _NEAR:
            break
        G = gram(V, V).cpu()
    rank = rank_of(factor, V.dtype)
    if rank < k:
        raise RankError(rank, k)
    return V
