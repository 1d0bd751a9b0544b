"""Neurons that have just become active under an adaptive optimizer: where the top eigenvector may be for one step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..curvature.preconditioned import PreconditionedOperator
from ..eigen.common import space_of

_FALLEN = 1.5  # factor by which P^-1/2 of a weight falls within a step when its neuron becomes active
_LEAST = 8  # weights: a neuron has more, and a few that fall by themselves are not worth a product


class PopUps:
    """Watches P^-1/2 for weights where it collapses, and points at what they may have brought up.

    A ReLU neuron that was silent has second moments near zero, so P of its weights is tiny. In the step in which it
    becomes active it can own the top eigenvector of P^-1/2 H P^-1/2, by factors of the value, and be gone at the next.
    That vector is orthogonal to all that a warm solver knows. But the weights are known, and their gradient is not
    zero any more. For one neuron and one example, the top eigenvector is P^-1/2 times the gradient of these weights.
    Of several neurons, the one with the smallest P owns it, which asks for another factor P^-1/2. The vector P^-1 g of
    these weights has cosines of 0.5 to 0.9 with it for one neuron, and of 0.1 to 0.5 in networks of 1e5 weights.

    Attributes:
        inv_sqrt: P^-1/2 ``[n]`` of the last look; None before the first.
    """

    def __init__(self) -> None:
        self.inv_sqrt: Tensor | None = None

    def look(self, operator: PreconditionedOperator, gradient: Tensor) -> Tensor | None:
        """Compare with the last look.

        Args:
            operator: of this step.
            gradient: ``[n]`` of the loss, this process's part of it where vectors are sharded.

        Returns:
            A vector to multiply besides, ``[1, n]``, in the operator's coordinates; None where there is nothing.

        Cost: moves about 5n numbers; 9n where something has fallen.
        """
        now, before = operator.inv_sqrt, self.inv_sqrt
        self.inv_sqrt = now
        if before is None or before.shape != now.shape:
            return None
        fallen = (before > _FALLEN * now) & (gradient != 0)
        count = fallen.sum(dtype=torch.float64)
        # All processes must add the vector, or none: a product needs all of them.
        space = space_of(operator)
        if float(count if space is None else space.total(count)) < _LEAST:
            return None
        # No scaling to length one: each process would divide its part by its own length. The basis normalises.
        return torch.where(fallen, now * (now * gradient.to(now)), 0.0)[None]
