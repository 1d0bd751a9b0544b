"""Dropout: one mask for the gradient and all products of a ``refresh``.

The loss is curved behind the dropout, so each mask has its own gradient and Hessian; the truth takes the mask
that the program drew, by the same seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_truth import double_backward, product
from torch import Tensor, nn

from sharpkern.curvature.losses import FunctionalLoss
from sharpkern.curvature.operators import HessianOperator
from sharpkern.rop import Program, export
from sharpkern.rop.rules.dropout import Dropout

aten = torch.ops.aten


def same(
    drop: Callable[[Tensor], Tensor], rule: type | None, reference: Callable[[Tensor], Tensor] | None = None
) -> None:
    w = torch.randn(4, 3, 6, dtype=torch.float64)

    def loss(p: Any, _: Any, drop: Callable[[Tensor], Tensor] = drop) -> Tensor:
        y = drop(2 * torch.tanh(p["x"]))
        return (w * y * y).sum() + (y**3).sum() + 0.1 * (p["x"] ** 2).sum()

    params = {"x": nn.Parameter(torch.randn_like(w))}
    module = FunctionalLoss(params, loss)
    program = Program(export(module, (None,)), {"x": module.values[0]})
    assert program.fallback_ops == []
    rules = {type(step.rule) for step in program.live}
    assert rule is None or rule in rules
    block = torch.randn(3, w.numel(), dtype=torch.float64)
    for s in (5, 6):
        torch.manual_seed(s)
        value = program.forward(module, [None])
        program.backward()
        program.gradient(gradient := torch.empty_like(block[:1]))
        three, one = product(program, block), product(program, block[:1])

        def seeded(p: Any, batch: Any, s: int = s) -> Tensor:
            torch.manual_seed(s)
            return loss(p, batch, reference or drop)

        x = params["x"].detach().clone().requires_grad_()
        truth = torch.autograd.grad(seeded({"x": x}, None), x)[0].flatten()
        vs = [{"x": v.view_as(w)} for v in block]
        want = [double_backward(seeded, {"x": x.detach()}, None, v)["x"].flatten() for v in vs]
        torch.testing.assert_close(value, seeded({"x": x}, None).detach(), rtol=1e-12, atol=0)
        for got, right in [(gradient[0], truth), (three, torch.stack(want)), (one, want[0][None])]:
            assert (got - right).abs().max() <= 1e-10 * right.abs().max()
        assert abs(block[0] @ three[1] - block[1] @ three[0]) <= 1e-10 * block[0].norm() * three[1].norm()


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout(p: float) -> None:
    same(lambda x: F.dropout(x, p, True), Dropout)


@pytest.mark.parametrize("train", [True, False, None])
def test_native_dropout(train: bool | None) -> None:
    """Without ``train`` torch drops and scales, but leaves the scale out of its gradient."""

    def drop(x: Tensor, train: bool | None = train) -> Tensor:
        return aten.native_dropout.default(x, 0.4, train)[0]

    same(drop, Dropout, lambda x: drop(x, train is not False))


@pytest.mark.parametrize(
    "drop",
    [F.dropout1d, F.alpha_dropout, F.feature_alpha_dropout, lambda x, p, t: F.dropout(1 * x, p, t, True)],
    ids=["dropout1d", "alpha", "feature_alpha", "in place"],
)
def test_dropouts_of_other_kinds(drop: Any) -> None:
    """They export as arithmetic with a mask that the forward sweep draws once."""
    same(lambda x: drop(x, 0.4, True), None)


def test_dropout_is_nothing_in_eval_mode() -> None:
    same(lambda x: F.dropout(x, 0.4, False), None)
    same(lambda x: F.dropout(x, 0.0, True), None)


def test_products_of_one_refresh_share_a_mask() -> None:
    """And the next refresh draws another."""
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Dropout(0.5), nn.Linear(20, 2)).double()
    batch = torch.randn(8, 6).double(), torch.randn(8, 2).double()
    H = HessianOperator(model, nn.MSELoss(), batch)
    assert H.fallback_ops == []
    v = torch.randn(H.n, dtype=torch.float64)
    first = H @ v
    torch.rand(3)
    assert torch.equal(first, H @ v)
    H.refresh()
    assert not torch.allclose(first, H @ v)
