"""``check_rule``: rules that keep the contract pass, and each way of breaking it is caught and named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sharpkern.rop.conformance import check_rule
from sharpkern.rop.rule import Rule, Selective
from sharpkern.rop.rules.arithmetic import Add, Mul
from sharpkern.rop.rules.conv import Convolution
from sharpkern.rop.rules.linear import AddMM, Linear, MatMul
from sharpkern.rop.rules.norm import LayerNorm
from sharpkern.rop.rules.pointwise import Activation, Unary
from sharpkern.rop.rules.softmax import Softmax
from sharpkern.rop.rules.views import Cat, Permute

aten = torch.ops.aten


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


GOOD: list[tuple[type[Rule], Any, Any]] = [
    (Add, aten.add.Tensor, lambda: (random(3, 4), random(4), 2)),
    (Mul, aten.mul.Tensor, lambda: (random(3, 4), random(3, 1))),
    (Linear, aten.linear.default, lambda: (random(2, 3, 4), random(5, 4), random(5))),
    (MatMul, aten.mm.default, lambda: (random(3, 4), random(4, 2))),
    (AddMM, aten.addmm.default, lambda: (random(2), random(3, 4), random(4, 2))),
    (Convolution, aten.conv1d.default, lambda: (random(2, 3, 6), random(4, 3, 2), random(4), [1], [0], [1], 1)),
    (LayerNorm, aten.layer_norm.default, lambda: (random(3, 4), [4], random(4), random(4))),
    (Softmax, aten.softmax.int, lambda: (random(3, 4), 1)),
    (Unary, aten.sin.default, lambda: (random(3, 4),)),
    (Activation, aten.tanh.default, lambda: (random(3, 4),)),
    (Cat, aten.cat.default, lambda: ([random(3, 4), random(2, 4)], 0)),
    (Permute, aten.permute.default, lambda: (random(2, 3, 4), [2, 0, 1])),
]


@pytest.mark.parametrize(("cls", "op", "args"), GOOD, ids=[cls.__name__ for cls, _, _ in GOOD])
def test_rules_keep_the_contract(cls: type[Rule], op: Any, args: Any) -> None:
    check_rule(cls, op, args())


class Product(Selective):
    """``y = a b`` of tensors of one shape, as it should be."""

    freed_after_reverse: tuple[str, ...] = ("da", "db")

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        self.a, self.b = a, b
        return a * b

    def tangent(self, da: Tensor, db: Tensor) -> Tensor:
        self.da, self.db = da, db
        return da * self.b + self.a * db

    def backward(self, g: Tensor, wanted: tuple[Any, ...] | None = None) -> tuple[Tensor | None, ...]:
        a, b = wanted or self.needs
        return g * self.b if a else None, g * self.a if b else None

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
        return dg * self.b + g * self.db, dg * self.a + g * self.da


class WritesAnEqualValue(Product):
    def tangent(self, da: Tensor, db: Tensor) -> Tensor:
        da.mul_(1)
        return super().tangent(da, db)


class WritesIntoWhatItSaved(Product):
    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
        self.a.add_(1)
        return super().backward_tangent(dg, g)


class NotLinear(Product):
    def backward(self, g: Tensor, wanted: tuple[Any, ...] | None = None) -> tuple[Tensor | None, ...]:
        return super().backward(g.relu(), wanted)


class MixesTheBlock(Product):
    def backward(self, g: Tensor, wanted: tuple[Any, ...] | None = None) -> tuple[Tensor | None, ...]:
        return super().backward(g.mean(0, keepdim=True).expand_as(g), wanted)


class BackwardReadsTheTangent(Product):
    def backward(self, g: Tensor, wanted: tuple[Any, ...] | None = None) -> tuple[Tensor | None, ...]:
        return super().backward(2 * g if getattr(self, "da", None) is not None else g, wanted)


class PreparesOnce(Product):
    count = 0

    def prepare(self, g: Tensor) -> None:
        self.count += 1

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
        return super().backward_tangent(dg * self.count, g)


class TangentNeedsPrepare(Product):
    prepared = False

    def prepare(self, g: Tensor) -> None:
        self.prepared = True

    def tangent(self, da: Tensor, db: Tensor) -> Tensor:
        dy = super().tangent(da, db)
        return dy if self.prepared else 2 * dy


class KeepsTheLeadingOne(Product):
    def tangent(self, da: Tensor, db: Tensor) -> Tensor:
        return super().tangent(da, db)[:, None]


class AnotherDtype(Product):
    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(None if r is None else r.float() for r in super().backward_tangent(dg, g))


class KeepsItsTangents(Product):
    freed_after_reverse = ("da",)


class IgnoresWhatIsWanted(Product):
    def backward(self, g: Tensor, wanted: tuple[Any, ...] | None = None) -> tuple[Tensor | None, ...]:  # noqa: ARG002
        return super().backward(g)


class NoAdjoint(Product):
    def backward(self, g: Tensor, wanted: tuple[Any, ...] | None = None) -> tuple[Tensor | None, ...]:
        a, b = super().backward(g, wanted)
        return a, None if b is None else -b


BAD = {
    WritesAnEqualValue: "tangent writes into a tensor",
    WritesIntoWhatItSaved: "backward_tangent writes into a tensor",
    NotLinear: "not linear in g",
    MixesTheBlock: "not what it is of each cotangent",
    BackwardReadsTheTangent: "something else after tangent",
    PreparesOnce: "after a second prepare",
    TangentNeedsPrepare: "tangent gives something else without prepare",
    KeepsTheLeadingOne: r"tangent gives \[3, 1, 2, 4\]",
    AnotherDtype: "should give .* torch.float64",
    KeepsItsTangents: r"tangent sets \['db'\]",
    IgnoresWhatIsWanted: "ignores what is wanted",
    NoAdjoint: "not the adjoint of tangent",
}


def test_the_product_itself_keeps_the_contract() -> None:
    check_rule(Product, aten.mul.Tensor, (random(2, 4), random(2, 4)))


@pytest.mark.parametrize(("cls", "sentence"), BAD.items(), ids=[cls.__name__ for cls in BAD])
def test_a_broken_contract_is_caught(cls: type[Rule], sentence: str) -> None:
    with pytest.raises(AssertionError, match=f"^{cls.__name__}.*{sentence}"):
        check_rule(cls, aten.mul.Tensor, (random(2, 4), random(2, 4)))


def test_only_tensors_that_need_it_are_asked_for() -> None:
    check_rule(Mul, aten.mul.Tensor, (random(3, 4), random(4)), needs=(False, True))
