"""A caller's ``no_grad`` changes no number, and ``inference_mode``, which rules gradients out, is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import batch, net
from torch import Tensor, nn

import sharpkern as sk

MADE: dict[str, Callable[[nn.Module, Any], Any]] = {
    "Hessian": lambda model, data: sk.HessianOperator(model, F.cross_entropy, data).to_dense(),
    "recomputed": lambda model, data: sk.HessianOperator(model, F.cross_entropy, data, recompute=True).to_dense(),
    "Gauss-Newton": lambda model, data: sk.GGNOperator(model, F.cross_entropy, data).to_dense(),
    "Fisher": lambda model, data: sk.EmpiricalFisherOperator(model, F.cross_entropy, data).to_dense(),
    "data set": lambda model, data: sk.DatasetHessian(model, F.cross_entropy, [data, data]).to_dense(),
    "tracker": lambda model, data: tracked(model, data),
    "critical rate": lambda model, data: torch.tensor(
        sk.critical_learning_rate(model, F.cross_entropy, data, torch.optim.SGD(model.parameters(), lr=0.1)).value
    ),
    "suggestion": lambda model, data: torch.tensor(
        sk.suggest_warmup(
            model, F.cross_entropy, data, torch.optim.SGD(model.parameters(), lr=0.1), probe_steps=8
        ).lr_target
    ),
}


def tracked(model: nn.Module, data: Any) -> Tensor:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    tracker = sk.SharpnessTracker(model, F.cross_entropy, optimizer)
    values = []
    for _ in range(3):
        record = tracker.step(data)
        optimizer.step()
        values += [record.loss, record.sharpness, record.preconditioned_sharpness]
    return torch.tensor(values)


class Recording(nn.Module):
    """Another function where gradients are not recorded."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) if torch.is_grad_enabled() else x


@pytest.mark.parametrize("name", MADE)
def test_the_callers_grad_mode_changes_no_number(name: str) -> None:
    model, given = net(Recording()).train(), batch()
    torch.manual_seed(3)
    want = MADE[name](copy.deepcopy(model), given)
    torch.manual_seed(3)
    with torch.no_grad():
        torch.testing.assert_close(MADE[name](copy.deepcopy(model), given), want, rtol=1e-7, atol=1e-9)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="this call is within torch.inference_mode"):
        MADE[name](model, given)
    with torch.inference_mode():
        made_there = given[0] + 1, given[1]
    with pytest.raises(RuntimeError, match="the batch was made within torch.inference_mode.*clone"):
        MADE[name](model, made_there)
