"""Matrix products: linear, addmm, mm, bmm, baddbmm, matmul.

y = x W' + b:   dy = dx W' + x dW' + db        gx = g W          d(gx) = dg W + g dW
                                               gW = g' x         d(gW) = dg' x + g' dx        gb = sum g
Each line is a sum of products into one accumulator: the dual GEMM on a GPU, elsewhere a GEMM with beta = 1.

Not kept, on an MLP of width 512 (AMD Zen 4; 1.66 to 1.73 gradients a product, 15.8 ms): huge pages and larger malloc
thresholds (1.74), one GEMM over concatenated operands (197 to 203 GFLOP/s for 204, and the copies), results in
preallocated memory (15.9 ms).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.linear import dual_gemm, fused
from ..rule import Rule, Selective, align, inner, reduce_to, rule

aten = torch.ops.aten


@rule(aten.linear.default)
class Linear(Selective):
    """``y = x W' + b`` with x ``[..., in]``, W ``[out, in]``."""

    freed_after_reverse = ("dx", "dw", "begun")
    begun: Tensor | None = None  # d(gW), where it holds the part that the tangent sweep knows

    def forward(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        """Save x as rows and W."""
        # Rows, so that every product below is of matrices, whatever leads. A view for a contiguous x.
        self.x = x.reshape(-1, x.shape[-1])
        self.w = w
        self.lead = x.shape[:-1]
        y: Tensor = aten.linear.default(x, w, b)
        return y

    def tangent(self, dx: Tensor | None, dw: Tensor | None, db: Tensor | None) -> Tensor:
        """Return ``dx W' + x dW' + db``, and begin ``d(gW)``."""
        self.dw = dw
        self.dx = None if dx is None else dx.reshape(dx.shape[0], *self.x.shape)
        # The last product may have been stopped half way by an error.
        self.begun = None
        k = _first(dx, dw, db).shape[0]
        if fused(self.x) and (self.dx is not None or dw is not None):
            return self._fused_tangent(db).view(k, *self.lead, self.w.shape[0])
        y = self._sum(dw, db, k)
        self._begin_weight(k)
        return y.reshape(k, *self.lead, self.w.shape[0])

    def _sum(self, dw: Tensor | None, db: Tensor | None, k: int) -> Tensor:
        rows, width = self.x.shape[0], self.w.shape[0]
        # Plain matrices: for one vector a batched product has a batch of one, and up to 8% more of overhead.
        if k == 1:
            bias = None if db is None else db[0]
            y = _sum_of_products([(self._dx0(), self.w.t()), (self.x, None if dw is None else dw[0].t())], bias)
            y = bias.expand(rows, width) if y is None and bias is not None else y
            assert y is not None
        elif dw is None:
            # All vectors share W, so this is one product with k times the rows.
            y = _add_bias(None if self.dx is None else self.dx @ self.w.t(), db, rows)
        else:
            x = self.x.expand(k, *self.x.shape)
            # Here each vector has its own dW: batched, with x expanded and not copied.
            y = torch.bmm(x, dw.mT) if db is None else torch.baddbmm(db[:, None], x, dw.mT)
            if self.dx is not None:
                # The shared W again as one product, onto the memory of the first: no sum is a pass of its own.
                y.view(k * rows, width).addmm_(self.dx.reshape(k * rows, self.w.shape[1]), self.w.t())
        return y

    def _begin_weight(self, k: int) -> None:
        """Write ``g' dx`` to where d(gW) will be, so that no sweep needs dx any more: it is not kept."""
        if self.dx is not None and self.needs[1] and (out := self.place(1, (k, *self.w.shape), self.dx)) is not None:
            # Only with a place: else d(gW) would have to be kept from sweep to sweep, and it is as large as W for each
            # vector, where dx is often smaller.
            self._weight([(self.g.expand(k, *self.g.shape[1:]), self.dx)], out)
            self.dx, self.begun = None, out

    def _dx0(self) -> Tensor | None:
        return None if self.dx is None else self.dx[0]

    def _fused_tangent(self, db: Tensor | None) -> Tensor:
        moved = None if self.dw is None else self.dw.mT
        if self.dx is None:
            assert moved is not None
            return dual_gemm(self.x, moved, bias=db)
        return dual_gemm(self.dx, self.w.t(), None if moved is None else self.x, moved, db)

    def backward(self, g: Tensor, wanted: tuple[Any, ...] | None = None) -> tuple[Tensor | None, ...]:
        """Return ``g W, g' x, sum g``."""
        needs = wanted or self.needs
        k = g.shape[0]
        g = g.reshape(k, *self.x.shape[:1], self.w.shape[0])
        gx = gw = gb = None
        if needs[0]:
            gx = (g @ self.w).view(k, *self.lead, -1)
        if needs[1]:
            # A result for each vector, summed over its rows alone: a batched product.
            gw = self._weight([(g, self.x.expand(k, *self.x.shape))], self.result(1, (k, *self.w.shape), g))
        if needs[2]:
            # Into its place: one pass less than a sum and a copy.
            gb = torch.sum(g, 1, out=self.result(2, (k, g.shape[-1]), g))
        return gx, gw, gb

    def prepare(self, g: Tensor) -> None:
        """Keep g at hand for the tangent sweep."""
        # The tangent sweep gets no g, and needs this one to begin d(gW).
        self.g = g.reshape(1, self.x.shape[0], self.w.shape[0])

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``dg W + g dW, dg' x + g' dx, sum dg``."""
        k = dg.shape[0]
        dg = dg.reshape(k, *self.x.shape[:1], self.w.shape[0])
        g = g.reshape(1, *dg.shape[1:])
        dgx = dgw = dgb = None
        if self.needs[0]:
            if fused(dg):
                dgx = dual_gemm(dg, self.w, None if self.dw is None else g[0], self.dw)
            elif self.dw is None:
                dgx = dg @ self.w
            elif k == 1:
                dgx = torch.mm(dg[0], self.w).addmm_(g[0], self.dw[0])
            else:
                # First the product that has a matrix for each vector, then the shared one onto it, as in the tangent.
                dgx = torch.bmm(g.expand(k, *g.shape[1:]), self.dw)
                dgx.view(-1, dgx.shape[-1]).addmm_(dg.reshape(-1, dg.shape[-1]), self.w)
            dgx = dgx.view(k, *self.lead, -1)
        if self.needs[1] and fused(dg):
            out = self.result(1, (k, *self.w.shape), dg)
            dgw = dual_gemm(dg.mT, self.x, None if self.dx is None else g[0].mT, self.dx, out=out)
        elif self.needs[1]:
            # One after the other onto the same memory; the second is missing where the tangent sweep has begun with it.
            pairs = [(dg, self.x.expand(k, *self.x.shape))]
            if self.dx is not None:
                pairs.append((g.expand(k, *g.shape[1:]), self.dx))
            out = self.result(1, (k, *self.w.shape), dg)
            # Else what was begun would lie in another result, and be lost without a word.
            assert self.begun is None or self.begun.data_ptr() == out.data_ptr(), "the sweeps write to the same result"
            dgw = self._weight(pairs, out, onto=self.begun is not None)
        if self.needs[2]:
            dgb = torch.sum(dg, 1, out=self.result(2, (k, dg.shape[-1]), dg))
        return dgx, dgw, dgb

    def second_order(self, dargs: tuple[Any, ...], g: Tensor) -> Tensor | None:
        """Return ``2 <g, dx dW'>``."""
        if self.dx is None or self.dw is None:
            return None
        # y'' along v is 2 dx dW': W, x and b appear once each.
        return 2 * inner(g.reshape(1, *self.dx.shape[1:-1], self.w.shape[0]), self.dx @ self.dw.mT)

    def _weight(self, pairs: list[tuple[Tensor, Tensor]], out: Tensor, *, onto: bool = False) -> Tensor:
        """Sum ``a' b`` over the pairs ``[k, rows, out], [k, rows, in]`` into out, or onto what is there."""
        for a, b in pairs:
            if len(a) == 1 and onto:
                out[0].addmm_(a[0].t(), b[0])
            elif len(a) == 1:
                # The transposed view goes to the library as a flag: nothing is copied.
                torch.mm(a[0].t(), b[0], out=out[0])
            elif onto:
                out.baddbmm_(a.mT, b)
            else:
                torch.bmm(a.mT, b, out=out)
            # The first product overwrites what was there, which may be anything; the next ones add.
            onto = True
        return out


def _first(*tensors: Tensor | None) -> Tensor:
    return next(t for t in tensors if t is not None)


def _add_bias(y: Tensor | None, db: Tensor | None, rows: int) -> Tensor:
    if y is None:
        assert db is not None
        return db[:, None].expand(-1, rows, -1)
    return y if db is None else y + db[:, None]


def _sum_of_products(pairs: list[tuple[Tensor | None, Tensor | None]], bias: Tensor | None) -> Tensor | None:
    """Accumulate 2-d products into one buffer; the bias rides along with the first."""
    y: Tensor | None = None
    for a, b in pairs:
        if a is None or b is None:
            continue
        if y is not None:
            y.addmm_(a, b)
        elif bias is not None:
            y = torch.addmm(bias, a, b)
        else:
            y = torch.mm(a, b)
    return y


@rule(aten.mm.default, aten.bmm.default, aten.matmul.default)
class MatMul(Selective):
    """``y = a b`` with any of matmul's broadcasting: the product rule, batched over k."""

    freed_after_reverse = ("da", "db")

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Save both factors, as matrices."""
        self.save(a, b)
        y: Tensor = self.op(a, b)
        return y

    def save(self, a: Tensor, b: Tensor) -> None:
        """Do all of ``forward`` but the product."""
        # A vector on the left is a row, on the right a column, as in NumPy; its dimension leaves the result again.
        self.vector = a.ndim == 1, b.ndim == 1
        self.shapes = a.shape, b.shape
        self.a, self.b = (a[None] if a.ndim == 1 else a), (b[:, None] if b.ndim == 1 else b)
        # Tangents are aligned to it, since k would else meet a batch dimension.
        self.rank = max(self.a.ndim, self.b.ndim)

    def _left(self, da: Tensor) -> Tensor:
        return align(da[:, None] if self.vector[0] else da, self.rank)

    def _right(self, db: Tensor) -> Tensor:
        return align(db[..., None] if self.vector[1] else db, self.rank)

    def _result(self, y: Tensor) -> Tensor:
        y = y.squeeze(-1) if self.vector[1] else y
        return y.squeeze(-1 if self.vector[1] else -2) if self.vector[0] else y

    def _cotangent(self, g: Tensor) -> Tensor:
        if self.vector[0]:
            g = g.unsqueeze(-1 if self.vector[1] else -2)
        return g.unsqueeze(-1) if self.vector[1] else g

    def tangent(self, da: Tensor | None, db: Tensor | None) -> Tensor:
        """Return ``da b + a db``."""
        self.da = None if da is None else self._left(da)
        self.db = None if db is None else self._right(db)
        y = None if self.da is None else self.da @ self.b
        if self.db is not None:
            y = self.a @ self.db if y is None else y + self.a @ self.db
        assert y is not None
        return self._result(y)

    def backward(self, g: Tensor, wanted: tuple[Any, ...] | None = None) -> tuple[Tensor | None, ...]:
        """Return ``g b', a' g``."""
        needs = wanted or self.needs
        g = self._cotangent(g)
        ga = g @ self.b.mT if needs[0] else None
        gb = self.a.mT @ g if needs[1] else None
        return self._shrink(ga, gb)

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``dg b' + g db', a' dg + da' g``."""
        dg, g = self._cotangent(dg), self._cotangent(g)
        dga = dgb = None
        if self.needs[0]:
            dga = dg @ self.b.mT if self.db is None else dg @ self.b.mT + g @ self.db.mT
        if self.needs[1]:
            dgb = self.a.mT @ dg if self.da is None else self.a.mT @ dg + self.da.mT @ g
        return self._shrink(dga, dgb)

    def second_order(self, dargs: tuple[Any, ...], g: Tensor) -> Tensor | None:
        """Return ``2 <g, da db>``."""
        if self.da is None or self.db is None:
            return None
        return 2 * inner(self._cotangent(g), self.da @ self.db)

    def _shrink(self, ga: Tensor | None, gb: Tensor | None) -> tuple[Tensor | None, ...]:
        """Sum over broadcast batch dimensions and restore the arguments' shapes."""
        if ga is not None:
            ga = reduce_to(ga, self.a.shape).reshape(ga.shape[0], *self.shapes[0])
        if gb is not None:
            gb = reduce_to(gb, self.b.shape).reshape(gb.shape[0], *self.shapes[1])
        return ga, gb


@rule(aten.addmm.default, aten.baddbmm.default, aten.addmv.default)
class AddMM(Rule):
    """``y = beta c + alpha a b``; with ``beta = 0`` torch ignores c, its NaNs and infinities included."""

    def __init__(self, op: Any, needs: tuple[Any, ...]) -> None:
        super().__init__(op, needs)
        # c is linear on its own; all that is bilinear is the product's.
        self.product = MatMul(aten.matmul.default, needs[1:])

    def forget_tangents(self) -> None:
        """Free those of the product."""
        self.product.forget_tangents()

    def forward(self, c: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
        """Save the factors and the scalars."""
        self.c_shape, self.beta, self.alpha = c.shape, beta, alpha
        self.product.save(a, b)
        y: Tensor = self.op(c, a, b, beta=beta, alpha=alpha)
        self.rank = y.ndim
        self.y_shape = y.shape
        return y

    def _scaled(self, d: Tensor) -> Tensor:
        # Times zero, an infinite number would be NaN.
        return self.beta * d if self.beta else torch.zeros_like(d)

    def tangent(self, dc: Tensor | None, da: Tensor | None, db: Tensor | None) -> Tensor:
        """Return ``beta dc + alpha (da b + a db)``."""
        self.bilinear = da is not None or db is not None
        y = self.alpha * self.product.tangent(da, db) if self.bilinear else None
        if dc is None:
            assert y is not None
            return y
        dc = self._scaled(align(dc, self.rank))
        return dc.expand(dc.shape[0], *self.y_shape) if y is None else y + dc

    def backward(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``beta g, alpha g b', alpha a' g``."""
        gc = reduce_to(self._scaled(g), self.c_shape) if self.needs[0] else None
        return gc, *self.product.backward(self.alpha * g)

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
        """Product rule on ``backward``."""
        # Only c moves, so that the product has saved no tangents.
        if not self.bilinear:
            return self.backward(dg)
        dgc = reduce_to(self._scaled(dg), self.c_shape) if self.needs[0] else None
        # alpha scales the cotangents: the product sees its own result's.
        return dgc, *self.product.backward_tangent(self.alpha * dg, self.alpha * g)

    def second_order(self, dargs: tuple[Any, ...], g: Tensor) -> Tensor | None:
        """Return ``2 alpha <g, da db>``."""
        return self.product.second_order(dargs[1:], self.alpha * g) if self.bilinear else None
