"""Matrix products: every shape, every subset of active arguments, tied weights, blocks of vectors."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_truth import check, check_op, double_backward
from torch import Tensor

from sharpkern.rop.rules.linear import AddMM, Linear, MatMul

aten = torch.ops.aten
SUBSETS = [active for size in (1, 2, 3) for active in combinations(range(3), size)]


def fixed(f: Any, shapes: tuple[tuple[int, ...], ...], active: tuple[int, ...]) -> Any:
    """Return f as a function of its active arguments; the others are random constants."""
    constants = [torch.randn(s, dtype=torch.float64) for s in shapes]

    def g(*xs: Tensor) -> Any:
        args = list(constants)
        for i, x in zip(active, xs, strict=True):
            args[i] = x
        return f(*args)

    return g


@pytest.mark.parametrize("active", SUBSETS, ids=str)
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 1, 3)], ids=str)
def test_linear_with_every_subset_of_active_arguments(lead: tuple[int, ...], active: tuple[int, ...]) -> None:
    shapes = ((*lead, 5), (3, 5), (3,))
    check_op(fixed(F.linear, shapes, active), *(shapes[i] for i in active), rule=Linear)


@pytest.mark.parametrize("active", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("lead", [(), (4,), (2, 3)], ids=str)
def test_linear_without_bias(lead: tuple[int, ...], active: tuple[int, ...]) -> None:
    shapes = ((*lead, 5), (3, 5))
    check_op(fixed(F.linear, shapes, active), *(shapes[i] for i in active), rule=Linear)


def test_linear_layers_of_width_one_and_transposed_inputs() -> None:
    check_op(F.linear, (1, 1), (1, 1), (1,), rule=Linear)
    check_op(F.linear, (4, 1), (3, 1), (3,), rule=Linear)
    check_op(lambda x, w: F.linear(x.t(), w.t()), (5, 4), (5, 3), rule=Linear)
    check_op(lambda x, w, b: F.linear(x.transpose(0, 1), w, b).transpose(0, 1), (3, 2, 5), (4, 5), (4,), rule=Linear)


def test_parameters_themselves_as_arguments_write_straight_into_the_result() -> None:
    x = torch.randn(6, 4, dtype=torch.float64)
    params = {"w1": torch.randn(5, 4), "b1": torch.randn(5), "w2": torch.randn(3, 5), "b2": torch.randn(3)}

    def loss(p: Any, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, p["w1"], p["b1"])), p["w2"], p["b2"]).logsumexp(-1).sum()

    check({name: p.double() for name, p in params.items()}, loss, x, rule=Linear)


@pytest.mark.parametrize("uses", [2, 3])
def test_tied_weights_add_up(uses: int) -> None:
    x = torch.randn(6, 4, dtype=torch.float64)

    def loss(p: Any, x: Tensor) -> Tensor:
        for _ in range(uses):
            x = torch.tanh(F.linear(x, p["w"], p["b"]))
        return (F.linear(x, p["w"].t()) ** 2).sum()

    check({"w": torch.randn(4, 4).double(), "b": torch.randn(4).double()}, loss, x, rule=Linear)


def test_a_parameter_that_is_not_used_gets_zeros() -> None:
    def loss(p: Any, x: Tensor) -> Tensor:
        return (F.linear(x, p["w"]) ** 2).sum() + 0 * p["unused"].detach().sum()

    params = {"w": torch.randn(3, 4).double(), "unused": torch.randn(2).double()}
    check(params, loss, torch.randn(6, 4, dtype=torch.float64), rule=Linear)


MATMUL = [
    ((3, 4), (4, 2)), ((4,), (4,)), ((3, 4), (4,)), ((4,), (4, 2)), ((2, 3, 4), (4, 2)), ((2, 3, 4), (2, 4, 2)),
    ((2, 3, 4), (4,)), ((4,), (2, 4, 3)), ((5, 1, 3, 4), (2, 4, 2)), ((3, 4), (2, 4, 2)), ((2, 1, 3, 4), (1, 5, 4, 2)),
    ((1, 1), (1, 1)), ((1, 3, 4), (2, 4, 1)),
]  # fmt: skip


@pytest.mark.parametrize("active", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("shapes", MATMUL, ids=str)
def test_matmul_with_broadcasting_and_vectors(shapes: tuple[Any, Any], active: tuple[int, ...]) -> None:
    check_op(fixed(torch.matmul, shapes, active), *(shapes[i] for i in active), rule=MatMul)


def test_products_of_matrices_and_vectors_by_name() -> None:
    check_op(torch.mm, (3, 4), (4, 2), op=aten.mm.default)
    check_op(torch.bmm, (2, 3, 4), (2, 4, 2), op=aten.bmm.default)
    check_op(lambda a, b: (a @ b) @ (a @ b).mT, (2, 3, 4), (4, 3), rule=MatMul)
    for f, shapes in ((torch.dot, ((4,), (4,))), (torch.mv, ((3, 4), (4,))), (torch.outer, ((3,), (4,)))):
        check_op(f, *shapes)


@pytest.mark.parametrize("c", [(3, 2), (2,), (3, 1), (1, 1), ()], ids=str)
@pytest.mark.parametrize("active", [(0,), (1,), (2,), (0, 2), (0, 1, 2)], ids=str)
def test_addmm_with_scalars(active: tuple[int, ...], c: tuple[int, ...]) -> None:
    shapes = (c, (3, 4), (4, 2))
    f = fixed(lambda c, a, b: torch.addmm(c, a, b, beta=0.7, alpha=-1.3), shapes, active)
    check_op(f, *(shapes[i] for i in active), op=aten.addmm.default, rule=AddMM)


@pytest.mark.parametrize("c", [(2, 3, 2), (3, 1), (1, 1, 2)], ids=str)
def test_baddbmm_with_scalars(c: tuple[int, ...]) -> None:
    def f(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.baddbmm(c, a, b, beta=0.7, alpha=-1.3)

    check_op(f, c, (2, 3, 4), (2, 4, 2), op=aten.baddbmm.default, rule=AddMM)


def test_sums_of_products_by_other_names() -> None:
    check_op(lambda c, a, b: torch.addmv(c, a, b, beta=0.7, alpha=-1.3), (3,), (3, 4), (4,))
    check_op(lambda c, a, b: torch.addr(c, a, b, beta=0.7, alpha=-1.3), (3, 4), (3,), (4,))
    check_op(torch.addbmm, (3, 2), (2, 3, 4), (2, 4, 2), fallback=("aten.addbmm.default",))


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bhid,bhjd->bhij", ((2, 3, 4, 2), (2, 3, 5, 2))),
        ("ij,jk->ki", ((2, 3), (3, 4))),
        ("i,j->ij", ((3,), (4,))),
        ("ii->i", ((3, 3),)),
        ("bi,oi,bo->b", ((2, 3), (4, 3), (2, 4))),
        ("bij->", ((2, 3, 2),)),
    ],
)
def test_einsum(equation: str, shapes: tuple[Any, ...]) -> None:
    check_op(lambda *xs: torch.einsum(equation, *xs), *shapes)


def test_bilinear_layer_is_right_on_the_fallback() -> None:
    fallback = ("aten._trilinear.default",)
    check_op(F.bilinear, (3, 2), (3, 4), (5, 2, 4), (5,), fallback=fallback, truth=double_backward)


@pytest.mark.parametrize("active", SUBSETS, ids=str)
@pytest.mark.parametrize(
    ("f", "shapes"),
    [
        (torch.addmm, ((3, 2), (3, 4), (4, 2))),
        (torch.addmm, ((2,), (3, 4), (4, 2))),
        (torch.baddbmm, ((2, 3, 2), (2, 3, 4), (2, 4, 2))),
        (torch.addmv, ((3,), (3, 4), (4,))),
    ],
    ids=["addmm", "addmm of a row", "baddbmm", "addmv"],
)
def test_a_nan_in_what_beta_zero_ignores_stays_there(f: Any, shapes: Any, active: tuple[int, ...]) -> None:
    def ignoring(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return f(c + torch.nan, a, b, beta=0, alpha=0.7)

    check_op(fixed(ignoring, shapes, active), *(shapes[i] for i in active), rule=AddMM, truth=double_backward)


def test_beta_zero_drops_infinite_tangents_and_cotangents_of_what_it_ignores() -> None:
    rule = AddMM(aten.addmm.default, (True, True, True))
    c, a, b = torch.randn(3, 2), torch.randn(3, 4), torch.randn(4, 2)
    rule.forward(c, a, b, 0, 1)
    infinite = torch.full((1, 3, 2), torch.inf)
    da = torch.randn(1, 3, 4)
    torch.testing.assert_close(rule.tangent(infinite, da, None), da @ b)
    assert torch.equal(rule.backward(infinite)[0], torch.zeros(1, 3, 2))
