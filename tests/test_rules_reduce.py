"""Reductions over any dimensions, with ties and 0-d arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_truth import check, check_op, double_backward, positive
from torch import Tensor

from sharpkern.rop.rules.reduce import Extremum, Norm, PiecewiseLinearNorm, Ranked, Sum, Variance

aten = torch.ops.aten

BY_DIM = {
    "sum": (lambda x, **o: x.sum(**o), aten.sum.dim_IntList),
    "mean": (lambda x, **o: x.mean(**o), aten.mean.dim),
    "amax": (lambda x, **o: x.amax(**o), aten.amax.default),
    "amin": (lambda x, **o: x.amin(**o), aten.amin.default),
    "logsumexp": (lambda x, **o: x.logsumexp(**o), aten.logsumexp.default),
    "norm": (lambda x, **o: torch.linalg.vector_norm(x, **o), aten.linalg_vector_norm.default),
    "var": (lambda x, **o: x.var(**o), aten.var.correction),
}


@pytest.mark.parametrize(("dim", "keepdim"), [(0, False), (-1, True), ((0, 2), False), ((2, 0, 1), True)], ids=str)
@pytest.mark.parametrize("name", BY_DIM)
def test_products_over_dimensions(name: str, dim: Any, keepdim: bool) -> None:
    f, op = BY_DIM[name]
    check_op(lambda x: f(x, dim=dim, keepdim=keepdim), (3, 2, 5), op=op)


@pytest.mark.parametrize(
    ("f", "op"),
    [
        (torch.sum, aten.sum.default),
        (torch.mean, aten.mean.default),
        (torch.max, aten.max.default),
        (torch.min, aten.min.default),
        (torch.amax, aten.amax.default),
        (torch.linalg.vector_norm, aten.linalg_vector_norm.default),
        (torch.norm, None),
        (torch.linalg.matrix_norm, None),
        (torch.var, aten.var.correction),
    ],
)
def test_products_over_everything(f: Any, op: Any) -> None:
    check_op(f, (3, 5), op=op)


@pytest.mark.parametrize(
    ("f", "op"),
    [
        (torch.sum, aten.sum.default),
        (torch.mean, aten.mean.default),
        (lambda x: x.sum(0, keepdim=True), aten.sum.dim_IntList),
        (lambda x: x.mean(-1), aten.mean.dim),
        (torch.max, aten.max.default),
        (lambda x: x.amax(0), aten.amax.default),
        (lambda x: x.logsumexp(0) * x, aten.logsumexp.default),
        (lambda x: torch.linalg.vector_norm(x) * x, aten.linalg_vector_norm.default),
        (lambda x: x.cumsum(0), aten.cumsum.default),
        (lambda x: x.max(0).values * x, aten.max.dim),
        (lambda x: x.sort().values * x, aten.sort.default),
    ],
)
def test_products_of_scalars(f: Any, op: Any) -> None:
    check_op(f, (), op=op)


def test_sum_and_mean_in_another_dtype() -> None:
    check_op(lambda x: x.float().sum(0, dtype=torch.float64), (3, 2), op=aten.sum.dim_IntList, tolerance=1e-5)
    check_op(lambda x: x.float().mean(1, dtype=torch.float64), (3, 2), op=aten.mean.dim, tolerance=1e-5)
    check_op(lambda x: x.float().cumsum(1, dtype=torch.float64), (3, 2), op=aten.cumsum.default, tolerance=1e-5)


@pytest.mark.parametrize(("dim", "correction"), [(None, 1), (0, 0), ((0, 2), 2)], ids=str)
def test_variances(dim: Any, correction: int) -> None:
    options = {"dim": dim, "correction": correction}
    check_op(lambda x: x.var(**options, keepdim=True), (3, 2, 5), op=aten.var.correction)
    check_op(lambda x: torch.var_mean(x, **options), (3, 2, 5), op=aten.var_mean.correction)
    check_op(lambda x: torch.var_mean(x, **options)[1], (3, 2, 5), rule=Variance)
    check_op(lambda x: torch.var_mean(x, **options)[0], (3, 2, 5), rule=Variance)
    check_op(lambda x: torch.std_mean(x, **options), (3, 2, 5), rule=Variance)
    check_op(lambda x: x.std(**options), (3, 2, 5))


@pytest.mark.parametrize("order", [3, 0.7, 1.5])
def test_norms_of_other_orders_are_named_as_fallback(order: float) -> None:
    fallback = ("aten.linalg_vector_norm.default",)
    check_op(lambda x: torch.linalg.vector_norm(x, order, dim=-1), (3, 4), inner=positive, fallback=fallback)


@pytest.mark.parametrize("order", [0, 1, float("inf"), -float("inf")])
def test_piecewise_linear_norms(order: float) -> None:
    check_op(lambda x: torch.linalg.vector_norm(x, order, dim=-1) * x.sum(-1), (3, 4), rule=PiecewiseLinearNorm)
    x = torch.tensor([[1.0, -1.0, 0.0], [0.5, 2.0, -2.0], [0.0, 0.0, 0.0]], dtype=torch.float64)

    def loss(p: Any, _: Any) -> Tensor:
        return (torch.linalg.vector_norm(p["x"], order, dim=-1) ** 3 + (p["x"] ** 3).sum(-1)).sum()

    check({"x": x}, loss, rule=PiecewiseLinearNorm, truth=double_backward, values=1)


def test_normalised_vectors() -> None:
    check_op(lambda x: F.normalize(x, dim=-1), (3, 4), rule=Norm)
    check_op(lambda x, y: F.cosine_similarity(x, y), (3, 4), (3, 4))
    check_op(lambda x, y: F.pairwise_distance(x, y), (3, 4), (3, 4), rule=Norm)


def test_norm_of_zero_has_the_gradient_zero() -> None:
    x = torch.tensor([[0.0, 0.0], [1.3, -0.4]], dtype=torch.float64)

    def loss(p: Any, _: Any) -> Tensor:
        return (torch.linalg.vector_norm(p["x"], dim=-1) ** 3 + p["x"].sum(-1) ** 2).sum()

    check({"x": x}, loss, rule=Norm, values=1)


@pytest.mark.parametrize("dim", [0, -1])
def test_cumulative_sums(dim: int) -> None:
    check_op(lambda x: x.cumsum(dim), (3, 4), op=aten.cumsum.default)


RANKED = {
    "max": (lambda x, d: x.max(d).values, aten.max.dim),
    "max_keep": (lambda x, d: x.max(d, keepdim=True), aten.max.dim),
    "min": (lambda x, d: x.min(d).values, aten.min.dim),
    "median": (lambda x, d: x.median(d).values, aten.median.dim),
    "kthvalue": (lambda x, d: x.kthvalue(2, d).values, aten.kthvalue.default),
    "topk": (lambda x, d: x.topk(2, d).values, aten.topk.default),
    "sort": (lambda x, d: x.sort(d, descending=True).values, aten.sort.default),
    "stable_sort": (lambda x, d: x.sort(dim=d, stable=True).values, aten.sort.stable),
    "cummax": (lambda x, d: x.cummax(d).values, aten.cummax.default),
}


@pytest.mark.parametrize("dim", [0, -2])
@pytest.mark.parametrize("name", RANKED)
def test_values_by_rank(name: str, dim: int) -> None:
    f, op = RANKED[name]
    check_op(lambda x: f(x, dim), (3, 2, 5), op=op, rule=Ranked, truth=double_backward)


@pytest.mark.parametrize(
    "f", [torch.max, torch.min, torch.amax, lambda x: x.amin(0), lambda x: x.max(0).values, lambda x: x.min(1).values]
)
def test_ties_follow_torch(f: Any) -> None:
    x = torch.tensor([[1.0, 2.0, 2.0], [1.0, 0.5, 2.0], [0.5, 0.5, 0.5]], dtype=torch.float64)

    def loss(p: Any, _: Any) -> Tensor:
        return (f(p["x"]) ** 3).sum() + (p["x"] ** 3).sum()

    check({"x": x}, loss, truth=double_backward, values=1)


def test_products_and_cumulative_products_need_no_fallback() -> None:
    check_op(lambda x: x.prod(-1), (3, 4))
    check_op(lambda x: x.prod(), (4,))
    check_op(lambda x: x.cumprod(0), (3, 4))


def test_extremum_shares_a_tie_evenly() -> None:
    rule = Extremum(aten.amax.default, (True,))
    rule.forward(torch.tensor([1.0, 3.0, 3.0]), [0], False)
    assert rule.backward(torch.ones(1))[0].tolist() == [[0.0, 0.5, 0.5]]


@pytest.mark.parametrize("op", [aten.mean.default, aten.mean.dim], ids=str)
def test_mean_of_many_float16_is_torchs_where_their_sum_is_infinite(op: Any) -> None:
    x = torch.rand(2, 70_000).half() + 1
    options = () if op is aten.mean.default else ([1], False)
    rule = Sum(op, (True,))
    assert torch.equal(rule.forward(x, *options, None), op(x, *options))
    d = torch.rand(3, 2, 70_000).half() + 1
    want = torch.stack([op(row, *options) for row in d])
    assert bool(want.isfinite().all())
    assert torch.equal(rule.tangent(d), want)
    leaf = x.requires_grad_()
    y = op(leaf, *options)
    g = 50_000 * torch.rand(1, *y.shape).half()
    (gx,) = torch.autograd.grad(y, leaf, g[0])
    torch.testing.assert_close(rule.backward(g)[0][0], gx, rtol=1e-3, atol=0)


def test_mean_of_nothing_is_nan_as_in_torch() -> None:
    assert Sum(aten.mean.default, (True,)).forward(torch.empty(0), None).isnan()
