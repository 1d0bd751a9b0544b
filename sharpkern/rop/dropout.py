"""Dropout: the primal's mask serves every product of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .rule import LinearInArgs, rule

aten = torch.ops.aten


@rule(aten.native_dropout.default, aten.dropout.default)
class Dropout(LinearInArgs):
    """``y = x mask / (1 - p)``."""

    differentiable = (0,)

    def forward(self, x: Tensor, p: float, train: bool | None = True) -> Any:
        """Draw the mask as torch does."""
        y, mask = aten.native_dropout.default(x, p, train)
        active = train is None or train
        self.scale = mask.to(x.dtype) * (1 / (1 - p) if p < 1 else 0.0) if active else None
        return (y, mask) if self.op is aten.native_dropout.default else y

    def _times(self, d: Tensor) -> Tensor:
        return d if self.scale is None else d * self.scale

    def tangent(self, dx: Tensor) -> Any:
        """Mask the tangent."""
        y = self._times(dx)
        return (y, None) if self.op is aten.native_dropout.default else y

    def backward(self, g: Any) -> tuple[Tensor]:
        """Mask the cotangent."""
        return (self._times(g[0] if isinstance(g, tuple) else g),)
