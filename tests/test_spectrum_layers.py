"""Blocks of operators, and the sharpness of each layer, against blocks of dense matrices."""

from __future__ import annotations

import pytest
import torch
from problems import PROBLEMS, Problem, dense_hessian, double, gpt, mlp, operator, relative
from torch import Tensor

import sharpkern as sk

F64 = torch.float64


def places(H: sk.HessianOperator, names: list[str]) -> Tensor:
    """The flat indices of some parameters, in flat order."""
    numbers = H.unflatten(torch.arange(H.n))
    return torch.cat([t.flatten() for name, t in numbers.items() if name in names])


@pytest.mark.parametrize("names", [["0.weight", "0.bias"], ["4.bias", "0.weight"], ["2.bias"], None])
def test_a_block_is_that_of_the_dense_hessian(names: list[str] | None) -> None:
    problem = double(mlp())
    A, H = dense_hessian(problem), operator(problem)
    names = names or list(H.params)
    block = sk.BlockOperator(H, names)
    at = places(H, names)
    want = A[at][:, at]
    assert block.n == len(at)
    assert list(block.params) == [name for name in H.params if name in names]
    assert relative(block.to_dense(), want) <= 1e-10
    V = torch.randn(block.n, 3, dtype=F64)
    assert relative(block.quadratic_form(V), (V * (want @ V)).sum(0)) <= 1e-10
    assert {k: v.shape for k, v in block.unflatten(V[:, 0]).items()} == {k: p.shape for k, p in block.params.items()}


@pytest.mark.parametrize("name", PROBLEMS)
def test_sharpness_of_every_layer_of_one_export(name: str) -> None:
    problem = double(PROBLEMS[name]())
    A, H = dense_hessian(problem), operator(problem)
    found = sk.layer_sharpness(H, tol=1e-4)
    assert len(list(H._engines)) == 1
    layers: dict[str, list[str]] = {}
    for parameter in H.params:
        layers.setdefault(parameter[: parameter.rindex(".")], []).append(parameter)
    assert list(found) == list(layers)
    whole = float(torch.linalg.eigvalsh(A)[-1])
    for layer, names in layers.items():
        at = places(H, names)
        block = A[at][:, at]
        top = float(torch.linalg.eigvalsh((block + block.t()) / 2)[-1])
        r = found[layer]
        assert r.converged
        assert r.value == pytest.approx(top, rel=1e-4, abs=1e-9 * whole)
        assert r.value <= whole * (1 + 1e-9)
        assert float((block @ r.vector - r.value * r.vector).norm()) <= r.error_bound + 1e-9 * whole


def test_layers_of_ones_own_follow_a_refresh_and_other_operators() -> None:
    model, loss_fn, batch = double(gpt())
    H, G = sk.HessianOperator(model, loss_fn, batch), sk.GGNOperator(model, loss_fn, batch)
    heads = {
        "attention": [name for name in H.params if ".qkv." in name or ".out." in name],
        "embedding": "embed.weight",
    }
    block = sk.BlockOperator(H, heads["attention"])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    with pytest.raises(RuntimeError, match="refresh"):
        block @ torch.ones(block.n, dtype=F64)
    for op in (H, G):
        op.refresh()
        dense = op.to_dense()
        found = sk.layer_sharpness(op, heads, tol=1e-8)
        for layer, names in heads.items():
            at = places(H, names if isinstance(names, list) else [names])
            top = float(torch.linalg.eigvalsh(dense[at][:, at])[-1])
            assert found[layer].value == pytest.approx(top, rel=1e-6)
    assert (
        float(relative(block.to_dense(), H.to_dense()[places(H, heads["attention"])][:, places(H, heads["attention"])]))
        < 1e-12
    )


def test_a_parameter_of_the_outermost_module_is_a_layer() -> None:
    A = torch.randn(4, 4, dtype=F64)
    params = {"x": torch.randn(4, dtype=F64), "y": torch.randn(1, dtype=F64)}
    H = sk.HessianOperator(None, lambda p, A: (p["x"] @ A @ p["x"]) + (p["y"] ** 2 * p["x"][0]).sum(), A, params=params)
    found = sk.layer_sharpness(H, tol=1e-10)
    assert found["x"].value == pytest.approx(float(torch.linalg.eigvalsh(A + A.t())[-1]), rel=1e-8)
    assert found["y"].value == pytest.approx(
        2 * float(params["x"][0]), rel=1e-8
    )  # of one parameter, and may be below 0


def test_unknown_and_empty_layers_are_refused_before_any_product() -> None:
    H = operator(double(mlp()))
    H.products = 0
    with pytest.raises(ValueError, match=r"not among the operator's parameters: \['7.weight'\]. It has \['0.weight'"):
        sk.layer_sharpness(H, {"first": ["0.weight"], "last": ["7.weight"]})
    with pytest.raises(ValueError, match="at least one parameter"):
        sk.layer_sharpness(H, {"first": ["0.weight"], "none": []})
    assert H.products == 0


def test_a_layer_without_curvature_is_zero() -> None:
    model = torch.nn.Linear(3, 2).double()
    x = torch.randn(5, 3, dtype=F64)
    H = sk.HessianOperator(*Problem(model, lambda out, _: out[:, 0].square().mean(), (x, x)))
    r = sk.layer_sharpness(H, {"bias": ["bias"]}, tol=1e-8)["bias"]
    assert r.value == pytest.approx(2, rel=1e-10)
    with torch.no_grad():
        H.batch[0].zero_()
    H.refresh()
    r = sk.layer_sharpness(H, {"weight": ["weight"]})["weight"]
    assert (r.value, r.converged) == (0.0, True)
