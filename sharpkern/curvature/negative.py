"""Minus an operator: the curvature of what an optimizer with ``maximize=True`` descends."""

from __future__ import annotations

from torch import Tensor

from .base import ParameterOperator


class NegativeOperator(ParameterOperator):
    """``-A``; its largest eigenvalue is minus the smallest of A.

    Args:
        operator: A.
    """

    def __init__(self, operator: ParameterOperator) -> None:
        self.operator, self.params = operator, operator.params
        self.n, self.dtype, self.device = operator.n, operator.dtype, operator.device
        self.space = operator.space

    def apply_rows(self, block: Tensor) -> Tensor:
        return -self.operator.apply_rows(block)

    def form_rows(self, block: Tensor) -> Tensor:
        return -self.operator.form_rows(block)
