"""The audit passes what is right and fails what is wrong."""

from __future__ import annotations

import random
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from problems import PROBLEMS, Problem, double, mlp
from small_models import Apply
from torch import nn

import sharpkern as sk
from sharpkern.curvature.gate import Verdict
from sharpkern.rop.rule import RULES, Rule


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_right_models_pass_and_are_left_as_they_were(name: str, dtype: str) -> None:
    problem = PROBLEMS[name]() if dtype == "float32" else double(PROBLEMS[name]())
    before = {key: value.clone() for key, value in problem.model.state_dict().items()}
    random = torch.get_rng_state()
    report = sk.audit(*problem)
    assert report.ok, report.lines
    assert report.verdict.startswith("Trustworthy") and report.lines[-1] == report.verdict
    assert all(torch.equal(before[key], value) for key, value in problem.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_dropout_passes() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.4), nn.Linear(16, 3))
    report = sk.audit(model, F.cross_entropy, (torch.randn(6, 4), torch.randint(0, 3, (6,))))
    assert report.ok, report.lines


@pytest.mark.parametrize("sweep", ["tangent", "backward_tangent"])
def test_a_flipped_sign_in_a_rule_is_found(sweep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = RULES[torch.ops.aten.tanh.default]
    right = getattr(cls, sweep)

    def flipped(self, *args):
        result = right(self, *args)
        return tuple(-r for r in result) if isinstance(result, tuple) else -result

    monkeypatch.setattr(cls, sweep, flipped)
    report = sk.audit(*mlp())
    assert not report.ok
    assert report.verdict.startswith("NOT TO BE TRUSTED")


def test_fallback_ops_are_named() -> None:
    class Bessel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.i0(x)

    model = nn.Sequential(nn.Linear(4, 5), Bessel(), nn.Linear(5, 3))
    report = sk.audit(*Problem(model, F.cross_entropy, (torch.randn(6, 4), torch.randint(0, 3, (6,)))))
    assert report.ok
    assert any("i0" in op for op in report.fallback_ops)
    assert "slow fallback" in report.verdict


def _registered(monkeypatch: pytest.MonkeyPatch, method: str, replacement) -> None:
    """Plant an error in the rule of tanh."""
    cls = RULES[torch.ops.aten.tanh.default]
    right = getattr(cls, method)
    monkeypatch.setattr(cls, method, lambda self, *args: replacement(self, right, *args))


def _scaled(factor: float):
    def planted(self, right, *args):
        result = right(self, *args)
        return tuple(factor * r for r in result) if isinstance(result, tuple) else factor * result

    return planted


def _without_second_term(self, _right, dg, g):  # noqa: ARG001
    return self.backward(dg)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("method", "planted"),
    [
        ("tangent", _scaled(2.0)),
        ("tangent", _scaled(1.01)),
        ("backward_tangent", _scaled(0.5)),
        ("backward_tangent", _without_second_term),
    ],
    ids=["factor 2", "one per cent", "half", "a term missing"],
)
def test_planted_errors_in_a_rule_are_found(method: str, planted, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _registered(monkeypatch, method, planted)
    report = sk.audit(*(mlp() if dtype == "float32" else double(mlp())))
    assert report.status == "wrong", report.lines
    assert "report" in report.verdict


def test_a_wrong_backward_never_reaches_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    _registered(monkeypatch, "backward", _scaled(-1.0))
    with pytest.warns(UserWarning, match="differs from the eager model"):
        assert sk.audit(*mlp()).ok
    # Without the gate it does, and the audit is what is left.
    monkeypatch.setattr("sharpkern.curvature.engines.compare", lambda *_: Verdict(True, "", 0.0))
    report = sk.audit(*mlp())
    assert report.status == "wrong"
    assert "gradient against eager torch" in report.verdict


def test_a_wrong_rule_of_a_third_party_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    op = torch.ops.aten.special_i0.default

    class Bessel(Rule):
        def forward(self, x):
            self.slope = torch.special.i1(x)
            return torch.special.i0(x)

        def tangent(self, dx):
            self.dslope = dx  # as if the slope were the argument itself
            return self.slope * dx

        def backward(self, g):
            return (self.slope * g,)

        def backward_tangent(self, dg, g):
            return (self.slope * dg + self.dslope * g,)

    monkeypatch.setitem(RULES, op, Bessel)
    model = nn.Sequential(nn.Linear(4, 5), Apply(torch.special.i0), nn.Linear(5, 3))
    report = sk.audit(model, F.cross_entropy, (torch.randn(6, 4), torch.randint(0, 3, (6,))))
    assert not report.fallback_ops, "the planted rule is not used"
    assert report.status == "wrong", report.lines


def test_a_penalty_that_the_program_lost_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data_loss, batch = mlp()
    params = [p for p in model.parameters()]  # noqa: C416  (captured, as a user's closure does)

    def loss_fn(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return data_loss(output, targets) + 0.5 * sum(p.square().sum() for p in params)

    assert sk.audit(model, loss_fn, batch).ok
    # As if the export took them for constants, and the gate let that pass; the export just made is right, and kept.
    monkeypatch.setattr(sys.modules["sharpkern.curvature.exports"], "graphs", weakref.WeakKeyDictionary())
    monkeypatch.setattr(sys.modules["sharpkern.rop.export"], "memory_of", id)
    monkeypatch.setattr("sharpkern.curvature.engines.compare", lambda *_: Verdict(True, "", 0.0))
    report = sk.audit(model, loss_fn, batch)
    assert report.status == "wrong", report.lines


class Scaled(torch.autograd.Function):
    """The identity, whose backward is off by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return ctx.factor * g, None


@pytest.mark.filterwarnings("ignore:sharpkern. this model does not export")
@pytest.mark.parametrize("factor", [1.0, 0.5, -1.0, 1.1])
@pytest.mark.parametrize("place", ["inside", "loss"])
def test_a_function_whose_backward_is_wrong_is_named(factor: float, place: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    batch = (torch.randn(6, 4), torch.randint(0, 3, (6,)))
    if place == "inside":
        model.insert(1, Apply(lambda h: Scaled.apply(h, factor)))
        report = sk.audit(model, F.cross_entropy, batch)
    else:  # the products are symmetric and agree with differences of the gradient: only the loss tells
        report = sk.audit(model, lambda o, t: Scaled.apply(F.cross_entropy(o, t), factor), batch)
    assert report.status == ("trustworthy" if factor == 1 else "wrong"), report.lines
    assert ("the autograd.Function Scaled" in report.verdict) == (factor != 1)


@pytest.mark.filterwarnings("ignore:sharpkern. this model does not export")
def test_noise_from_elsewhere_than_torch_is_suspected_before_a_rule() -> None:
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1 + random.random())

    random.seed(0)  # two numbers that are far apart
    report = sk.audit(Noisy(4, 2), nn.MSELoss(), (torch.randn(8, 4), torch.randn(8, 2)))
    assert "random numbers from elsewhere than torch" in report.verdict


@pytest.mark.filterwarnings("ignore:sharpkern. this model does not export")
def test_hooks_that_halve_every_gradient_are_named() -> None:
    model, *rest = mlp()
    for p in model.parameters():
        p.register_hook(lambda g: g / 2)
    report = sk.audit(model, *rest)
    assert report.status == "wrong", report.lines
    assert "a gradient hook on" in report.verdict
