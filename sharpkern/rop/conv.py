"""Convolutions and transposed convolutions in one, two and three dimensions.

y = x*w + b:   dy = dx*w + x*dw + db        gx = B(g, w)    d(gx) = B(dg, w) + B(g, dw)
                                            gw = W(g, x)    d(gw) = W(dg, x) + W(g, dx)        gb = sum g
B and W are the two halves of ATen's convolution_backward. Where the other factor is the primal's, k is folded into the
batch; where it is a tangent, or the result is a weight for each vector, k convolutions run one after the other.

One convolution over concatenated channels instead of two and a sum is slower on two CPU threads (batch 64, 32 to 64
channels), save for B with a stride: there the fixed cost of the strided kernel dominates and one call takes 2/3 of the
time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .rule import Rule, fold, rule

aten = torch.ops.aten


@rule(aten.convolution.default)
class Convolution(Rule):
    """``y = x*w + b`` with x ``[N, in, ...]``; w is ``[in, out / groups, ...]`` when transposed."""

    def forward(
        self,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Sequence[int],
        groups: int,
    ) -> Tensor:
        """Save x and w."""
        self._set(x, w, stride, padding, dilation, transposed, output_padding, groups)
        return self._run(x, b)

    def _set(self, x: Tensor, w: Tensor, *options: Any) -> None:
        """Save w and the options, those for each dimension spelled out."""
        rank = w.ndim - 2
        stride, padding, dilation, transposed, output_padding, groups = options
        s, p, d, o = (_spread(v, rank) for v in (stride, padding, dilation, output_padding))
        self.options = (s, p, d, transposed, o, groups)
        self.edge: list[int] | None = None  # what padding="same" adds on the far side only
        self.w = w
        self.single = x.ndim == rank + 1  # no batch dimension
        self.whole = not transposed and groups == 1 and max(s) > 1 and x.device.type == "cpu"

    def _run(self, x: Tensor, b: Tensor | None) -> Tensor:
        self.x = self._input(x[None] if self.single else x)
        y = self._conv(self.x, self.w, b)
        self.shape = y.shape
        return y[0] if self.single else y

    def _input(self, x: Tensor) -> Tensor:
        return x if self.edge is None else aten.constant_pad_nd.default(x, self.edge)

    def _conv(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        y: Tensor = aten.convolution.default(x, w, b, *self.options)
        return y

    def _to_x(self, g: Tensor, w: Tensor) -> Tensor:
        """``B(g, w)``; of x only the shape matters."""
        x = self.x if g.shape[0] == self.x.shape[0] else self.x[:1].expand(g.shape[0], *self.x.shape[1:])
        y: Tensor = aten.convolution_backward.default(g, x, w, None, *self.options, [True, False, False])[0]
        return y

    def _to_w(self, g: Tensor, x: Tensor) -> Tensor:
        """``W(g, x)``; of w only the shape matters."""
        y: Tensor = aten.convolution_backward.default(g, x, self.w, None, *self.options, [False, True, False])[1]
        return y

    def tangent(self, dx: Tensor | None, dw: Tensor | None, db: Tensor | None) -> Tensor:
        """Return ``dx*w + x*dw + db``."""
        k = next(d.shape[0] for d in (dx, dw, db) if d is not None)
        y: Tensor | None = None
        if dx is not None:
            rows = self._input(fold(self._batched(dx)))
            dx = rows.unflatten(0, (k, -1))
            y = self._conv(rows, self.w).unflatten(0, (k, -1))
        self.dx, self.dw = dx, dw
        if dw is not None:
            y = _sum(y, lambda c: self._conv(self.x, dw[c], None if db is None else db[c]), k)
        elif db is not None:
            db = db.view(k, 1, -1, *[1] * (self.x.ndim - 2))
            y = db.expand(k, *self.shape) if y is None else y + db
        assert y is not None
        return self._unbatched(y)

    def backward(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``B(g, w), W(g, x), sum g``."""
        g = self._batched(g)
        k = g.shape[0]
        gx = gw = None
        if self.needs[0]:
            gx = self._output(self._to_x(fold(g), self.w).unflatten(0, (k, -1)))
        if self.needs[1]:
            gw = self._weight(g, None, None)
        return gx, gw, self._bias(g)

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``B(dg, w) + B(g, dw), W(dg, x) + W(g, dx), sum dg``."""
        dg, g0 = self._batched(dg), self._batched(g)[0]
        k, dw = dg.shape[0], self.dw
        dgx = dgw = None
        if self.needs[0]:
            if dw is None:
                dgx = self._to_x(fold(dg), self.w).unflatten(0, (k, -1))
            elif k == 1 and self.whole:
                dgx = self._to_x(torch.cat([dg[0], g0], 1), torch.cat([self.w, dw[0]]))[None]
            else:
                dgx = _sum(self._to_x(fold(dg), self.w).unflatten(0, (k, -1)), lambda c: self._to_x(g0, dw[c]), k)
            dgx = self._output(dgx)
        if self.needs[1]:
            dgw = self._weight(dg, g0, self.dx)
        return dgx, dgw, self._bias(dg)

    def _weight(self, g: Tensor, g0: Tensor | None, dx: Tensor | None) -> Tensor:
        """``W(g, x) + W(g0, dx)`` for each vector, into the flat result where possible."""
        k = g.shape[0]
        out = self.out(1, (k, *self.w.shape), g)
        for c in range(k):
            first = self._to_w(g[c], self.x)
            if g0 is None or dx is None:
                out[c] = first
            else:
                torch.add(first, self._to_w(g0, dx[c]), out=out[c])
        return out

    def _bias(self, g: Tensor) -> Tensor | None:
        if not self.needs[2]:
            return None
        return torch.sum(g, [1, *range(3, g.ndim)], out=self.out(2, (g.shape[0], g.shape[2]), g))

    def _output(self, gx: Tensor) -> Tensor:
        """Drop the one-sided padding and the batch dimension that x did not have."""
        if self.edge is not None:
            gx = aten.constant_pad_nd.default(gx, [-p for p in self.edge])
        return self._unbatched(gx)

    def _batched(self, d: Tensor) -> Tensor:
        return d.unsqueeze(1) if self.single else d

    def _unbatched(self, d: Tensor) -> Tensor:
        return d.squeeze(1) if self.single else d


def _sum(y: Tensor | None, other: Callable[[int], Tensor], k: int) -> Tensor:
    """Add to y ``[k, ...]``, a fresh tensor, what is computed for each vector."""
    if y is None:
        return other(0)[None] if k == 1 else torch.stack([other(c) for c in range(k)])
    for c in range(k):
        y[c] += other(c)
    return y


def _spread(value: Sequence[int], rank: int) -> list[int]:
    return list(value) * rank if len(value) == 1 else list(value)


@rule(
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
)  # fmt: skip
class Conv(Convolution):
    """The convolutions of ``torch.nn.functional``, with sizes or a name as padding."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int] | str,
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        """Translate the padding; "same" pads the far side by one more where the total is odd."""
        rank = w.ndim - 2
        edge: list[int] | None = None
        if isinstance(padding, str):
            same = padding == "same"
            totals = [d * (n - 1) * same for d, n in zip(_spread(dilation, rank), w.shape[2:], strict=True)]
            padding = [t // 2 for t in totals]
            if any(t % 2 for t in totals):
                edge = [v for t in reversed(totals) for v in (0, t % 2)]
        self._set(x, w, stride, padding, dilation, False, [0], groups)
        self.edge = edge
        return self._run(x, b)


@rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
class ConvTranspose(Convolution):
    """The transposed convolutions of ``torch.nn.functional``."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        output_padding: Sequence[int],
        groups: int,
        dilation: Sequence[int],
    ) -> Tensor:
        """Put the options in the order of ``aten.convolution``."""
        self._set(x, w, stride, padding, dilation, True, output_padding, groups)
        return self._run(x, b)
