"""Binary pointwise ops with broadcasting (sums, products, quotients, powers), copies and casts.

y = f(a, b):   dy = fa da + fb db     ga = fa g     d(ga) = fa dg + (faa da + fab db) g     and so for b
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..rule import LinearInArgs, Rule, Selective, align, reduce_to, rule

aten = torch.ops.aten


class Kind(NamedTuple):
    """Shape and dtype of an argument; its cotangents get the same."""

    shape: torch.Size
    dtype: torch.dtype | None

    @classmethod
    def of(cls, x: Any) -> Kind:
        """Read them off a tensor; a number has neither."""
        # ``to(None)`` changes nothing, so that numbers need no case of their own.
        return cls(x.shape, x.dtype) if isinstance(x, Tensor) else cls(torch.Size(), None)

    def tangent(self, d: Tensor) -> Tensor:
        """Expand and cast an argument's tangent to that of a result of this kind."""
        # The cast is no formality: a 0-d argument does not promote its partner, but its tangent, ``[k]``, does.
        d = align(d, len(self.shape)).to(self.dtype)
        # Expanded without a copy: the next rule reads it, and none writes into what it is given.
        return d if d.shape[1:] == self.shape else d.expand(d.shape[0], *self.shape)

    def cotangent(self, g: Tensor | None) -> Tensor | None:
        """Sum and cast a result's cotangent to that of an argument of this kind."""
        return None if g is None else reduce_to(g, self.shape).to(self.dtype)


@rule(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar, aten.rsub.Tensor)
class Add(Selective, LinearInArgs):
    """``y = a + alpha b`` and its kin: ``c0 a + c1 b``."""

    def forward(self, a: Tensor, b: Any, alpha: Any = 1) -> Tensor:
        """Save kinds and coefficients."""
        # rsub is b - alpha a: the first argument has the factor.
        by_name = {"aten::add": (1, alpha), "aten::sub": (1, -alpha), "aten::rsub": (-alpha, 1)}
        self.coefficients = by_name[self.op._schema.name]
        self.kinds = (Kind.of(a), Kind.of(b))
        y: Tensor = self.op(a, b, alpha=alpha) if self.op._overloadname == "Tensor" else self.op(a, b, alpha)
        self.kind = Kind.of(y)
        return y

    def tangent(self, *dargs: Tensor | None) -> Tensor:
        """Return ``c0 da + c1 db``."""
        # Not strict: the overloads with a number have one tensor argument.
        pairs = zip(dargs, self.coefficients, strict=False)
        terms = [(self.kind.tangent(d), c) for d, c in pairs if d is not None]
        d, c = terms[0]
        # A pass less in the common case; and no sum in place, since d may be the argument's own tangent.
        d = d if c == 1 else d * c
        return d if len(terms) == 1 else torch.add(d, terms[1][0], alpha=terms[1][1])

    def backward(self, g: Tensor, wanted: tuple[Any, ...] | None = None) -> tuple[Tensor | None, ...]:
        """Return ``c0 g, c1 g``, summed over broadcast dimensions."""
        return tuple(
            kind.cotangent(g if c == 1 else g * c) if need else None
            for need, c, kind in zip(wanted or self.needs, self.coefficients, self.kinds, strict=False)
        )


class Binary(Rule):
    """What products, quotients and powers share: kinds, and which arguments need a cotangent."""

    def _start(self, a: Any, b: Any, y: Tensor) -> Tensor:
        self.kinds, self.kind = (Kind.of(a), Kind.of(b)), Kind.of(y)
        # Overloads with a number have one entry in ``needs``.
        self.wants = (*self.needs, False)[:2]
        return y

    def _align(self, da: Tensor | None, db: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        n = len(self.kind.shape)
        return None if da is None else align(da, n), None if db is None else align(db, n)

    def _shrink(self, ga: Tensor | None, gb: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = zip((ga, gb), self.kinds, strict=True)
        # As many results as there are tensor arguments.
        return tuple(kind.cotangent(g) for g, kind in pairs)[: len(self.needs)]


@rule(aten.mul.Tensor, aten.mul.Scalar)
class Mul(Binary):
    """``y = a b``."""

    freed_after_reverse = ("da", "db")

    def forward(self, a: Tensor, b: Any) -> Tensor:
        """Save both factors."""
        self.a, self.b = a, b
        return self._start(a, b, self.op(a, b))

    def tangent(self, da: Tensor | None, db: Tensor | None = None) -> Tensor:
        """Return ``da b + a db``."""
        self.da, self.db = self._align(da, db)
        if self.da is None:
            assert self.db is not None
            y: Tensor = self.a * self.db
        else:
            y = self.da * self.b
            if self.db is not None:
                # In place: the product above is fresh, and broadcast to the shape of the result.
                y.addcmul_(self.db, self.a)
        # A 0-d factor in float64 leaves a float32 product float32, but its tangent has a dimension and promotes.
        return y.to(self.kind.dtype)

    def backward(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``g b, g a``."""
        return self._shrink(g * self.b if self.wants[0] else None, g * self.a if self.wants[1] else None)

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``dg b + g db, dg a + g da``."""
        dga = dgb = None
        if self.wants[0]:
            dga = dg * self.b
            if self.db is not None:
                # g has k = 1, and is broadcast.
                dga.addcmul_(g, self.db)
        if self.wants[1]:
            dgb = dg * self.a
            if self.da is not None:
                dgb.addcmul_(g, self.da)
        return self._shrink(dga, dgb)


@rule(aten.div.Tensor, aten.div.Scalar)
class Div(Binary):
    """``y = a / b``, with q = 1 / b: ``dy = (da - y db) q``, ``ga = g q``, ``gb = -g q y``, ``dq = -q q db``."""

    freed_after_reverse = ("dy", "db")

    def forward(self, a: Tensor, b: Any) -> Tensor:
        """Save the quotient and 1 / b."""
        self.y: Tensor = self.op(a, b)
        # One division per parameter value: all sweeps multiply. y is kept instead of a, since a q = y.
        self.q = torch.reciprocal(b.to(self.y.dtype)) if isinstance(b, Tensor) else 1 / b
        return self._start(a, b, self.y)

    def tangent(self, da: Tensor | None, db: Tensor | None = None) -> Tensor:
        """Return ``(da - y db) q``."""
        top, self.db = self._align(da, db)
        if self.db is not None:
            step = self.y * self.db
            # ``step`` is fresh and may be negated in place; ``top`` may be the argument's own tangent.
            top = step.neg_() if top is None else top - step
        assert top is not None
        self.dy = (top * self.q).to(self.kind.dtype)
        return self.dy

    def backward(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``g q, -g q y``."""
        ga = g * self.q
        return self._shrink(ga if self.wants[0] else None, -ga * self.y if self.wants[1] else None)

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``dg q - g q q db`` and ``-(d(ga) y + ga dy)``."""
        dga = dg * self.q
        if self.db is not None:
            # d(g q) = dg q - g q (q db)
            dga.addcmul_(g * self.q, self.q * self.db, value=-1)
        dgb = None
        if self.wants[1]:
            # gb = -ga y, so d(gb) = -(dga y + ga dy).
            dgb = -(dga * self.y).addcmul_(g * self.q, self.dy)
        return self._shrink(dga if self.wants[0] else None, dgb)


@rule(aten.pow.Tensor_Tensor, aten.atan2.default)
class Smooth(Binary):
    """``y = f(a, b)`` from its partial derivatives."""

    freed_after_reverse = ("dargs",)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Save arguments and result."""
        y = self._start(a, b, self.op(a, b))
        self.first, self.second = (_power if self.op is aten.pow.Tensor_Tensor else _angle)(a, b, y)
        return y

    def tangent(self, da: Tensor | None, db: Tensor | None) -> Tensor:
        """Return ``fa da + fb db``."""
        self.dargs = self._align(da, db)
        return self._sum(self.first, self.dargs).to(self.kind.dtype)

    def _sum(self, factors: tuple[Tensor, ...], dargs: tuple[Tensor | None, ...]) -> Tensor:
        terms = [f * d for f, d in zip(factors, dargs, strict=True) if d is not None]
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]

    def backward(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``fa g, fb g``."""
        return self._shrink(*(f * g if want else None for f, want in zip(self.first, self.wants, strict=True)))

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``fa dg + (faa da + fab db) g`` and so for b."""
        faa, fab, fbb = self.second
        rows = zip(self.first, ((faa, fab), (fab, fbb)), self.wants, strict=True)
        return self._shrink(*(f * dg + self._sum(row, self.dargs) * g if want else None for f, row, want in rows))


def _power(a: Tensor, b: Tensor, y: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    # At a = 0 the closed forms meet 0 times infinity. Derivatives that torch calls zero are masked, not multiplied.
    log = torch.log(a).masked_fill_(a == 0, 0)  # 0 ** b stays 0 as b moves
    da = (a ** (b - 1)).masked_fill_(b == 0, 0)
    daa = (a ** (b - 2)).masked_fill_((b == 0) | (b == 1), 0)
    return (b * da, y * log), (b * (b - 1) * daa, a ** (b - 1) * (1 + b * log), y * log * log)


def _angle(a: Tensor, b: Tensor, _: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    square = a * a + b * b
    mixed = 2 * a * b / (square * square)
    return (b / square, -a / square), (-mixed, (a * a - b * b) / (square * square), mixed)


@rule(aten.copy.default)
class Copy(LinearInArgs):
    """``y = b`` in the shape and dtype of a: what an in-place copy becomes."""

    def forward(self, a: Tensor, b: Tensor, *_: Any) -> Tensor:
        """Save shapes and dtypes: values do not matter to a copy."""
        self.kind, self.b_kind = Kind.of(a), Kind.of(b)
        return b.to(a.dtype).expand(a.shape)

    def tangent(self, da: Tensor | None, db: Tensor | None) -> Tensor:
        """Return db, broadcast; what a held is gone."""
        if db is None:
            assert da is not None
            return torch.zeros_like(da)
        return self.kind.tangent(db)

    def backward(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """Give everything to b."""
        # Zeros and not None: the step that made a is live, and its rule needs a cotangent.
        ga = torch.zeros_like(g) if self.needs[0] else None
        return ga, self.b_kind.cotangent(g) if self.needs[1] else None


@rule(
    aten.lift_fresh_copy.default, aten.alias.default, aten.clone.default, aten._to_copy.default,
    aten.contiguous.default,
)  # fmt: skip
class Cast(LinearInArgs):
    """The same values, perhaps in another dtype or on another device."""

    def forward(self, x: Tensor, *options: Any) -> Tensor:
        """Save dtypes and devices."""
        names = [a.name for a in self.op._schema.arguments[1:]]
        y: Tensor = self.op(x, **{n: o for n, o in zip(names, options, strict=True) if o is not None})
        self.before, self.after = (x.device, x.dtype), (y.device, y.dtype)
        return y

    def tangent(self, dx: Tensor) -> Tensor:
        """Return dx in the dtype and on the device of the result."""
        return dx.to(*self.after)

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Return g in the dtype and on the device of x."""
        return (g.to(*self.before),)
