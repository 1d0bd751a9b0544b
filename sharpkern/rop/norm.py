"""Layer, RMS, group, instance and batch norm, from one core: standardise over some dimensions, then scale and shift.

xhat = (x - mu) r,  r = (var + eps)^-1/2
J u  = r (u - mean u - xhat mean(xhat u))                     the Jacobian of x -> xhat, symmetric
dJ u = -r [mean(xhat dx) J u + dxhat mean(xhat u) + xhat mean(dxhat u)],   dxhat = J dx
RMS norm is the same without mu and mean u. Means run over the standardised dimensions; all statistics are float32 or
wider.

y = xhat w + b:   dy = dxhat w + xhat dw + db       gx = J (g w)     gw = sum g xhat           gb = sum g
                  d(gx) = J (dg w + g dw) + dJ (g w)                 d(gw) = sum dg xhat + g dxhat
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .rule import Rule, rule

aten = torch.ops.aten


class Standardise:
    """``xhat`` and its derivatives; statistics run over ``dims``, counted from the end: a leading k is no matter."""

    def __init__(self, x: Tensor, dims: tuple[int, ...], eps: float, *, centre: bool) -> None:
        self.dims, self.centre, self.fixed = dims, centre, False
        x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        if centre:
            x = x - x.mean(dims, keepdim=True)
        self.r = torch.rsqrt(x.square().mean(dims, keepdim=True).add_(eps))
        self.xhat = x.mul_(self.r) if centre else x * self.r

    @classmethod
    def of(
        cls, x: Tensor, mean: Tensor, r: Tensor, dims: tuple[int, ...] = (-1,), *, fixed: bool = False
    ) -> Standardise:
        """Take mean and ``r`` from elsewhere; with ``fixed`` they are constants, and the map is affine."""
        self = cls.__new__(cls)
        self.dims, self.centre, self.fixed = dims, True, fixed
        self.r = r.to(x.dtype)
        self.xhat = (x - mean).mul_(self.r)
        return self

    def _mean(self, u: Tensor) -> Tensor:
        return u.mean(self.dims, keepdim=True)

    def _centred(self, u: Tensor) -> Tensor:
        return u - self._mean(u) if self.centre else u.clone()

    def jacobian(self, u: Tensor) -> Tensor:
        """Return ``J u`` for u ``[k, *view]``."""
        if self.fixed:
            return u * self.r
        return self._centred(u).addcmul_(self.xhat, self._mean(self.xhat * u), value=-1).mul_(self.r)

    def tangent(self, dx: Tensor) -> Tensor:
        """Return ``dxhat = J dx``; keep it and mean(xhat dx) for ``backward_tangent``."""
        if self.fixed:
            self.dxhat = dx * self.r
            return self.dxhat
        self.along = self._mean(self.xhat * dx)
        self.dxhat = self._centred(dx).addcmul_(self.xhat, self.along, value=-1).mul_(self.r)
        return self.dxhat

    def backward_tangent(self, du: Tensor, u: Tensor) -> Tensor:
        """Return ``J du + dJ u = J (du - r mean(xhat dx) u) - r (dxhat mean(xhat u) + xhat mean(dxhat u))``."""
        if self.fixed:
            return du * self.r
        result = self.jacobian(torch.addcmul(du, self.r * self.along, u, value=-1))
        result.addcmul_(self.dxhat, self.r * self._mean(self.xhat * u), value=-1)
        return result.addcmul_(self.xhat, self.r * self._mean(self.dxhat * u), value=-1)


class _Norm(Rule):
    """Affine normalisation: a view in which statistics run over ``core.dims``, and how weight and bias lie in it."""

    core: Standardise
    shape: torch.Size  # of x
    view: tuple[int, ...]  # of x inside the core
    weight: Tensor | None  # broadcastable against the view, or None
    weight_shape: tuple[int, ...]  # of the parameter
    weight_view: tuple[int, ...]  # of the parameter inside the core
    dtype: torch.dtype

    def _setup(self, x: Tensor, w: Tensor | None, b: Tensor | None, view: tuple[int, ...], at: tuple[int, ...]) -> None:
        self.shape, self.view, self.dtype = x.shape, view, x.dtype
        self.weight_view = at
        self.weight_shape = tuple(w.shape if w is not None else b.shape if b is not None else ())
        self.weight = None if w is None else self._wide(w.reshape(at))
        # the dimensions of [k, *view] over which a parameter is constant
        self.spread = [i + 1 for i, size in enumerate((1,) * (len(view) - len(at)) + at) if size == 1]

    def _wide(self, t: Tensor) -> Tensor:
        return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t

    def _in(self, d: Tensor) -> Tensor:
        return self._wide(d.reshape(d.shape[0], *self.view))

    def _out(self, d: Tensor) -> Tensor:
        return d.reshape(d.shape[0], *self.shape).to(self.dtype)

    def _affine(self, d: Tensor) -> Tensor:
        missing = len(self.view) - len(self.weight_view)
        return self._wide(d.reshape(d.shape[0], *([1] * missing), *self.weight_view))

    def _sum(self, t: Tensor) -> Tensor:
        return t.sum(self.spread).reshape(t.shape[0], *self.weight_shape).to(self.dtype)

    def tangent(self, dx: Tensor | None, dw: Tensor | None = None, db: Tensor | None = None, *_: None) -> Tensor:
        """Return ``dxhat w + xhat dw + db``."""
        self.dw = None if dw is None else self._affine(dw)
        self.moves = dx is not None
        terms: list[Tensor] = []
        if dx is not None:
            dxhat = self.core.tangent(self._in(dx))
            terms.append(dxhat if self.weight is None else dxhat * self.weight)
        if self.dw is not None:
            terms.append(self.core.xhat * self.dw)
        if db is not None:
            terms.append(self._affine(db).expand(db.shape[0], *self.view))
        y = sum(terms[1:], start=terms[0])
        return self._out(y)

    def backward(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``J (g w), sum g xhat, sum g``."""
        g = self._in(g)
        gx = gw = gb = None
        if self.needs[0]:
            gx = self._out(self.core.jacobian(g if self.weight is None else g * self.weight))
        if len(self.needs) > 1 and self.needs[1]:
            gw = self._sum(g * self.core.xhat)
        if len(self.needs) > 2 and self.needs[2]:
            gb = self._sum(g)
        return (gx, gw, gb, None, None)[: len(self.needs)]

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the tangents of all three."""
        dg, g = self._in(dg), self._in(g)
        dgx = dgw = dgb = None
        if self.needs[0]:
            u = g if self.weight is None else g * self.weight
            du = dg if self.weight is None else dg * self.weight
            if self.dw is not None:
                du = du.addcmul(g, self.dw)
            dgx = self._out(self.core.backward_tangent(du, u) if self.moves else self.core.jacobian(du))
        if len(self.needs) > 1 and self.needs[1]:
            inner = dg * self.core.xhat
            dgw = self._sum(inner.addcmul_(g, self.core.dxhat) if self.moves else inner)
        if len(self.needs) > 2 and self.needs[2]:
            dgb = self._sum(dg)
        return (dgx, dgw, dgb, None, None)[: len(self.needs)]

    def _result(self, b: Tensor | None) -> Tensor:
        y = self.core.xhat if self.weight is None else self.core.xhat * self.weight
        if b is not None:
            y = y + self._wide(b.reshape(self.weight_view))
        return y.reshape(self.shape).to(self.dtype)


@rule(aten.layer_norm.default)
class LayerNorm(_Norm):
    """Standardise over the trailing dimensions."""

    def forward(
        self, x: Tensor, normalized: list[int], w: Tensor | None, b: Tensor | None, eps: float = 1e-5, *_: Any
    ) -> Tensor:
        """Save xhat and 1 / sigma, from torch's own kernel."""
        size = 1
        for s in normalized:
            size *= s
        self._setup(x, w, b, (x.numel() // size, size), (size,))
        y, mean, r = aten.native_layer_norm.default(x, normalized, w, b, eps)
        self.core = Standardise.of(self._wide(x.reshape(self.view)), mean.reshape(-1, 1), r.reshape(-1, 1))
        self.spread = [1]
        self.primal = (x, normalized, mean, r, w, b)
        result: Tensor = y
        return result

    def backward(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """Torch's own kernel for one cotangent, the closed form for more."""
        if g.shape[0] != 1 or not all(self.needs):
            return super().backward(g)
        x, normalized, mean, r, w, b = self.primal
        parts = aten.native_layer_norm_backward.default(g[0], x, normalized, mean, r, w, b, list(self.needs))
        return tuple(part[None] for part in parts)


@rule(aten.rms_norm.default)
class RMSNorm(_Norm):
    """Divide by the root mean square over the trailing dimensions."""

    def forward(self, x: Tensor, normalized: list[int], w: Tensor | None = None, eps: float | None = None) -> Tensor:
        """Save xhat and 1 / rms."""
        size = 1
        for s in normalized:
            size *= s
        self._setup(x, w, None, (x.numel() // size, size), (size,))
        self.spread = [1]
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        self.core = Standardise(x.reshape(self.view), (-1,), eps, centre=False)
        return self._result(None)


@rule(aten.group_norm.default)
class GroupNorm(_Norm):
    """Standardise over each group of channels and all pixels."""

    def forward(
        self,
        x: Tensor,
        groups: int,
        w: Tensor | None = None,
        b: Tensor | None = None,
        eps: float = 1e-5,
        *_: Any,
    ) -> Tensor:
        """Save xhat and 1 / sigma, from torch's own kernel."""
        n, c = x.shape[:2]
        pixels = x[0, 0].numel()
        self._setup(x, w, b, (n, groups, c // groups, pixels), (groups, c // groups, 1))
        y, mean, r = aten.native_group_norm.default(x.contiguous(), w, b, n, c, pixels, groups, eps)
        shape = (n, groups, 1, 1)
        self.core = Standardise.of(
            self._wide(x.reshape(self.view)), mean.reshape(shape), r.reshape(shape), dims=(-2, -1)
        )
        result: Tensor = y
        return result


@rule(
    aten._native_batch_norm_legit_functional.default, aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_no_training.default, aten.instance_norm.default,
)  # fmt: skip
class BatchNorm(_Norm):
    """Standardise each channel over batch and pixels; with given statistics it is affine in x."""

    differentiable = (0,)

    def forward(self, x: Tensor, w: Tensor | None, b: Tensor | None, *rest: Any) -> Any:
        """Save xhat and 1 / sigma."""
        result = self.op(x, w, b, *rest)
        n, c = x.shape[:2]
        view = (n, c, x[0, 0].numel() if x.ndim > 2 else 1)
        self._setup(x, w, b, view, (c, 1))
        wide = self._wide(x.reshape(view))
        name = self.op._schema.name
        dims: tuple[int, ...]
        if name == "aten::instance_norm":
            mean, var, use_input, _, eps, _ = rest
            trained, dims = use_input, (-1,)
        elif self.op is aten._native_batch_norm_legit.no_stats:
            trained, _, eps = rest
            mean = var = None
            dims = (0, 2)
        elif name == "aten::_native_batch_norm_legit_no_training":
            mean, var, _, eps = rest
            trained, dims = False, (0, 2)
        else:
            mean, var, trained, _, eps = rest
            dims = (0, 2)
        self.fixed = not trained
        if trained:
            # with the leading k counted from the end: dims of [k, N, C, pixels]
            self.core = Standardise(wide, tuple(d - 3 if d >= 0 else d for d in dims), eps, centre=True)
        else:
            r = torch.rsqrt(self._wide(var) + eps).view(c, 1)
            self.core = Standardise.of(wide, self._wide(mean).view(c, 1), r, fixed=True)
        return result

    def backward_tangent(self, dg: Any, g: Any) -> tuple[Tensor | None, ...]:
        """Use the first output's cotangents."""
        return super().backward_tangent(_only(dg), _only(g))

    def backward(self, g: Any) -> tuple[Tensor | None, ...]:
        """Use the first output's cotangent."""
        results = super().backward(_only(g))
        return results + (None,) * (len(self.needs) - len(results))

    def tangent(self, *dargs: Tensor | None) -> Any:
        """Only the first output moves."""
        dx, dw, db = dargs[:3]
        y = super().tangent(dx, dw, db)
        outputs = len(self.op._schema.returns)
        return y if outputs == 1 else (y, *[None] * (outputs - 1))


def _only(g: Any) -> Tensor:
    return g[0] if isinstance(g, tuple) else g
