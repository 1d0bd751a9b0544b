"""Binary pointwise ops with broadcasting: sums, products, quotients, selections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .rule import LinearInArgs, Rule, align, reduce_to, rule

aten = torch.ops.aten


def _shape(x: Any) -> torch.Size:
    return x.shape if isinstance(x, Tensor) else torch.Size()


def _grow(d: Tensor, shape: torch.Size) -> Tensor:
    """Expand a tangent ``[k, *arg]`` to ``[k, *shape]``, ``shape`` the broadcast one."""
    d = align(d, len(shape))
    return d if d.shape[1:] == shape else d.expand(d.shape[0], *shape)


@rule(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar, aten.rsub.Tensor)
class Add(LinearInArgs):
    """``y = a + alpha b`` and its kin: ``c0 a + c1 b``."""

    def forward(self, a: Tensor, b: Any, alpha: Any = 1) -> Tensor:
        """Save shapes and coefficients."""
        name = self.op._schema.name
        self.coefficients = {"aten::add": (1, alpha), "aten::sub": (1, -alpha), "aten::rsub": (-alpha, 1)}[name]
        self.shapes = (_shape(a), _shape(b))
        y: Tensor = self.op(a, b, alpha=alpha) if self.op._overloadname == "Tensor" else self.op(a, b, alpha)
        self.shape = y.shape
        return y

    def tangent(self, *dargs: Tensor | None) -> Tensor:
        """Return ``c0 da + c1 db``."""
        terms = [
            (_grow(d, self.shape), c) for d, c in zip(dargs, self.coefficients, strict=False) if d is not None
        ]
        if len(terms) == 1:
            d, c = terms[0]
            return d if c == 1 else d * c
        (da, ca), (db, cb) = terms
        return torch.add(da if ca == 1 else da * ca, db, alpha=cb)

    def backward(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``c0 g, c1 g``, summed over broadcast dimensions."""
        return tuple(
            reduce_to(g if c == 1 else g * c, shape) if need else None
            for need, c, shape in zip(self.needs, self.coefficients, self.shapes, strict=False)
        )


@rule(aten.mul.Tensor, aten.mul.Scalar)
class Mul(Rule):
    """``y = a b``."""

    def forward(self, a: Tensor, b: Any) -> Tensor:
        """Save both factors."""
        self.a, self.b = a, b
        y: Tensor = self.op(a, b)
        self.shape = y.shape
        return y

    def tangent(self, da: Tensor | None, db: Tensor | None = None) -> Tensor:
        """Return ``da b + a db``."""
        n = len(self.shape)
        self.da = None if da is None else align(da, n)
        self.db = None if db is None else align(db, n)
        if self.da is None:
            return self.a * self.db  # type: ignore[no-any-return]
        return self.da * self.b if self.db is None else torch.addcmul(self.da * self.b, self.db, self.a)

    def backward(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``g b, g a``."""
        return self._shrink(
            g * self.b if self.needs[0] else None, g * self.a if len(self.needs) > 1 and self.needs[1] else None
        )

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``dg b + g db, dg a + g da``."""
        dga = dgb = None
        if self.needs[0]:
            dga = dg * self.b if self.db is None else (dg * self.b).addcmul(g, self.db)
        if len(self.needs) > 1 and self.needs[1]:
            dgb = dg * self.a if self.da is None else (dg * self.a).addcmul(g, self.da)
        return self._shrink(dga, dgb)

    def _shrink(self, ga: Tensor | None, gb: Tensor | None) -> tuple[Tensor | None, ...]:
        ga = None if ga is None else reduce_to(ga, self.a.shape)
        gb = None if gb is None else reduce_to(gb, self.b.shape)
        return (ga, gb)[: len(self.needs)]


@rule(aten.div.Tensor, aten.div.Scalar)
class Div(Rule):
    """``y = a / b``: da' = da / b, and b enters through q = 1 / b."""

    def forward(self, a: Tensor, b: Any) -> Tensor:
        """Save the quotient and 1 / b."""
        y: Tensor = self.op(a, b)
        self.shapes = (_shape(a), _shape(b))
        self.y, self.q = y, 1 / b
        return y

    def tangent(self, da: Tensor | None, db: Tensor | None = None) -> Tensor:
        """Return ``(da - y db) q``."""
        n = self.y.ndim
        self.db = None if db is None else align(db, n)
        top = None if da is None else align(da, n)
        if self.db is not None:
            top = -self.y * self.db if top is None else torch.addcmul(top, self.y, self.db, value=-1)
        assert top is not None
        self.dy = top * self.q
        return self.dy

    def backward(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``g q, -g q y``."""
        ga = g * self.q
        gb = -ga * self.y if len(self.needs) > 1 and self.needs[1] else None
        return self._shrink(ga if self.needs[0] else None, gb)

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate both: dq = -q^2 db."""
        dga = dg * self.q
        if self.db is not None:
            dga = dga - g * (self.q * self.q) * self.db
        dgb = None
        if len(self.needs) > 1 and self.needs[1]:
            dgb = -(dga * self.y + g * self.q * self.dy)
        return self._shrink(dga if self.needs[0] else None, dgb)

    def _shrink(self, ga: Tensor | None, gb: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = zip((ga, gb), self.shapes, strict=True)
        return tuple(None if g is None else reduce_to(g, shape) for g, shape in pairs)[: len(self.needs)]


class Select(LinearInArgs):
    """An op that takes each entry of its result from one of several arguments: a mask for each, fixed by the primal."""

    masks: list[Tensor | None]
    shapes: list[torch.Size]
    shape: torch.Size

    def tangent(self, *dargs: Tensor | None) -> Tensor:
        """Sum the masked tangents."""
        y: Tensor | None = None
        for d, mask in zip(dargs, self.masks, strict=True):
            if d is not None and mask is not None:
                term = align(d, len(self.shape)) * mask
                y = term if y is None else y + term
        assert y is not None
        return y.expand(y.shape[0], *self.shape)

    def backward(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """Mask the cotangent."""
        return tuple(
            reduce_to(g * mask, shape) if need and mask is not None else None
            for need, mask, shape in zip(self.needs, self.masks, self.shapes, strict=True)
        )


@rule(aten.where.self, aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf)
class Where(Select):
    """``y = condition ? a : b``."""

    def forward(self, condition: Tensor, a: Any, b: Any) -> Tensor:
        """Save the condition as a mask."""
        y: Tensor = self.op(condition, a, b)
        mask = condition.to(y.dtype)
        every: list[tuple[Tensor | None, Any]] = [(None, condition), (mask, a), (1 - mask, b)]
        kept = [(m, x) for (m, x), a_ in zip(every, self.op._schema.arguments, strict=True) if "Tensor" in str(a_.type)]
        self.masks, self.shapes = [m for m, _ in kept], [_shape(x) for _, x in kept]
        self.shape = y.shape
        return y


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
class MaskedFill(Select):
    """``y = mask ? value : x``."""

    def forward(self, x: Tensor, mask: Tensor, value: Any) -> Tensor:
        """Save the mask."""
        y: Tensor = self.op(x, mask, value)
        chosen = mask.to(y.dtype)
        self.masks, self.shapes = [1 - chosen, None], [x.shape, mask.shape]
        if self.op is aten.masked_fill.Tensor:
            self.masks, self.shapes = [*self.masks, chosen], [*self.shapes, _shape(value)]
        self.shape = y.shape
        return y


@rule(aten.maximum.default, aten.minimum.default)
class Extreme(Select):
    """``y = max(a, b)`` or min; a tie goes half to each, as in torch."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Save who won."""
        y: Tensor = self.op(a, b)
        first = a > b if self.op is aten.maximum.default else a < b
        mask = torch.where(a == b, 0.5, first.to(y.dtype)).to(y.dtype)
        self.masks, self.shapes, self.shape = [mask, 1 - mask], [a.shape, b.shape], y.shape
        return y


@rule(aten.clamp.Tensor, aten.clamp_min.default, aten.clamp_max.default)
class Clamp(Select):
    """``y = min(max(x, low), high)``; x passes where it lies within the bounds, ends included."""

    def forward(self, x: Tensor, *bounds: Any) -> Tensor:
        """Save where x and where a bound was taken."""
        y: Tensor = self.op(x, *bounds)
        named = dict(zip((a.name for a in self.op._schema.arguments[1:]), bounds, strict=True))
        low, high = named.get("min"), named.get("max")
        below = torch.zeros_like(y, dtype=torch.bool) if low is None else x < low
        above = torch.zeros_like(y, dtype=torch.bool) if high is None else x > high
        if low is not None and high is not None:
            below, above = below & ~(torch.as_tensor(low) >= high), above | (torch.as_tensor(low) >= high)
        masks = [(~(below | above)).to(y.dtype), below.to(y.dtype), above.to(y.dtype)]
        sources = [x, low, high]
        count = len(self.needs)
        self.masks, self.shapes = list(masks[:count]), [_shape(s) for s in sources[:count]]
        self.shape = y.shape
        return y


@rule(aten.copy.default)
class Copy(LinearInArgs):
    """``y = b`` in the shape and dtype of a: what an in-place copy becomes."""

    def forward(self, a: Tensor, b: Tensor, *_: Any) -> Tensor:
        """Save shapes."""
        self.shape, self.dtype, self.b_shape, self.b_dtype = a.shape, a.dtype, b.shape, b.dtype
        return b.to(a.dtype).expand(a.shape)

    def tangent(self, da: Tensor | None, db: Tensor | None) -> Tensor:
        """Return db, broadcast; what a held is gone."""
        if db is None:
            assert da is not None
            return torch.zeros_like(da)
        return _grow(db.to(self.dtype), self.shape)

    def backward(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """Give everything to b."""
        ga = torch.zeros_like(g) if self.needs[0] else None
        return ga, reduce_to(g, self.b_shape).to(self.b_dtype) if self.needs[1] else None


@rule(aten.lift_fresh_copy.default, aten.alias.default, aten.clone.default, aten._to_copy.default, aten.contiguous.default)
class Cast(LinearInArgs):
    """The same values, perhaps in another dtype."""

    def forward(self, x: Tensor, *options: Any) -> Tensor:
        """Save both dtypes."""
        names = [a.name for a in self.op._schema.arguments[1:]]
        y: Tensor = self.op(x, **{n: o for n, o in zip(names, options, strict=True) if o is not None})
        self.before, self.after = x.dtype, y.dtype
        return y

    def tangent(self, dx: Tensor) -> Tensor:
        """Cast forward."""
        return dx.to(self.after)

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Cast back."""
        return (g.to(self.before),)
