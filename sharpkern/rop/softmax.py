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

from .rule import Rule, rule

aten = torch.ops.aten


class _Softmax(Rule):
    """Saves p; the dimension is counted from the end, so that a leading k does not matter."""

    def _save(self, p: Tensor, dim: int, before: torch.dtype) -> None:
        self.p, self.dim, self.before = p, dim % max(1, p.ndim) - max(1, p.ndim), before

    def _along(self, u: Tensor) -> Tensor:
        return (self.p * u).sum(self.dim, keepdim=True)


@rule(aten.softmax.int, aten._softmax.default)
class Softmax(_Softmax):
    """``y = softmax(x)``."""

    def forward(self, x: Tensor, dim: int, *rest: Any) -> Tensor:
        """Save the probabilities."""
        y: Tensor = self.op(x, dim, *rest)
        self._save(y, dim, x.dtype)
        return y

    def tangent(self, dx: Tensor) -> Tensor:
        """Return ``p (dx - <p, dx>)``."""
        dx = dx.to(self.p.dtype)
        self.dp = (dx - self._along(dx)).mul_(self.p)
        return self.dp

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Return ``p (g - <p, g>)``."""
        return ((g - self._along(g)).mul_(self.p).to(self.before),)

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor]:
        """Return the tangent of ``backward``."""
        inner = dg - self._along(dg) - (self.dp * g).sum(self.dim, keepdim=True)
        return (inner.mul_(self.p).addcmul_(self.dp, g - self._along(g)).to(self.before),)


@rule(aten.log_softmax.int, aten._log_softmax.default)
class LogSoftmax(_Softmax):
    """``y = log softmax(x)``."""

    def forward(self, x: Tensor, dim: int, *rest: Any) -> Tensor:
        """Save the probabilities."""
        y: Tensor = self.op(x, dim, *rest)
        self._save(y.exp(), dim, x.dtype)
        return y

    def tangent(self, dx: Tensor) -> Tensor:
        """Return ``dx - <p, dx>``."""
        dx = dx.to(self.p.dtype)
        self.dl = dx - self._along(dx)
        return self.dl

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Return ``g - p sum g``."""
        return (torch.addcmul(g, self.p, g.sum(self.dim, keepdim=True), value=-1).to(self.before),)

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor]:
        """Return ``dg - p (sum dg + dl sum g)``, since dp = p dl."""
        inner = torch.addcmul(dg.sum(self.dim, keepdim=True), self.dl, g.sum(self.dim, keepdim=True))
        return (torch.addcmul(dg, self.p, inner, value=-1).to(self.before),)
