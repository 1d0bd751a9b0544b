"""Dropout: y = m x with the mask m of the primal sweep, one for all products until the next ``forward``.

The other dropouts (feature, alpha, in place) export as arithmetic with a mask from ``aten.bernoulli``, which
the forward sweep runs once; they need no rule of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rule import LinearInArgs, rule

aten = torch.ops.aten


@rule(aten.native_dropout.default)
class Dropout(LinearInArgs):
    """``y, mask = native_dropout(x)``: linear in x."""

    differentiable = (0,)

    def forward(self, x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
        """Draw the mask; save it with its scale (None: the identity)."""
        y, mask = aten.native_dropout.default(x, p, train)
        self.factor: Tensor | None = None
        # None counts as training, as in torch.
        if train is None or train:
            # At p = 1 nothing is kept, and 1 / (1 - p) would turn zeros into NaN.
            self.factor = mask.to(x.dtype).mul_(0.0 if p == 1 else 1 / (1 - p))
        return y, mask

    def tangent(self, dx: Tensor) -> tuple[Tensor, None]:
        """Return ``m dx``."""
        return (dx if self.factor is None else dx * self.factor), None

    def backward(self, g: tuple[Tensor, None]) -> tuple[Tensor]:
        """Return ``m g``."""
        return (g[0] if self.factor is None else g[0] * self.factor,)
