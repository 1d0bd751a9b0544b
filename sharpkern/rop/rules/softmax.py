"""Softmax and log-softmax along one dimension.

p = softmax(x):      dp = p (dx - <p, dx>)       gx = p (g - <p, g>)          J symmetric
    d(gx) = dp (g - <p, g>) + p (dg - <dp, g> - <p, dg>)
l = log softmax(x):  dl = dx - <p, dx>           gx = g - p sum g
    d(gx) = dg - p sum dg - dp sum g
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.softmax import softmax_backward_tangent, softmax_jacobian
from ..rule import Rule, rule

aten = torch.ops.aten


@rule(aten.softmax.int, aten._softmax.default)
class Softmax(Rule):
    """``y = softmax(x)``, as rows of probabilities."""

    freed_after_reverse = ("dp",)

    def forward(self, x: Tensor, dim: int, *rest: Any) -> Tensor:
        """Save the probabilities."""
        y: Tensor = self.op(x, dim, *rest)
        # The op may compute in another dtype than that of x; cotangents go back to it.
        self.before, self.dim = x.dtype, dim % max(1, y.ndim) + 1
        # A 0-d softmax is 1: a row of one number needs no formula of its own.
        last = y.movedim(dim, -1) if y.ndim else y[None]
        self.shape, self.p = last.shape, last.reshape(-1, last.shape[-1]).contiguous()
        return y

    def _rows(self, u: Tensor) -> Tensor:
        """``[k, *x]`` to ``[k, rows, C]``."""
        u = u.movedim(self.dim, -1) if u.ndim > 1 else u
        return u.reshape(u.shape[0], *self.p.shape).to(self.p.dtype)

    def _unrows(self, u: Tensor) -> Tensor:
        return u.view(u.shape[0], *self.shape).movedim(-1, self.dim)

    def tangent(self, dx: Tensor) -> Tensor:
        """Return ``p (dx - <p, dx>)``."""
        self.dp, _ = softmax_jacobian(self.p, self._rows(dx))
        return self._unrows(self.dp)

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Return ``p (g - <p, g>)``."""
        return (self._unrows(softmax_jacobian(self.p, self._rows(g))[0]).to(self.before),)

    def prepare(self, g: Tensor) -> None:
        """Compute ``g - <p, g>``."""
        rows = self._rows(g)[0]
        # <dp, g> = <dp, inner>, for the rows of dp sum to zero: so g itself is not kept.
        self.inner = (rows - (self.p * rows).sum(1, keepdim=True)).contiguous()

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor]:
        """Return the tangent of ``backward``."""
        rows = softmax_backward_tangent(self.p, self.dp, self.inner, self._rows(dg))
        return (self._unrows(rows).to(self.before),)


@rule(aten.log_softmax.int, aten._log_softmax.default)
class LogSoftmax(Rule):
    """``y = log softmax(x)``."""

    freed_after_reverse = ("dl",)

    def forward(self, x: Tensor, dim: int, *rest: Any) -> Tensor:
        """Save the probabilities; the dimension is counted from the end, so that a leading k does not matter."""
        y: Tensor = self.op(x, dim, *rest)
        # All sweeps need p, and none needs y.
        self.p, self.dim, self.before = y.exp(), dim % max(1, y.ndim) - max(1, y.ndim), x.dtype
        return y

    def tangent(self, dx: Tensor) -> Tensor:
        """Return ``dx - <p, dx>``."""
        dx = dx.to(self.p.dtype)
        self.dl = dx - (self.p * dx).sum(self.dim, keepdim=True)
        return self.dl

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Return ``g - p sum g``."""
        return (torch.addcmul(g, self.p, g.sum(self.dim, keepdim=True), value=-1).to(self.before),)

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor]:
        """Return ``dg - p (sum dg + dl sum g)``, since dp = p dl."""
        # dp sum g = p dl sum g: with p in front, both terms share one pass over the rows.
        inner = torch.addcmul(dg.sum(self.dim, keepdim=True), self.dl, g.sum(self.dim, keepdim=True))
        return (torch.addcmul(dg, self.p, inner, value=-1).to(self.before),)
