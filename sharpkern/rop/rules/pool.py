"""Pooling: maxima pick one entry of each window, averages are linear; k is folded into the batch.

Maxima:    y = x[index]    dy = dx[index]    gx = sum of g at index    d(gx) = sum of dg at index
Averages:  y = A x         dy = A dx         gx = A' g                 d(gx) = A' dg

On a CPU, for one vector, the native backward of a maximum takes two to six times as long as ``index_add_`` with
indices into the whole tensor, and ``gather`` about ten times as long as ``index_select``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..rule import LinearInArgs, fold, rule

aten = torch.ops.aten


class _Max(LinearInArgs):
    """``y = x[index]``; a subclass says which native op finds the index."""

    differentiable = (0,)

    def _save(self, x: Tensor, index: Tensor, rank: int) -> None:
        """Turn indices into each plane of x into indices into the whole of x."""
        # torch counts within each plane; the sweeps index the whole tensor at once, see above.
        size = math.prod(x.shape[-rank:])
        self.x_shape, self.y_shape = x.shape, index.shape
        start = torch.arange(0, x.numel(), size, device=x.device)
        self.index = (index.flatten(-rank) + start.view(*x.shape[:-rank], 1)).flatten()

    def tangent(self, dx: Tensor) -> Any:
        """Return ``dx[index]``."""
        # One index vector for all k: they share the choice that the primal made.
        dy = dx.flatten(1).index_select(1, self.index).view(-1, *self.y_shape)
        return (dy, None) if self._many() else dy

    def backward(self, g: Any) -> tuple[Tensor]:
        """Return zeros with g added at the indices."""
        g = g[0] if self._many() else g
        # Added and not assigned: windows overlap, and one entry may be the maximum of several.
        gx = g.new_zeros(g.shape[0], math.prod(self.x_shape)).index_add_(1, self.index, g.flatten(1))
        return (gx.view(-1, *self.x_shape),)

    def _many(self) -> bool:
        return len(self.op._schema.returns) > 1


class _MaxPool(_Max):
    rank: int

    def forward(
        self,
        x: Tensor,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        ceil_mode: bool,
    ) -> Any:
        """Pool, in one dimension as in two; save the indices."""
        if self.rank == 1:
            # As torch does it: two dimensions, one of size 1. An empty stride means the kernel's size, and stays empty.
            k, s, d = ([1, *v] if v else [] for v in (kernel, stride, dilation))
            native = aten.max_pool2d_with_indices.default
            y, index = native(x.unsqueeze(-2), k, s, [0, *padding], d, ceil_mode)
            y, index = y.squeeze(-2), index.squeeze(-2)
        else:
            packet = aten.max_pool2d_with_indices if self.rank == 2 else aten.max_pool3d_with_indices
            y, index = packet.default(x, kernel, stride, padding, dilation, ceil_mode)
        self._save(x, index, self.rank)
        return (y, index) if self._many() else y


@rule(aten.max_pool1d.default, aten.max_pool1d_with_indices.default)
class MaxPool1d(_MaxPool):
    """The maximum of each window."""

    rank = 1


@rule(aten.max_pool2d.default, aten.max_pool2d_with_indices.default)
class MaxPool2d(_MaxPool):
    """The maximum of each window."""

    rank = 2


@rule(aten.max_pool3d.default, aten.max_pool3d_with_indices.default)
class MaxPool3d(_MaxPool):
    """The maximum of each window."""

    rank = 3


@rule(aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default)
class AdaptiveMaxPool(_Max):
    """The maximum of each of a fixed number of windows."""

    def forward(self, x: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Pool; save the indices."""
        y, index = self.op(x, size)
        self._save(x, index, len(size))
        return y, index


class _Average(LinearInArgs):
    """``y = A x``; a subclass gives ``_pool`` (A) and ``_spread`` (A') on one batch."""

    rank: int

    def _pool(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _spread(self, g: Tensor, shape: tuple[int, ...]) -> Tensor:
        raise NotImplementedError

    def _run(self, x: Tensor) -> Tensor:
        self.shape = x.shape
        # The native kernels have one batch dimension, so that k is folded into the batch.
        self.batched = x.ndim > self.rank + 1  # else k is the batch
        return self._pool(x)

    def tangent(self, dx: Tensor) -> Tensor:
        """Return ``A dx``."""
        if not self.batched:
            return self._pool(dx)
        return self._pool(fold(dx)).unflatten(0, (dx.shape[0], -1))

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Return ``A' g``."""
        k = g.shape[0]
        if not self.batched:
            return (self._spread(g, (k, *self.shape)),)
        gx = self._spread(fold(g), (k * self.shape[0], *self.shape[1:]))
        return (gx.unflatten(0, (k, -1)),)


@rule(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
class AvgPool(_Average):
    """The mean of each window."""

    def forward(self, x: Tensor, kernel: Sequence[int], stride: Sequence[int], *options: Any) -> Tensor:
        """Save the options, in one dimension as in two."""
        padding, *rest = options
        self.rank = int(self.op._schema.name[-2])  # avg_pool2d
        stride = stride or kernel
        self.options: list[Any] = [kernel, stride, padding, *rest]
        if self.rank == 1:
            # Only the 2-d op has a backward. Its last option is a divisor, which the 1-d one lacks.
            self.options = [[1, *kernel], [1, *stride], [0, *padding], *rest, None]
        return self._run(x)

    def _pool(self, x: Tensor) -> Tensor:
        if self.rank == 1:
            y: Tensor = aten.avg_pool2d.default(x.unsqueeze(-2), *self.options).squeeze(-2)
        else:
            y = self.op(x, *self.options)
        return y

    def _spread(self, g: Tensor, shape: tuple[int, ...]) -> Tensor:
        # The adjoint itself; of its second argument only the shape matters.
        native = (aten.avg_pool3d_backward if self.rank == 3 else aten.avg_pool2d_backward).default
        if self.rank == 1:
            shape = (*shape[:-1], 1, shape[-1])
            return _tensor(native(g.unsqueeze(-2), g.new_empty(shape), *self.options).squeeze(-2))
        return _tensor(native(g, g.new_empty(shape), *self.options))


@rule(
    aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default,
    aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default,
)  # fmt: skip
class AdaptiveAvgPool(_Average):
    """The mean of each of a fixed number of windows; of the whole plane for size 1."""

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Save how many windows there are along each dimension."""
        self.size, self.rank = size, len(size)
        self.plane = tuple(range(-self.rank, 0))
        return self._run(x)

    def _pool(self, x: Tensor) -> Tensor:
        if all(n == 1 for n in self.size):
            # The usual end of a network. Its adjoint is then an expanded view, and no pass over the plane.
            return x.mean(self.plane, keepdim=True)
        return _tensor(self.op(x, self.size))

    def _spread(self, g: Tensor, shape: tuple[int, ...]) -> Tensor:
        if all(n == 1 for n in self.size):
            return (g / math.prod(shape[-self.rank :])).expand(shape)
        if self.rank == 3:
            return _tensor(aten._adaptive_avg_pool3d_backward.default(g, g.new_empty(shape)))
        if self.rank == 2:
            return _tensor(aten._adaptive_avg_pool2d_backward.default(g, g.new_empty(shape)))
        shape = (*shape[:-1], 1, shape[-1])
        gx = aten._adaptive_avg_pool2d_backward.default(g.unsqueeze(-2), g.new_empty(shape))
        return _tensor(gx.squeeze(-2))


def _tensor(result: Any) -> Tensor:
    value: Tensor = result
    return value
