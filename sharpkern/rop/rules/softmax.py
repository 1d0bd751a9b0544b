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

from ...kernels.softmax import (
    log_softmax_backward_tangent,
    log_softmax_jacobian,
    softmax_backward_tangent,
    softmax_jacobian,
)
from ..rule import Rule, inner, rule

aten = torch.ops.aten


class OverRows(Rule):
    """A rule whose kernels take rows, ``[rows, C]``, of the dimension that the op is over."""

    p: Tensor  # rows of probabilities

    def _save(self, x: Tensor, y: Tensor, dim: int) -> Tensor:
        """Save where the rows lie; return those of y."""
        # The op may compute in another dtype than that of x; cotangents go back to it.
        self.before, self.dim = x.dtype, dim % max(1, y.ndim) + 1
        # A 0-d result is a row of one number, which needs no formula of its own.
        last = y.movedim(dim, -1) if y.ndim else y[None]
        self.shape = last.shape
        return last.reshape(-1, last.shape[-1]).contiguous()

    def _rows(self, u: Tensor) -> Tensor:
        """``[k, *x]`` to ``[k, rows, C]``, in the dtype of p."""
        u = u.movedim(self.dim, -1) if u.ndim > 1 else u
        return u.reshape(u.shape[0], *self.p.shape).to(self.p.dtype)

    def _unrows(self, u: Tensor) -> Tensor:
        return u.view(u.shape[0], *self.shape).movedim(-1, self.dim)


@rule(aten.softmax.int, aten._softmax.default)
class Softmax(OverRows):
    """``y = softmax(x)``, as rows of probabilities."""

    freed_after_reverse = ("dp",)

    def forward(self, x: Tensor, dim: int, *rest: Any) -> Tensor:
        """Save the probabilities."""
        y: Tensor = self.op(x, dim, *rest)
        self.p = self._save(x, y, dim)
        return y

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
class LogSoftmax(OverRows):
    """``y = log softmax(x)``."""

    keeps_cotangent = False  # only its sum is of use
    freed_after_reverse = ("dl",)

    def forward(self, x: Tensor, dim: int, *rest: Any) -> Tensor:
        """Save the probabilities: all sweeps need them, and none needs y."""
        y: Tensor = self.op(x, dim, *rest)
        self.p = self._save(x, y, dim).exp()
        return y

    def tangent(self, dx: Tensor) -> Tensor:
        """Return ``dx - <p, dx>``."""
        self.dl = log_softmax_jacobian(self.p, self._rows(dx))
        return self._unrows(self.dl)

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Return ``g - p sum g``."""
        rows = self._rows(g)
        back = torch.addcmul(rows, self.p, rows.sum(-1, keepdim=True), value=-1)
        return (self._unrows(back).to(self.before),)

    def prepare(self, g: Tensor) -> None:
        """Add up g."""
        self.total = self._rows(g)[0].sum(-1)

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor]:
        """Return ``dg - p (sum dg + dl sum g)``, since dp = p dl."""
        rows = log_softmax_backward_tangent(self.p, self.dl, self.total, self._rows(dg))
        return (self._unrows(rows).to(self.before),)

    def second_order(self, dargs: tuple[Any, ...], g: Tensor) -> Tensor:
        """Return ``-sum g <p dl, dl>``: <p, dl> is zero, so that dl may stand for dx."""
        return -inner(self.total[:, None] * self.p * self.dl, self.dl)
