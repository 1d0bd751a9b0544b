"""Reductions: sum, mean, variance, norm, logsumexp, extremes; running sums; values picked by sorting."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..rule import LinearInArgs, Op, Rule, rule

aten = torch.ops.aten


def _named(op: Op, options: tuple[Any, ...]) -> dict[str, Any]:
    """Name an op's arguments after the first."""
    return dict(zip((a.name for a in op._schema.arguments[1:]), options, strict=True))


class Reduction(Rule):
    """Some dimensions go; a 0-d argument is treated as ``[1]``."""

    def _start(self, x: Tensor, dim: Any, keepdim: bool) -> Tensor:
        """Normalise the dimensions (None and [] mean all) and return x with at least one."""
        self.shape, self.scalar, self.keep = x.shape, x.ndim == 0, keepdim
        # With one dimension, every formula below has one to reduce over.
        x = x.reshape(1) if self.scalar else x
        dims = list(dim) if isinstance(dim, list | tuple) else [] if dim is None else [dim]
        self.dims = sorted(d % x.ndim for d in dims) if dims else list(range(x.ndim))
        self.dims_after_k = [d + 1 for d in self.dims]
        self.count = math.prod(x.shape[d] for d in self.dims)
        return x

    def _primal(self, y: Tensor) -> Tensor:
        """Drop the dimensions of size 1 that were kept."""
        # Reduced with dimensions kept, so that what is saved broadcasts against x.
        return y.reshape(()) if self.scalar else y if self.keep else y.squeeze(self.dims)

    def _tangent(self, dy: Tensor) -> Tensor:
        return dy.reshape(-1) if self.scalar else dy if self.keep else dy.squeeze(self.dims_after_k)

    def _restore(self, g: Tensor) -> Tensor:
        """Give a cotangent the dropped dimensions back, or a scalar's tangent its one dimension."""
        if self.scalar:
            return g.reshape(-1, 1)
        if not self.keep:
            # Ascending, so that each dimension comes to its final place at once.
            for d in self.dims_after_k:
                g = g.unsqueeze(d)
        return g

    def _enter(self, d: Tensor) -> Tensor:
        return d.reshape(-1, 1) if self.scalar else d

    def _leave(self, g: Tensor) -> Tensor:
        return g.reshape(-1) if self.scalar else g


@rule(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim)
class Sum(Reduction, LinearInArgs):
    """Sum or mean over dimensions."""

    def forward(self, x: Tensor, *options: Any) -> Tensor:
        """Save the shape and which dimensions go."""
        named = _named(self.op, options)
        self.before = x.dtype
        self.is_mean = self.op._schema.name == "aten::mean"
        x = self._start(x, named.get("dim"), bool(named.get("keepdim", False)))
        y = self._reduced(x, self.dims, True, named.get("dtype"))
        self.after = y.dtype
        return self._primal(y)

    def _reduced(self, x: Tensor, dims: list[int], keep: bool, dtype: torch.dtype | None) -> Tensor:
        # Torch's own mean and not a scaled sum: in float16 the sum of a large tensor is infinite, its mean is not.
        return (torch.mean if self.is_mean else torch.sum)(x, dims, keepdim=keep, dtype=dtype)

    def tangent(self, dx: Tensor) -> Tensor:
        """Return the sum or mean of dx."""
        keep = self.keep and not self.scalar
        # In the dtype of the result: the op may have been told to add up in a wider one.
        return self._reduced(self._enter(dx), self.dims_after_k, keep, self.after)

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Return g at every entry that was added up, divided by their number for a mean."""
        g = (g / self.count if self.is_mean else g).to(self.before)
        # Expanded: a sum's cotangent is never written out.
        return (self._leave(self._restore(g)).expand(g.shape[0], *self.shape),)


@rule(aten.var.correction, aten.var_mean.correction)
class Variance(Reduction):
    """``y = sum (x - m)^2 / d``: with c = 2 (x - m) / d, ``dy = <c, dx>``, ``d(gx) = c dg + g 2 (dx - dm) / d``."""

    freed_after_reverse = ("dcentred",)

    def forward(self, x: Tensor, dim: Any = None, correction: Any = None, keepdim: bool = False) -> Any:
        """Save the centred x."""
        x = self._start(x, dim, keepdim)
        correction = 1 if correction is None else correction
        # NaN where torch's variance is NaN: too few numbers for the correction.
        self.scale = 2 / (self.count - correction) if self.count > correction else math.nan
        var, mean = torch.var_mean(x, self.dims, correction=correction, keepdim=True)
        # The slope c. m needs no term of its own, since centred numbers sum to zero: <c, dx - dm> = <c, dx>.
        self.centred = (x - mean).mul_(self.scale)
        self.both = self.op is aten.var_mean.correction
        return (self._primal(var), self._primal(mean)) if self.both else self._primal(var)

    def tangent(self, dx: Tensor) -> Any:
        """Return ``<c, dx>``, and the mean of dx."""
        dx = self._enter(dx)
        dmean = dx.mean(self.dims_after_k, keepdim=True)
        self.dcentred = (dx - dmean).mul_(self.scale)
        dvar = self._tangent((self.centred * dx).sum(self.dims_after_k, keepdim=True))
        return (dvar, self._tangent(dmean)) if self.both else dvar

    def _combine(self, terms: list[tuple[Tensor, Tensor]], gmean: Tensor | None, k: int) -> tuple[Tensor]:
        gx: Tensor | None = None
        for c, g in terms:
            # The first product is fresh, so the second adds onto it.
            gx = c * self._restore(g) if gx is None else gx.addcmul_(c, self._restore(g))
        if gmean is not None:
            spread = self._restore(gmean) / self.count
            gx = spread.expand(k, *self.centred.shape) if gx is None else gx.add_(spread)
        assert gx is not None
        return (self._leave(gx),)

    def backward(self, g: Any) -> tuple[Tensor]:
        """Return ``c g``, and the spread cotangent of the mean."""
        gvar, gmean = g if self.both else (g, None)
        k = next(part for part in (gvar, gmean) if part is not None).shape[0]
        return self._combine([] if gvar is None else [(self.centred, gvar)], gmean, k)

    def backward_tangent(self, dg: Any, g: Any) -> tuple[Tensor]:
        """Return ``c dg + dc g``, and the spread cotangent of the mean."""
        dgvar, dgmean = dg if self.both else (dg, None)
        gvar = g[0] if self.both else g
        terms = [] if dgvar is None else [(self.centred, dgvar)]
        if gvar is not None:
            terms.append((self.dcentred, gvar))
        return self._combine(terms, dgmean, self.dcentred.shape[0])


@rule(aten.linalg_vector_norm.default)
class Norm(Reduction):
    """``y = |x|_2``: with u = x / y, ``dy = <u, dx>``, ``d(gx) = u dg + g (dx - u dy) / y``; 0 where y = 0."""

    freed_after_reverse = ("dunit",)

    @classmethod
    def for_(cls, template: list[Any]) -> type[Rule] | None:
        """Serve the orders 2, 1, 0 and the infinities; others, and norms in another dtype, go to the fallback."""
        order, dtype = template[1], template[4]
        if dtype is not None:
            return None
        return cls if order == 2 else PiecewiseLinearNorm if order in (0, 1, math.inf, -math.inf) else None

    def forward(self, x: Tensor, order: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
        """Save ``u = x / y`` and ``1 / y``."""
        x = self._start(x, dim, keepdim)
        y = torch.linalg.vector_norm(x, 2, self.dims, keepdim=True)
        # At y = 0 the norm has a kink: torch takes the derivative zero there, and 1 / y would make it NaN.
        self.inverse = torch.reciprocal(y).masked_fill_(y == 0, 0)
        self.unit = x * self.inverse
        return self._primal(y)

    def tangent(self, dx: Tensor) -> Tensor:
        """Return ``<u, dx>``."""
        dx = self._enter(dx)
        dy = (self.unit * dx).sum(self.dims_after_k, keepdim=True)
        # du = (dx - u <u, dx>) / y: what is left of dx across u.
        self.dunit = torch.addcmul(dx, self.unit, dy, value=-1).mul_(self.inverse)
        return self._tangent(dy)

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Return ``u g``."""
        return (self._leave(self.unit * self._restore(g)),)

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor]:
        """Return ``u dg + g (dx - u dy) / y``."""
        return (self._leave((self.unit * self._restore(dg)).addcmul_(self.dunit, self._restore(g))),)


class _Weighted(Reduction, LinearInArgs):
    """``dy = <share, dx>`` with a share that the primal fixes."""

    share: Tensor

    def tangent(self, dx: Tensor) -> Tensor:
        return self._tangent((self.share * self._enter(dx)).sum(self.dims_after_k, keepdim=True))

    def backward(self, g: Tensor) -> tuple[Tensor]:
        return (self._leave(self.share * self._restore(g)),)


class PiecewiseLinearNorm(_Weighted):
    """``sum |x|``, ``max |x|``, ``min |x|``, or how many are not zero: the slope is a sign, ties share it evenly."""

    def forward(self, x: Tensor, order: float, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
        """Save each entry's share of the slope."""
        x = self._start(x, dim, keepdim)
        y = torch.linalg.vector_norm(x, order, self.dims, keepdim=True)
        # How many entries are not zero is constant wherever it has a derivative.
        self.share = torch.sign(x) if order else torch.zeros_like(x)
        if math.isinf(order):
            # Exactly equal, for y is one of these numbers.
            hit = (x.abs() == y).to(x.dtype)
            self.share.mul_(hit).div_(hit.sum(self.dims, keepdim=True))
        return self._primal(y)


@rule(aten.logsumexp.default)
class LogSumExp(Reduction):
    """``y = log sum exp(x)``: with p = softmax(x), ``dy = <p, dx>``, ``d(gx) = p (dg + g (dx - dy))``."""

    freed_after_reverse = ("dcentred",)

    def forward(self, x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
        """Save the softmax."""
        x = self._start(x, dim, keepdim)
        y = torch.logsumexp(x, self.dims, keepdim=True)
        # Nothing overflows, since y is at least the maximum.
        self.p = torch.exp(x - y)
        return self._primal(y)

    def tangent(self, dx: Tensor) -> Tensor:
        """Return ``<p, dx>``."""
        dx = self._enter(dx)
        dy = (self.p * dx).sum(self.dims_after_k, keepdim=True)
        self.dcentred = dx - dy
        return self._tangent(dy)

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Return ``p g``."""
        return (self._leave(self.p * self._restore(g)),)

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor]:
        """Return ``p (dg + g (dx - dy))``."""
        return (self._leave(self.p * torch.addcmul(self._restore(dg), self._restore(g), self.dcentred)),)


@rule(aten.amax.default, aten.amin.default, aten.max.default, aten.min.default)
class Extremum(_Weighted):
    """Maximum or minimum over dimensions; a tie is shared evenly, as in torch."""

    def forward(self, x: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
        """Save each entry's share."""
        x = self._start(x, dim, keepdim)
        reduce = torch.amax if self.op._schema.name in ("aten::amax", "aten::max") else torch.amin
        y = reduce(x, self.dims, keepdim=True)
        hit = (x == y).to(x.dtype)
        self.share = hit / hit.sum(self.dims, keepdim=True)
        return self._primal(y)


@rule(
    aten.max.dim, aten.min.dim, aten.median.dim, aten.kthvalue.default, aten.topk.default, aten.sort.default,
    aten.sort.stable, aten.cummax.default, aten.cummin.default,
)  # fmt: skip
class Ranked(LinearInArgs):
    """Values and their indices along a dimension, by rank: the values are gathered, as in torch."""

    differentiable = (0,)

    def forward(self, x: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        """Save the indices."""
        named = _named(self.op, options)
        values, indices = self.op(x, **named)
        self.dim = named.get("dim", -1) % max(1, x.ndim)
        # A result without the dimension gets it back, so that one ``gather`` serves all these ops.
        self.dropped = x.ndim > 0 and values.ndim < x.ndim
        self.shape, self.index = x.shape, indices.unsqueeze(self.dim) if self.dropped else indices
        return values, indices

    def tangent(self, dx: Tensor) -> tuple[Tensor, None]:
        """Return the entries of dx at the indices; the indices have no tangent."""
        if not self.shape:
            return dx, None
        d = self.dim + 1
        y = dx.gather(d, self.index.expand(dx.shape[0], *self.index.shape))
        return y.squeeze(d) if self.dropped else y, None

    def backward(self, g: tuple[Tensor, None]) -> tuple[Tensor]:
        """Add up by index."""
        values = g[0]
        if not self.shape:
            return (values,)
        d = self.dim + 1
        values = values.unsqueeze(d) if self.dropped else values
        gx = values.new_zeros(values.shape[0], *self.shape)
        # Added, for a running maximum takes one entry many times.
        return (gx.scatter_add_(d, self.index.expand(values.shape), values),)


@rule(aten.cumsum.default)
class CumSum(LinearInArgs):
    """Running sum along a dimension."""

    def forward(self, x: Tensor, dim: int, dtype: Any = None) -> Tensor:
        """Save the dimension."""
        self.scalar, self.before = x.ndim == 0, x.dtype
        self.dim_after_k = 1 if self.scalar else dim % x.ndim + 1
        y = torch.cumsum(x, dim, dtype=dtype)
        self.after = y.dtype
        return y

    def tangent(self, dx: Tensor) -> Tensor:
        """Running sum of the tangent."""
        # The cast first, as in the primal: the sum is to be in the wider dtype that was asked for.
        dx = dx.to(self.after)
        return dx if self.scalar else torch.cumsum(dx, self.dim_after_k)

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Running sum from the other end."""
        if not self.scalar:
            g = g.flip(self.dim_after_k).cumsum(self.dim_after_k).flip(self.dim_after_k)
        return (g.to(self.before),)
