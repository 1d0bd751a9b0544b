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
