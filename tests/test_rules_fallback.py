"""Ops without a rule, against autograd twice, where torch's forward mode of their backward is wrong or refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rule_truth import check, double_backward
from torch import Tensor

import sharpkern as sk
from sharpkern.rop.rules.fallback import Fallback

EYE, INDEX = torch.eye(3, dtype=torch.float64), torch.tensor([0, 0, 1, 1])

CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "logdet": lambda w: torch.logdet(w.T @ w + EYE),
    "slogdet": lambda w: torch.linalg.slogdet(w.T @ w + EYE)[1],
    "det": lambda w: torch.linalg.det(w.T @ w + EYE),
    "cholesky_inverse": lambda w: torch.cholesky_inverse(w[:3].tril() + 3 * EYE).pow(2).sum(),
    # torch 2.14 exports these three with tokens that order their checks
    "cholesky": lambda w: torch.linalg.cholesky(w.T @ w + EYE).pow(3).sum(),
    "inv": lambda w: torch.linalg.inv(w.T @ w + EYE).pow(2).sum(),
    "solve": lambda w: torch.linalg.solve(w.T @ w + EYE, w.T).pow(2).sum(),
    "logcumsumexp": lambda w: (torch.logcumsumexp(w, 1) * torch.arange(1.0, 4)).pow(2).sum(),
    "scatter_reduce": lambda w: w.new_ones(2).scatter_reduce(0, INDEX, w[:, 0], "prod").pow(2).sum(),
    "expanded cotangent": lambda w: torch.special.i0e(w).sum() + torch.special.i1(w.abs() + 1).mean(),
    "several arguments": lambda w: torch.hypot(w[:, 0], w[:, 1]).sum(),
    "several outputs": lambda w: torch.linalg.svdvals(w).sum() + torch.linalg.qr(w)[1].pow(3).sum(),
    "scalar": lambda w: torch.special.i0(w.sum()) ** 2,
}


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_those_of_autograd_twice(name: str) -> None:
    """``check`` covers products with one and three vectors, and their quadratic forms."""

    def loss(p: Any, _: Any) -> Tensor:
        return CASES[name](p["w"])

    w = torch.randn(4, 3, dtype=torch.float64)
    params = {"w": torch.nn.Parameter(w)}
    ops = tuple(named(params, loss))
    assert ops, "the case does not reach the fallback"
    check({"w": w}, loss, truth=double_backward, fallback=ops, tolerance=1e-9)


def named(params: Any, loss: Any) -> list[str]:
    return sk.HessianOperator(None, loss, (torch.zeros(1),), params=params).fallback_ops


def test_the_second_derivative_is_of_the_cotangent_that_is_passed() -> None:
    """A rule may be asked along several cotangents; what is kept for one of them must not answer for the next."""
    w, d = torch.rand(5, dtype=torch.float64) + 0.5, torch.randn(1, 5, dtype=torch.float64)
    fallback = Fallback(torch.ops.aten.special_i0.default, (True,), [])
    fallback.forward(w)
    for _ in range(3):
        g, dg = torch.randn(2, 1, 5, dtype=torch.float64)
        fallback.tangent(d)
        (found,) = fallback.backward_tangent(dg, g)
        # i0' = i1 and i1' = i0 - i1 / w
        i0, i1 = torch.special.i0(w), torch.special.i1(w)
        torch.testing.assert_close(found, dg * i1 + g * (i0 - i1 / w) * d, rtol=1e-10, atol=1e-12)
