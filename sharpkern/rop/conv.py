"""Convolutions and transposed convolutions of one to three dimensions, through torch's own kernels.

y = conv(x, w) + b:   dy = conv(dx, w) + conv(x, dw) + db
gx = convT(g, w)      d(gx) = convT(dg, w) + convT(g, dw)
gw = wgrad(x, g)      d(gw) = wgrad(x, dg) + wgrad(dx, g)         gb = sum g
A sum of two convolutions is one convolution over concatenated channels (batch, for wgrad). Without groups that saves a
pass over the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fallback import UnsupportedOpError
from .rule import Rule, fold, rule

aten = torch.ops.aten


@rule(
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input, aten.convolution.default,
)  # fmt: skip
class Convolution(Rule):
    """``y = conv(x, w) + b`` for x ``[N, C, *pixels]``."""

    def forward(self, x: Tensor, w: Tensor, b: Tensor | None = None, *options: Any) -> Tensor:
        """Save x, w and the geometry."""
        named = dict(zip((a.name for a in self.op._schema.arguments[3:]), options, strict=True))
        spatial = w.ndim - 2
        if x.ndim != w.ndim:
            raise UnsupportedOpError(f"{self.op} without a batch dimension: add one with x[None].")
        self.stride, self.dilation = _each(named["stride"], spatial), _each(named["dilation"], spatial)
        self.transposed = bool(named.get("transposed", self.op._schema.name.startswith("aten::conv_transpose")))
        self.output_padding = _each(named.get("output_padding", 0), spatial)
        self.groups = named["groups"]
        self.crop: list[int] | None = None
        padding = named["padding"]
        if isinstance(padding, str):
            padding, x = self._named_padding(padding, x, w)
        self.padding = _each(padding, spatial)
        self.x, self.w, self.channels = x, w, w.shape[1] * self.groups if self.transposed else w.shape[0]
        return self._conv(x, w, b)

    def _named_padding(self, padding: str, x: Tensor, w: Tensor) -> tuple[list[int], Tensor]:
        """'valid' is none; an odd total of 'same' is padded by hand, one more at the end."""
        totals = [d * (s - 1) for d, s in zip(self.dilation, w.shape[2:], strict=True)]
        if padding == "valid":
            return [0] * len(totals), x
        if any(t % 2 for t in totals):
            self.crop = [p for t in reversed(totals) for p in (0, t % 2)]
            x = aten.constant_pad_nd.default(x, self.crop)
        return [t // 2 for t in totals], x

    def _conv(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        y: Tensor = aten.convolution.default(
            x, w, b, self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups
        )
        return y

    def _backward(self, g: Tensor, x: Tensor, w: Tensor, *wanted: bool) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = aten.convolution_backward.default(
            g, x, w, [self.channels], self.stride, self.padding, self.dilation, self.transposed, self.output_padding,
            self.groups, list(wanted),
        )  # fmt: skip
        return parts

    def tangent(self, dx: Tensor | None, dw: Tensor | None, db: Tensor | None) -> Tensor:
        """Return ``conv(dx, w) + conv(x, dw) + db``."""
        if dx is not None and self.crop is not None:
            dx = aten.constant_pad_nd.default(dx, self.crop)
        self.dx, self.dw = dx, dw
        if dx is not None and dw is not None and dx.shape[0] == 1 and self.groups == 1 and not self.transposed:
            both = torch.cat([dx[0], self.x], 1), torch.cat([self.w, dw[0]], 1)
            return self._conv(*both, None if db is None else db[0])[None]
        k = next(d for d in (dx, dw, db) if d is not None).shape[0]
        y = None if dx is None else self._conv(fold(dx), self.w).unflatten(0, (k, -1))
        if dw is not None:
            other = torch.stack([self._conv(self.x, w, None if db is None else db[i]) for i, w in enumerate(dw)])
            return other if y is None else y.add_(other)
        if db is not None:
            shape = y.shape[1:] if y is not None else self._conv(self.x, self.w).shape
            db = db.reshape(k, 1, -1, *[1] * (len(shape) - 2))
            return db.expand(k, *shape) if y is None else y.add_(db)
        assert y is not None
        return y

    def backward(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``convT(g, w), wgrad(x, g), sum g``."""
        if g.shape[0] == 1:
            parts = self._backward(g[0], self.x, self.w, *self.needs)
            gx, gw, gb = (None if p is None else p[None] for p in parts)
            return self._uncrop(gx), gw, gb
        return self._blocks(g, None)

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the tangents of the cotangents."""
        if dg.shape[0] > 1 or self.groups > 1 or self.transposed:
            return self._blocks(dg, g)
        dg0, g0 = dg[0], g[0]
        dgx = dgw = None
        if self.needs[0]:
            if self.dw is None:
                dgx = self._backward(dg0, self.x, self.w, True, False, False)[0]
            else:
                both = torch.cat([dg0, g0], 1), torch.cat([self.w, self.dw[0]])
                dgx = self._backward(both[0], self.x, both[1], True, False, False)[0]
        if self.needs[1]:
            if self.dx is None:
                dgw = self._backward(dg0, self.x, self.w, False, True, False)[1]
            else:
                both = torch.cat([dg0, g0]), torch.cat([self.x, self.dx[0]])
                dgw = self._backward(both[0], both[1], self.w, False, True, False)[1]
        dgb = _sum(dg) if self.needs[2] else None
        return self._uncrop(None if dgx is None else dgx[None]), None if dgw is None else dgw[None], dgb

    def _blocks(self, dg: Tensor, g: Tensor | None) -> tuple[Tensor | None, ...]:
        """Do the same for k vectors (k folded into the batch where the weight is the primal's), or without g."""
        k = dg.shape[0]
        dgx = dgw = None
        if self.needs[0]:
            x = self.x.expand(k, *self.x.shape).reshape(-1, *self.x.shape[1:])
            dgx = self._backward(fold(dg), x, self.w, True, False, False)[0].unflatten(0, (k, -1))
            if g is not None and self.dw is not None:
                for part, dw in zip(dgx, self.dw, strict=True):
                    part.add_(self._backward(g[0], self.x, dw, True, False, False)[0])
        if self.needs[1]:
            dgw = torch.stack([self._backward(part, self.x, self.w, False, True, False)[1] for part in dg])
            if g is not None and self.dx is not None:
                for part, dx in zip(dgw, self.dx, strict=True):
                    part.add_(self._backward(g[0], dx, self.w, False, True, False)[1])
        return self._uncrop(dgx), dgw, _sum(dg) if self.needs[2] else None

    def _uncrop(self, gx: Tensor | None) -> Tensor | None:
        if gx is None or self.crop is None:
            return gx
        return aten.constant_pad_nd.default(gx, [-p for p in self.crop])  # type: ignore[no-any-return]


def _each(value: Any, count: int) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * count if len(values) == 1 else values


def _sum(g: Tensor) -> Tensor:
    return g.sum([1, *range(3, g.ndim)])
