"""The symmetric form of P^-1 A, for a diagonal P."""

from __future__ import annotations

from torch import Tensor

from .. import kernels
from ..optimizers.preconditioner import Preconditioner
from .base import BaseOperator, ParameterOperator


class PreconditionedOperator(BaseOperator):
    """``P^-1/2 A P^-1/2``: symmetric, with the eigenvalues of ``P^-1 A``.

    Args:
        operator: A, an operator with ``params`` (``HessianOperator``, ``GGNOperator``, ``DatasetHessian``).
        preconditioner: P, from ``sharpkern.preconditioner``; taken as it is now.

    Raises:
        ValueError: a parameter of A is not one of P's.

    Cost: two diagonal scalings more than A.
    Source: Cohen et al., Adaptive gradient methods at the edge of stability (2022).
    """

    def __init__(self, operator: ParameterOperator, preconditioner: Preconditioner) -> None:
        self.operator = operator
        self.preconditioner = preconditioner
        self.n, self.dtype, self.device = operator.n, operator.dtype, operator.device
        self.space = operator.space
        self.inv_sqrt = preconditioner.inv_sqrt(list(operator.params.values())).to(self.dtype)

    def apply_rows(self, block: Tensor) -> Tensor:
        scaled = self.operator.apply_rows(kernels.scale(block, self.inv_sqrt))
        return kernels.scale(scaled, self.inv_sqrt)

    def form_rows(self, block: Tensor) -> Tensor:
        return self.operator.form_rows(kernels.scale(block, self.inv_sqrt))
