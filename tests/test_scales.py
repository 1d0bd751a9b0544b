"""Numbers far from one: losses scaled by 1e-20 to 1e20, moments of zero and 1e-30, float32 overflow, bfloat16."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from problems import Problem, cast, mlp
from torch import Tensor, nn

import sharpkern as sk


def times(scale: float, problem: Problem) -> Problem:
    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        return scale * problem.loss_fn(output, targets)

    return problem._replace(loss_fn=loss_fn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_sharpness_of_a_scaled_loss_is_the_scaled_sharpness(dtype: torch.dtype) -> None:
    problem = cast(mlp(), dtype)
    base = sk.sharpness(*problem)
    for exponent in (-66, -33, 33, 66):  # 1e-20 to 1e20; powers of two do not round
        scaled = sk.sharpness(*times(2.0**exponent, problem))
        assert scaled.value == 2.0**exponent * base.value
        assert scaled.error_bound == pytest.approx(2.0**exponent * base.error_bound, rel=1e-12)
        assert scaled.matvecs == base.matvecs
        assert torch.equal(scaled.vector, base.vector)
    for scale in (1e-20, 1e20):
        rounding = 100 * torch.finfo(dtype).eps
        assert sk.sharpness(*times(scale, problem)).value == pytest.approx(scale * base.value, rel=rounding)


def test_a_tracked_loss_of_any_scale_has_the_scaled_sharpness() -> None:
    problem = mlp()
    values = []
    for exponent in (-66, 0, 66):
        scaled = times(2.0**exponent, problem)
        tracker = sk.SharpnessTracker(scaled.model, scaled.loss_fn, torch.optim.SGD(scaled.model.parameters(), lr=0.0))
        records = [tracker.step(scaled.batch) for _ in range(3)]
        assert all(record.converged for record in records)
        values.append([record.sharpness / 2.0**exponent for record in records])
    assert values[0] == values[1] == values[2]


def adam_with(moment: float, eps: float, model: nn.Module) -> torch.optim.Adam:
    optimizer = torch.optim.Adam(model.parameters(), eps=eps)
    for p in model.parameters():
        optimizer.state[p] = {
            "step": torch.tensor(5.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.full_like(p, moment)
        }  # fmt: skip
    return optimizer


@pytest.mark.parametrize(("moment", "eps"), [(0.0, 1e-8), (1e-30, 1e-8), (1e-30, 0.0), (1e-36, 0.0), (1e30, 0.0)])
def test_adam_s_preconditioner_is_the_formula_for_tiny_and_huge_moments(moment: float, eps: float) -> None:
    problem = mlp()
    P = sk.preconditioner(adam_with(moment, eps, problem.model)).diagonal()
    moment = float(torch.tensor(moment))  # as float32 holds it
    expected = (1 - 0.9**5) * (math.sqrt(moment / (1 - 0.999**5)) + eps)
    assert torch.allclose(P.double(), torch.full_like(P, expected).double(), rtol=1e-5, atol=0)
    # P is a multiple of the identity: with this batch's gradient left out, the sharpness is H's over it
    H = sk.HessianOperator(*problem)
    result = sk.eigen.lanczos(
        sk.PreconditionedOperator(H, sk.preconditioner(adam_with(moment, eps, problem.model))), tol=1e-5
    )
    plain = sk.sharpness(*problem, tol=1e-5).value
    assert float(result.eigenvalues[0]) == pytest.approx(plain / expected, rel=1e-4)


def test_a_moment_of_zero_without_eps_is_refused_with_its_eps() -> None:
    with pytest.raises(RuntimeError, match=r"P is zero or not finite for 35 of 35 elements.*eps=0\.0"):
        sk.preconditioner(adam_with(0.0, 0.0, mlp().model))


def test_a_loss_that_overflows_float32_is_named() -> None:
    model = nn.Linear(3, 1)
    with pytest.raises(sk.NonFiniteLossError, match="the loss is inf"):
        sk.sharpness(model, F.mse_loss, (1e20 * torch.randn(5, 3), torch.randn(5, 1)))


def test_products_that_overflow_float32_are_named() -> None:
    """The loss is finite, its second derivative is not."""
    model = nn.Linear(3, 1, bias=False)
    nn.init.constant_(model.weight, 1e-10)
    batch = (1e20 * torch.rand(5, 3) + 1e20, torch.zeros(5, 1))
    with pytest.raises(RuntimeError, match="not finite"):
        sk.sharpness(model, F.mse_loss, batch)


def test_the_bound_of_bfloat16_parameters_holds_their_rounding() -> None:
    for _ in range(4):
        problem = cast(mlp(), torch.bfloat16)
        H = sk.HessianOperator(*problem)
        assert H.product_rounding == torch.finfo(torch.bfloat16).eps
        result = sk.sharpness(*problem)
        truth = sk.sharpness(*cast(problem, torch.float64), tol=1e-8).value  # of the same parameters and batch
        assert abs(result.value - truth) <= result.error_bound
        assert result.converged
        assert result.vector.dtype == torch.float32
    assert sk.HessianOperator(*mlp()).product_rounding == 0.0
