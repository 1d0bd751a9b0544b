"""A probabilistic upper bound of the largest eigenvalue, from an independent random start."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .basis import Basis
from .common import OF_PRODUCTS, SymmetricOperator, dimension, random_rows


@dataclass(frozen=True)
class Certificate:
    """What a cold Lanczos run says about the whole spectrum.

    Attributes:
        value: largest Ritz value.
        vector: ``[n]``, its unit Ritz vector.
        upper: with probability at least ``1 - failure`` over the random start, the largest eigenvalue is at most
            this. Infinite where ``matvecs`` are too few for n to say anything.
        failure: that probability.
        matvecs: products spent.
    """

    value: float
    vector: Tensor
    upper: float
    failure: float
    matvecs: int


def certify(
    op: SymmetricOperator, matvecs: int = 40, failure: float = 0.01, generator: torch.Generator | None = None
) -> Certificate:
    """Bound the largest eigenvalue from above, with a stated probability of failure.

    After m Lanczos steps from a start drawn uniformly from the sphere, independently of the operator,

        P[lambda_1 - theta_1 > eps (lambda_1 - lambda_n)] <= 1.648 sqrt(n) exp(-sqrt(eps) (2m - 1))

    and likewise at the lower end. With half of ``failure`` for each end, the width of the spectrum is at most
    (theta_1 - theta_m) / (1 - 2 eps). Converged Ritz values are far closer than the bound, which knows no gaps.

    Args:
        op: symmetric operator; of rounding, a hundred units of the largest product seen are covered.
        matvecs: products to spend, m.
        failure: accepted probability that the bound is false.
        generator: of the start; must not have had a part in choosing the operator. None for a fresh seed.

    Raises:
        ValueError: matvecs below 2, or failure not within (0, 1).
        RuntimeError: a product is not finite.

    Memory: 2m vectors.
    Source: Kuczynski and Wozniakowski, Estimating the largest eigenvalue by the power and Lanczos algorithms
    with a random start (1992), theorem 4.2.
    """
    if matvecs < 2 or not 0 < failure < 1:
        raise ValueError(f"need at least 2 matvecs and failure within (0, 1), got {matvecs} and {failure}.")
    # A fresh seed and not 0: the probability is over the start, which must not be the same at every call.
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    n = dimension(op)
    steps = min(matvecs, n)
    basis = Basis(op, steps, generator)
    basis.extend(random_rows(1, op, generator))
    while True:
        theta, Y = basis.ritz()
        if basis.size == steps:
            break
        # The residual of the top pair has the direction of the next Krylov vector, so this is Lanczos.
        basis.extend(basis.residuals(theta[:1], Y[:, :1])[0])
    # A Krylov space of the whole dimension holds every eigenvector: theta_1 is then the eigenvalue itself.
    eps = 0.0 if steps == n else (math.log(1.648 * math.sqrt(n) / (failure / 2)) / (2 * steps - 1)) ** 2
    # eps is relative to the width of the spectrum, of which only the Ritz values' is known. Both ends may be off by
    # eps of the width, so the width is at most theirs over 1 - 2 eps; from eps = 1/2 on this says nothing.
    width = float(theta[0] - theta[-1])
    upper = float(theta[0]) + eps * width / (1 - 2 * eps) + OF_PRODUCTS * basis.rounding() if eps < 0.5 else math.inf
    return Certificate(float(theta[0]), basis.combination(Y[:, :1])[0], upper, failure, basis.matvecs)
