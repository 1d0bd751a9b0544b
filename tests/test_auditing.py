"""The audit passes what is right and fails what is wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from problems import PROBLEMS, Problem, double, mlp
from torch import nn

import sharpkern as sk
from sharpkern.rop.rule import RULES


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
