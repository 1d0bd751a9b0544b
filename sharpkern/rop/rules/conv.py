"""Convolutions and transposed convolutions of one to three dimensions, through torch's own kernels.

y = conv(x, w) + b:   dy = conv(dx, w) + conv(x, dw) + db
gx = convT(g, w)      d(gx) = convT(dg, w) + convT(g, dw)
gw = wgrad(x, g)      d(gw) = wgrad(x, dg) + wgrad(dx, g)         gb = sum g
k is folded into the batch where the weight is the primal's; otherwise one call follows the other.

Two calls and a sum, or one over concatenated channels (batch for wgrad)? Measured on two CPU threads, batch 64,
32 to 64 channels, k = 1: one call for conv is at best 7 % faster and up to three times slower, for wgrad always
slower; for convT it is slower without a stride, but takes two thirds of the time with one: used there.

Not kept (AMD Zen 3): channels last around each call, with its conversions 0.28 to 1.1 of the speed, 1.1 to 2.8 only for
strided input gradients; oneDNN's own accumulation into the result (``_convolution_pointwise_``), equal; larger malloc
thresholds, equal once tensors of that size have been freed before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..rule import Selective, fold, inner, rule
from .fallback import UnsupportedOpError

aten = torch.ops.aten


@rule(
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
    aten.convolution.default,
)  # fmt: skip
class Convolution(Selective):
    """``y = conv(x, w) + b`` for x ``[N, C, *pixels]``."""

    freed_after_reverse = ("dx", "dw", "begun")
    begun: Tensor | None = None  # d(gw), where it holds the part that the tangent sweep knows

    def forward(self, x: Tensor, w: Tensor, b: Tensor | None = None, *options: Any) -> Tensor:
        """Save x, w and the geometry."""
        # By name, for the overloads have their options in different orders and some lack a few.
        named = dict(zip((a.name for a in self.op._schema.arguments[3:]), options, strict=True))
        spatial = w.ndim - 2
        if x.ndim != w.ndim:
            # k takes the place of the batch, which must be there.
            raise UnsupportedOpError(f"{self.op} without a batch dimension: add one with x[None].")
        stride, dilation = _each(named["stride"], spatial), _each(named["dilation"], spatial)
        is_transpose = self.op._schema.name.startswith("aten::conv_transpose")
        transposed = bool(named.get("transposed", is_transpose))
        output_padding, groups = _each(named.get("output_padding", 0), spatial), named["groups"]
        self.crop: list[int] | None = None
        padding = named["padding"]
        if isinstance(padding, str):
            padding, x = self._named_padding(padding, x, w, dilation)
        padding = _each(padding, spatial)
        self.geometry = (stride, padding, dilation, transposed, output_padding, groups)
        strided = any(s > 1 for s in stride)
        # Concatenating channels makes no sense with groups; for the rest see the measurements above.
        self.one_call = strided and groups == 1 and not transposed and x.device.type == "cpu"
        self.x, self.w = x, w
        # Of the result: a transposed convolution has its weight as ``[in, out / groups, ...]``.
        self.channels = w.shape[1] * groups if transposed else w.shape[0]
        y = self._conv(x, w, b)
        self.y_shape = y.shape
        return y

    def _named_padding(self, padding: str, x: Tensor, w: Tensor, dilation: list[int]) -> tuple[list[int], Tensor]:
        """'valid' is none; an odd total of 'same' is padded by hand, one more at the end."""
        totals = [d * (s - 1) for d, s in zip(dilation, w.shape[2:], strict=True)]
        if padding == "valid":
            return [0] * len(totals), x
        # A convolution pads both ends alike; the odd one of 'same' goes to the end, as torch has it.
        if any(t % 2 for t in totals):
            # ``constant_pad_nd`` counts from the last dimension.
            self.crop = [p for t in reversed(totals) for p in (0, t % 2)]
            x = aten.constant_pad_nd.default(x, self.crop)
        return [t // 2 for t in totals], x

    def _conv(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return _tensor(aten.convolution.default(x, w, b, *self.geometry))

    def _backward(self, g: Tensor, x: Tensor, w: Tensor, *wanted: bool) -> tuple[Tensor, ...]:
        # ``[channels]``: the bias's size, which is read only where its cotangent is wanted.
        parts: tuple[Tensor, ...] = aten.convolution_backward.default(
            g, x, w, [self.channels], *self.geometry, list(wanted)
        )
        return parts

    def tangent(self, dx: Tensor | None, dw: Tensor | None, db: Tensor | None) -> Tensor:
        """Return ``conv(dx, w) + conv(x, dw) + db``."""
        if dx is not None and self.crop is not None:
            # The padded x was saved, and its tangent is padded with the zeros that are there at any x.
            dx = aten.constant_pad_nd.default(dx, self.crop)
        self.dx, self.dw, self.begun = dx, dw, None
        k = next(d for d in (dx, dw, db) if d is not None).shape[0]
        # One call for all k, which share the weight.
        y = None if dx is None else self._conv(fold(dx), self.w).unflatten(0, (k, -1))
        self._begin_weight(k)
        if dw is not None:
            # Each vector has a weight of its own, so k calls; a generator, so that one result exists at a time.
            others = (self._conv(self.x, dw[i], None if db is None else db[i]) for i in range(k))
            return _add_each(y, others, k)
        if db is not None:
            db = db.reshape(k, 1, -1, *[1] * (len(self.y_shape) - 2))
            return db.expand(k, *self.y_shape) if y is None else y.add_(db)
        assert y is not None
        return y

    def _begin_weight(self, k: int) -> None:
        """Write ``wgrad(dx, g)`` to where d(gw) will be, so that no sweep needs dx any more: it is not kept."""
        if self.dx is not None and self.needs[1] and (out := self.place(1, (k, *self.w.shape), self.dx)) is not None:
            # ``convolution_backward`` sums over the batch: k folded into it would mix the vectors.
            for i in range(k):
                out[i] = self._to_w(self.g, self.dx[i])
            self.dx, self.begun = None, out

    def prepare(self, g: Tensor) -> None:
        """Keep g at hand for the tangent sweep."""
        self.g = g[0]

    def backward(self, g: Tensor, wanted: tuple[Any, ...] | None = None) -> tuple[Tensor | None, ...]:
        """Return ``convT(g, w), wgrad(x, g), sum g``."""
        needs = wanted or self.needs
        if g.shape[0] == 1:
            # One call gives all three, and shares its work among them.
            parts = self._backward(g[0], self.x, self.w, *needs)
            gx, gw, gb = (None if p is None else p[None] for p in parts)
            return self._uncrop(gx), gw, gb
        return self._blocks(g, None, needs)

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the tangents of the cotangents."""
        return self._blocks(dg, g[0], self.needs)

    def second_order(self, dargs: tuple[Any, ...], g: Tensor) -> Tensor | None:
        """Return ``2 <g, conv(dx, dw)>``."""
        if self.dx is None or self.dw is None:
            return None
        # Both are still there: v'Hv has no place for a product, so that nothing has been begun.
        pairs = zip(self.dx, self.dw, strict=True)
        return 2 * torch.cat([inner(g, self._conv(dx, dw)[None]) for dx, dw in pairs])

    def _blocks(self, dg: Tensor, g: Tensor | None, needs: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        """Pull back k cotangents to what is needed; with g, add its pull-back along the tangents of x and w."""
        k = dg.shape[0]
        dgx = dgw = None
        if needs[0]:
            dw = None if g is None else self.dw
            if g is not None and dw is not None and k == 1 and self.one_call:
                # [dg, g] convolved with [w, dw] over concatenated channels is the sum of both.
                dgx = self._to_x(torch.cat([dg[0], g], 1), torch.cat([self.w, dw[0]]))[None]
            else:
                dgx = self._to_x(fold(dg), self.w).unflatten(0, (k, -1))
                if g is not None and dw is not None:
                    dgx = _add_each(dgx, (self._to_x(g, dw[i]) for i in range(k)), k)
        if needs[1]:
            dgw = self.result(1, (k, *self.w.shape), dg)
            begun = self.begun if g is not None else None
            # Else the part begun in the tangent sweep would lie in another result, and be lost without a word.
            assert begun is None or begun.data_ptr() == dgw.data_ptr(), "the sweeps write to the same result"
            for i in range(k):
                part = self._to_w(dg[i], self.x)
                if begun is not None:
                    dgw[i].add_(part)
                elif g is None or self.dx is None:
                    dgw[i] = part
                else:
                    torch.add(part, self._to_w(g, self.dx[i]), out=dgw[i])
        return self._uncrop(dgx), dgw, _sum(dg) if needs[2] else None

    def _to_x(self, g: Tensor, w: Tensor) -> Tensor:
        """Return ``convT(g, w)``; of x only the shape matters."""
        # Memory that is never read or written, for a call that wants a tensor.
        x = self.x if g.shape[0] == self.x.shape[0] else g.new_empty(g.shape[0], *self.x.shape[1:])
        return self._backward(g, x, w, True, False, False)[0]

    def _to_w(self, g: Tensor, x: Tensor) -> Tensor:
        """Return ``wgrad(x, g)``; of w only the shape matters."""
        return self._backward(g, x, self.w, False, True, False)[1]

    def _uncrop(self, gx: Tensor | None) -> Tensor | None:
        if gx is None or self.crop is None:
            return gx
        return _tensor(aten.constant_pad_nd.default(gx, [-p for p in self.crop]))


def _tensor(result: Any) -> Tensor:
    value: Tensor = result
    return value


def _add_each(y: Tensor | None, others: Iterable[Tensor], k: int) -> Tensor:
    """Add to each of y ``[k, ...]``, which is fresh, one of the others; they come one at a time."""
    if y is None:
        return next(iter(others))[None] if k == 1 else torch.stack(list(others))
    for part, other in zip(y, others, strict=True):
        part += other
    return y


def _each(value: Any, count: int) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * count if len(values) == 1 else values


def _sum(g: Tensor) -> Tensor:
    return g.sum([1, *range(3, g.ndim)])
