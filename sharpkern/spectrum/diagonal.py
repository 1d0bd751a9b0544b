"""The diagonal of a curvature operator, by random signs outside a subspace that is known."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import kernels
from ..eigen.common import SymmetricOperator, check_whole
from .probes import Estimate, blocks, identity, in_blocks, products, seeded, signs, span, without

_FEWEST = 6  # a third of them each: span, its products, and the two probes that a spread needs


def diagonal(op: SymmetricOperator, matvecs: int = 96, generator: torch.Generator | None = None) -> Estimate[Tensor]:
    """Estimate the diagonal, the second derivative of the loss by each parameter.

    As in Hutch++, two thirds of the products find a subspace Q of the large eigenvalues and multiply it, and random
    signs g estimate what is left:

        diag A = diag(Q'QA + AQ'Q - Q'QAQ'Q) + E[g * PAPg],   P = I - Q'Q

    The variance of entry i is that of the other entries of row i: sum over j != i of (PAP)_ij^2, over the number of
    probes. Entries far below their row's norm are known to the standard error only.

    Args:
        op: symmetric operator, such as ``HessianOperator``; may be indefinite.
        matvecs: products to spend, at least 6. With n of them or more the identity is used, and the diagonal exact.
        generator: of the probes, on the CPU; None for seed 0.

    Returns:
        ``[n]`` float64 on the operator's device, in the flat order (``op.unflatten`` cuts it into parameters), with a
        standard error for each entry; given Q, it is unbiased.

    Raises:
        ValueError: matvecs is below 6, or the operator's vectors are sharded over processes.
        RuntimeError: a product is not finite.

    Cost: matvecs products. Memory: matvecs vectors, and three of float64.
    Source: Bekas, Kokiopoulou and Saad, An estimator for the diagonal of a matrix (2007), for the probes; Baston and
    Nakatsukasa, Stochastic diagonal estimation (2022), for the subspace, used here on both sides.
    """
    check_whole(op, "the diagonal")
    if matvecs < _FEWEST:
        raise ValueError(f"matvecs must be at least {_FEWEST}, got {matvecs}.")
    total = torch.zeros(op.n, dtype=torch.float64, device=op.device)
    if op.n <= matvecs:
        # The identity costs no more than the probes and leaves nothing to chance.
        for start, rows in identity(op):
            total[start : start + len(rows)] = products(op, rows)[:, start : start + len(rows)].diagonal()
        return Estimate(total, torch.zeros_like(total), op.n, True, f"exact: all {op.n} unit vectors")
    generator = seeded(generator)
    third = matvecs // 3
    Q = span(in_blocks(products, op, signs(third, op, generator)))
    probes = matvecs - third - len(Q)
    squares = torch.zeros_like(total)
    for done, g, y in _probed(op, Q, probes, generator):
        # Welford's update: a difference of large sums would lose a spread that is small beside the mean.
        sample = g.double() * y
        step = sample - total
        total.add_(step, alpha=1 / done)
        squares.addcmul_(step, sample.sub_(total))
    error = (squares / (probes - 1) / probes).sqrt_()
    _add_captured(op, Q, total)
    return Estimate(total, error, matvecs, False, f"subspace of {len(Q)} vectors and {probes} probes")


def _probed(
    op: SymmetricOperator, Q: Tensor, probes: int, generator: torch.Generator
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield number, signs g and ``PAPg`` of each probe."""
    done = 0
    for k in blocks(probes):
        G = signs(k, op, generator)
        for g, y in zip(G, without(products(op, without(G, Q)), Q), strict=True):
            done += 1
            yield done, g, y


def _add_captured(op: SymmetricOperator, Q: Tensor, total: Tensor) -> None:
    """Add ``diag(Q'QA + AQ'Q - Q'QAQ'Q)``, the part that needs no probe."""
    if not len(Q):
        return
    W = in_blocks(products, op, Q)
    inner = kernels.combine(kernels.gram(W, Q), Q)
    # Row by row: a float64 copy of the blocks would double the memory.
    for q, w, t in zip(Q, W, inner, strict=True):
        total.addcmul_(q.double(), w.double().mul_(2).sub_(t))
