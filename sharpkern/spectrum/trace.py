"""The trace of a curvature operator, by Hutch++."""

from __future__ import annotations

import torch

from ..eigen.common import SymmetricOperator, check_whole
from .probes import Estimate, blocks, forms, identity, in_blocks, products, seeded, signs, span, spread, without

_FEWEST = 6  # a third of them each: span, captured part, and the two probes that a spread needs


def trace(op: SymmetricOperator, matvecs: int = 96, generator: torch.Generator | None = None) -> Estimate[float]:
    """Estimate the trace, the sum of all eigenvalues.

    A third of the products finds a subspace Q that holds the large eigenvalues, whose part of the trace is computed;
    the rest of the trace is estimated by random signs g:

        tr A = tr Q A Q' + E[g' P A P g],   P = I - Q'Q

    The rest needs quadratic forms only, which cost half a product where the operator has them.

    Args:
        op: symmetric operator, such as ``HessianOperator``; may be indefinite.
        matvecs: vectors to apply it to, at least 6. With n of them or more the identity is used, and the trace exact.
        generator: of the probes, on the CPU; None for seed 0.

    Returns:
        The trace, in the units of A, with the standard error over the probes; given Q, it is unbiased.

    Raises:
        ValueError: matvecs is below 6, or the operator's vectors are sharded over processes.
        RuntimeError: a product is not finite.

    Cost: matvecs / 3 products and 2/3 matvecs quadratic forms. Memory: 2/3 matvecs vectors.
    Source: Meyer, Musco, Musco and Woodruff, Hutch++: optimal stochastic trace estimation (2021), algorithm 1.

    >>> class Diagonal:
    ...     n, dtype, device = 3, torch.float64, torch.device("cpu")
    ...
    ...     def matmat(self, V):
    ...         return torch.tensor([[-9.0], [1.0], [2.0]]).double() * V
    >>> trace(Diagonal()).value
    -6.0
    """
    check_whole(op, "the trace")
    if matvecs < _FEWEST:
        raise ValueError(f"matvecs must be at least {_FEWEST}, got {matvecs}.")
    if op.n <= matvecs:
        value = sum(float(forms(op, rows).sum()) for _, rows in identity(op))
        return Estimate(value, 0.0, op.n, True, f"exact: all {op.n} unit vectors")
    generator = seeded(generator)
    third = matvecs // 3
    Q = span(in_blocks(products, op, signs(third, op, generator)))
    captured = float(in_blocks(forms, op, Q).sum())
    # An operator of low rank leaves vectors of Q's third over: they go to the probes.
    probes = matvecs - third - len(Q)
    samples = torch.cat([forms(op, without(signs(k, op, generator), Q)) for k in blocks(probes)])
    rest, error = spread(samples)
    return Estimate(captured + rest, error, matvecs, False, f"Hutch++: {len(Q)} vectors and {probes} probes")
