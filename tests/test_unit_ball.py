"""Unit balls of optimizers: duality by random search, and the steps of optimizers without momentum."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import optimizer_twins as twins
import pytest
import torch
from torch import Tensor, nn, optim

import sharpkern as sk
from sharpkern.optimizers.unit_ball import Cube, Ellipsoid, SpectralBall, unit_ball

F64 = torch.float64
SHAPES = [(3, 4), (5, 2)]


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, dtype=F64)) for shape in SHAPES]


def lion(params: Any) -> optim.Optimizer:
    return twins.Lion(params, lr=0.1, betas=(0.0, 0.0))


def muon(params: Any, adjust: str | None = None) -> optim.Optimizer:
    # Twenty cubic Newton-Schulz steps, which converge, for the default's five quintic ones, which do not.
    return optim.Muon(
        params, lr=0.1, momentum=0.0, weight_decay=0.0, ns_coefficients=(1.5, -0.5, 0.0), ns_steps=20,
        adjust_lr_fn=adjust,
    )  # fmt: skip


BALLS: dict[str, tuple[Callable[[Any], optim.Optimizer], type]] = {
    "sgd": (lambda ps: optim.SGD(ps, lr=0.1), Ellipsoid),
    "adam": (lambda ps: optim.Adam(ps, lr=0.1), Ellipsoid),
    "lion": (lion, Cube),
    "muon": (muon, SpectralBall),
    "muon, adjusted": (lambda ps: muon(ps, "match_rms_adamw"), SpectralBall),
}


def two_rates(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:1]}, {"params": params[1:], "lr": 0.3}]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", BALLS)
def test_the_steepest_direction_is_in_the_ball_and_attains_the_dual_norm(name: str, grouped: bool) -> None:
    make, kind = BALLS[name]
    params = parameters()
    ball = unit_ball(make(two_rates(params) if grouped else params), params, gradients={p: p.detach() for p in params})
    assert type(ball) is kind
    rows = torch.randn(3, 22, dtype=F64)
    for g, d in zip(rows, ball.steepest(rows), strict=True):
        assert ball.norm(d) == pytest.approx(1)
        assert float(g @ d) == pytest.approx(ball.dual_norm(g))
        others = torch.randn(500, 22, dtype=F64) + 3 * d * torch.rand(500, 1, dtype=F64)
        assert max(float(g @ x) / ball.norm(x) for x in others) <= ball.dual_norm(g) * (1 + 1e-9)
        assert ball.norm(-2.5 * d) == pytest.approx(2.5)


@pytest.mark.parametrize(("name", "tol"), [("lion", 1e-12), ("muon", 2e-2), ("muon, adjusted", 2e-2)])
def test_the_step_without_momentum_is_lr_times_the_steepest_direction(name: str, tol: float) -> None:
    params = parameters()
    optimizer = BALLS[name][0](two_rates(params))
    ball = unit_ball(optimizer, params)
    for p in params:
        u, _, vh = torch.linalg.svd(torch.randn_like(p), full_matrices=False)
        # Singular values near each other: Newton-Schulz in bfloat16 has the steps to lift them to 1.
        p.grad = u @ torch.diag(torch.linspace(0.5, 1, len(vh), dtype=F64)) @ vh
    g, before = sk.flatten([p.grad for p in params]), sk.flatten(params).detach()
    optimizer.step()
    step = (before - sk.flatten(params).detach()) / 0.1
    d = ball.steepest(g[None])[0]
    assert float((step - d).norm() / d.norm()) < tol


def test_parameters_that_the_optimizer_does_not_hold_stay() -> None:
    params = parameters()
    bias = nn.Parameter(torch.zeros(6, dtype=F64))
    order = [params[0], bias, params[1]]
    for make, _ in BALLS.values():
        ball = unit_ball(make(params), order, gradients={p: p.detach() for p in params})
        d = ball.steepest(torch.randn(1, 28, dtype=F64))[0]
        assert int(d.count_nonzero()) == 22 and not d[12:18].any()
        assert ball.norm(d) == pytest.approx(1)
        outside = torch.zeros(28, dtype=F64)
        outside[14] = 1e-3
        assert ball.norm(outside) == math.inf
        assert ball.dual_norm(outside) == 0
        with pytest.raises(ValueError, match="the optimizer holds none of the 1 parameters given"):
            unit_ball(make(params), [bias])


def test_the_ellipsoid_is_that_of_the_preconditioner() -> None:
    params = parameters()
    optimizer = optim.Adam(two_rates(params), lr=0.1)
    gradients: dict[Tensor, Tensor] = {p: torch.randn_like(p) for p in params}
    P = sk.preconditioner(optimizer, gradients=gradients).diagonal()
    ball = unit_ball(optimizer, params[::-1], gradients=gradients)
    d = torch.randn(22, dtype=F64)
    assert ball.norm(d) == pytest.approx(float((torch.cat([d[10:], d[:10]]) ** 2 * P).sum().sqrt()))
