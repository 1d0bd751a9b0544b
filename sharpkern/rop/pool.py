"""Pooling: maxima remember where they came from; averages are linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .rule import LinearInArgs, fold, rule

aten = torch.ops.aten
_WITH_INDICES = {
    aten.max_pool1d.default: aten.max_pool2d_with_indices.default,
    aten.max_pool2d.default: aten.max_pool2d_with_indices.default,
    aten.max_pool3d.default: aten.max_pool3d_with_indices.default,
    aten.max_pool2d_with_indices.default: aten.max_pool2d_with_indices.default,
    aten.max_pool3d_with_indices.default: aten.max_pool3d_with_indices.default,
    aten.adaptive_max_pool2d.default: aten.adaptive_max_pool2d.default,
    aten.adaptive_max_pool3d.default: aten.adaptive_max_pool3d.default,
}


@rule(*_WITH_INDICES)
class MaxPool(LinearInArgs):
    """Entries of x at the indices of the maxima."""

    differentiable = (0,)

    def forward(self, x: Tensor, *args: Any) -> Any:
        """Save the indices within each channel's pixels."""
        op = _WITH_INDICES[self.op]
        self.many = len(self.op._schema.returns) > 1
        if self.op is aten.max_pool1d.default:
            kernel, stride, padding, dilation, ceil = args
            pairs = [[1, *kernel], [1, *stride] if stride else [], [0, *padding], [1, *dilation]]
            y, index = (t.squeeze(-2) for t in op(x.unsqueeze(-2), *pairs, ceil))
        else:
            y, index = op(x, *args)
        channels = x.ndim - (3 if "3d" in str(op) else 1 if self.op is aten.max_pool1d.default else 2)
        self.shape, self.y_shape, self.channels = x.shape, y.shape, channels
        self.index = index.flatten(channels)
        return (y, index) if self.many else y

    def tangent(self, dx: Tensor) -> Any:
        """Look up."""
        k = dx.shape[0]
        dy = dx.flatten(self.channels + 1).gather(-1, self.index.expand(k, *self.index.shape))
        dy = dy.view(k, *self.y_shape)
        return (dy, None) if self.many else dy

    def backward(self, g: Any) -> tuple[Tensor]:
        """Add up by index."""
        g = g[0] if isinstance(g, tuple) else g
        k = g.shape[0]
        gx = g.new_zeros(k, *self.shape)
        gx.flatten(self.channels + 1).scatter_add_(
            -1, self.index.expand(k, *self.index.shape), g.flatten(self.channels + 1)
        )
        return (gx,)


@rule(
    aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default,
    aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default,
    aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default,
)  # fmt: skip
class AveragePool(LinearInArgs):
    """Averages over windows."""

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """Save the window and an example to differentiate the linear map at."""
        self.args, self.shape = args, x.shape
        y: Tensor = self.op(x, *args)
        self.y_shape = y.shape
        return y

    def tangent(self, dx: Tensor) -> Tensor:
        """Average the tangent, k folded into the batch."""
        y: Tensor = self.op(fold(dx), *self.args)
        return y.reshape(dx.shape[0], *self.y_shape)

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Apply the adjoint: the gradient of <y, g>."""
        with torch.enable_grad():
            x = torch.zeros(g.shape[0], *self.shape, dtype=g.dtype, device=g.device, requires_grad=True)
            gx = torch.autograd.grad(self.op(fold(x), *self.args), x, g.reshape(-1, *self.y_shape[1:]))[0]
        return (gx,)
