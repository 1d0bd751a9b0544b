"""Reductions: sum, mean, logsumexp, cumsum."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .rule import LinearInArgs, Rule, rule

aten = torch.ops.aten


def _dims(dim: Any, ndim: int) -> list[int]:
    """Normalise an aten dimension argument; None and [] mean all."""
    if dim is None or (isinstance(dim, list | tuple) and not len(dim)):
        return list(range(ndim))
    return sorted(d % ndim if ndim else 0 for d in (dim if isinstance(dim, list | tuple) else [dim]))


@rule(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim)
class Sum(LinearInArgs):
    """Sum or mean over dimensions."""

    def forward(self, x: Tensor, *options: Any) -> Tensor:
        """Save the shape and which dimensions go."""
        names = [a.name for a in self.op._schema.arguments[1:]]
        named = dict(zip(names, options, strict=True))
        self.shape, self.dtype = x.shape, x.dtype
        self.dims = _dims(named.get("dim"), x.ndim)
        self.keep = bool(named.get("keepdim", False))
        self.weight = 1.0
        if self.op._schema.name == "aten::mean":
            self.weight = 1 / max(1, math.prod(x.shape[d] for d in self.dims))
        y = torch.sum(x, self.dims, keepdim=self.keep, dtype=named.get("dtype")) if x.ndim else x.to(named.get("dtype"))
        self.after = y.dtype
        return y * self.weight if self.weight != 1.0 else y

    def tangent(self, dx: Tensor) -> Tensor:
        """Sum the tangent."""
        if not self.shape:
            return dx.to(self.after)
        y = torch.sum(dx, [d + 1 for d in self.dims], keepdim=self.keep, dtype=self.after)
        return y * self.weight if self.weight != 1.0 else y

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Spread the cotangent."""
        if self.weight != 1.0:
            g = g * self.weight
        if not self.keep:
            for d in self.dims if self.shape else []:
                g = g.unsqueeze(d + 1)
        return (g.expand(g.shape[0], *self.shape).to(self.dtype),)


@rule(aten.logsumexp.default)
class LogSumExp(Rule):
    """``y = log sum exp(x)``: with p = softmax(x), ``dy = <p, dx>``, ``d(gx) = p dg + g p (dx - dy)``."""

    def forward(self, x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
        """Save the softmax."""
        self.dims, self.keep = _dims(dim, x.ndim), keepdim
        y = torch.logsumexp(x, self.dims, keepdim=True)
        self.p = torch.exp(x - y)
        return y if keepdim else self._drop(y, 0)

    def _drop(self, y: Tensor, lead: int) -> Tensor:
        return y.squeeze([d + lead for d in self.dims])

    def _restore(self, g: Tensor) -> Tensor:
        if not self.keep:
            for d in self.dims:
                g = g.unsqueeze(d + 1)
        return g

    def tangent(self, dx: Tensor) -> Tensor:
        """Return ``<p, dx>``."""
        self.dx = dx
        self.dy = (self.p * dx).sum([d + 1 for d in self.dims], keepdim=True)
        return self.dy if self.keep else self._drop(self.dy, 1)

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Return ``p g``."""
        return (self.p * self._restore(g),)

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor]:
        """Return ``p (dg + g (dx - dy))``."""
        return (self.p * (self._restore(dg) + self._restore(g) * (self.dx - self.dy)),)


@rule(aten.cumsum.default)
class CumSum(LinearInArgs):
    """Running sum along a dimension."""

    def forward(self, x: Tensor, dim: int, dtype: Any = None) -> Tensor:
        """Save the dimension."""
        self.dim, self.before = dim % max(1, x.ndim), x.dtype
        y = torch.cumsum(x, dim, dtype=dtype)
        self.after = y.dtype
        return y

    def tangent(self, dx: Tensor) -> Tensor:
        """Running sum of the tangent."""
        return torch.cumsum(dx.to(self.after), self.dim + 1)

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Running sum from the other end."""
        d = self.dim + 1
        return (g.flip(d).cumsum(d).flip(d).to(self.before),)


@rule(aten.amax.default, aten.amin.default)
class Amax(LinearInArgs):
    """Maximum or minimum over dimensions; a tie is shared evenly, as in torch."""

    def forward(self, x: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
        """Save each entry's share."""
        self.dims, self.keep = _dims(dim, x.ndim), keepdim
        y: Tensor = self.op(x, self.dims, True)
        hit = (x == y).to(x.dtype)
        self.share = hit / hit.sum(self.dims, keepdim=True)
        return y if keepdim else y.squeeze(self.dims)

    def tangent(self, dx: Tensor) -> Tensor:
        """Return the share-weighted sum."""
        return (self.share * dx).sum([d + 1 for d in self.dims], keepdim=self.keep)

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Spread by share."""
        if not self.keep:
            for d in self.dims:
                g = g.unsqueeze(d + 1)
        return (self.share * g,)
