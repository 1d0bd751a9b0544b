"""Persistent catapult warmup on a two-parameter model whose catapult is known, and on a small network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpkern as sk
from sharpkern.warmup.critical import CriticalLR
from sharpkern.warmup.persistent import PersistentCatapultLR


class Product(nn.Module):
    """``x -> u v x``: gradient descent on its square catapults beyond ``lr (u^2 + v^2) = 2``, up to about 4."""

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
        self.v = nn.Parameter(torch.tensor([0.05], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.u * self.v * x


def half_square(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().mean()


def descend(rise: float, target: float, steps: int = 400) -> tuple[sk.PersistentCatapultLR, list[dict[str, float]]]:
    model = Product()
    batch = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)
    schedule = sk.PersistentCatapultLR(optimizer, target, (model, half_square, batch), rise=rise)
    rows = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = half_square(model(batch[0]), batch[1])
        loss.backward()
        sharp = float(model.u.detach() ** 2 + model.v.detach() ** 2)
        rows.append({"lr": optimizer.param_groups[0]["lr"], "loss": float(loss.detach()), "sharpness": sharp})
        optimizer.step()
        schedule.step()
    return schedule, rows


def test_the_rate_starts_critical_and_rises_only_after_a_catapult_is_over() -> None:
    schedule, rows = descend(rise=0.1, target=0.7)
    assert rows[0]["lr"] * rows[0]["sharpness"] == pytest.approx(2, rel=0.08)
    assert schedule.done and rows[-1]["lr"] == 0.7
    assert schedule.searches >= 2
    rates = [row["lr"] for row in rows]
    assert rates == sorted(rates)
    raised = [t for t in range(1, len(rows)) if rates[t] > rates[t - 1]]
    last = 0
    for t in raised:
        assert rows[t]["loss"] < rows[last]["loss"]
        last = t
    assert len(raised) <= schedule.searches - 1
    assert rows[-1]["sharpness"] < 2 / 0.7 + 1e-6
    assert rows[-1]["loss"] < 1e-6


def test_the_target_is_never_passed_and_nothing_is_spent_once_it_is_reached() -> None:
    schedule, rows = descend(rise=0.1, target=0.3, steps=5)  # below 2 / sharpness: the first search hits the cap
    assert [row["lr"] for row in rows] == [0.3] * 5
    assert schedule.searches == 1
    spent = schedule.forward_passes
    schedule.step()
    assert schedule.forward_passes == spent


def network(width: int = 48) -> tuple[nn.Module, Any, Any]:
    model = nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.weight, 0.0, (2 / layer.in_features) ** 0.5)
    batch = torch.randn(100, 20), F.one_hot(torch.randint(0, 5, (100,)), 5).float()
    return model, half_square, batch


def test_a_network_survives_a_target_that_kills_it_without_warmup() -> None:
    """Full-batch gradient descent at 16 over the initial sharpness."""
    model, loss_fn, batch = network()
    target = 16 / sk.sharpness(model, loss_fn, batch).value
    finals = {}
    for kind in ("none", "persistent"):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=target)
        schedule = sk.PersistentCatapultLR(optimizer, target, (twin, loss_fn, batch)) if kind != "none" else None
        losses = []
        for _ in range(150):
            optimizer.zero_grad()
            loss = loss_fn(twin(batch[0]), batch[1])
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
        finals[kind] = losses
        if schedule is not None:
            assert optimizer.param_groups[0]["lr"] <= target
            assert schedule.lr > 2 / 16 * target
    peak = {kind: max(x if x == x else float("inf") for x in losses) / losses[0] for kind, losses in finals.items()}
    assert peak["persistent"] < peak["none"]
    assert finals["persistent"][-1] < 0.5 * finals["persistent"][0]


def test_patience_searches_even_if_the_loss_never_returns() -> None:
    model = nn.Linear(1, 1, bias=False)
    batch = torch.ones(1, 1), torch.zeros(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    probe = model, nn.MSELoss(), batch
    schedule = sk.PersistentCatapultLR(optimizer, 50.0, probe, patience=3)
    with torch.no_grad():
        model.weight.mul_(2)
    for searches in (1, 1, 2, 2, 2, 3):
        schedule.step()
        assert schedule.searches == searches
    waiting = sk.PersistentCatapultLR(optimizer, 50.0, probe)
    for _ in range(10):
        waiting.step()
    assert waiting.searches == 1


def test_groups_keep_their_ratio_and_the_state_resumes() -> None:
    model, loss_fn, batch = network()
    optimizer = torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2:].parameters()}], lr=1.0)
    schedule = sk.PersistentCatapultLR(optimizer, [100.0, 200.0], (model, loss_fn, batch))
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert second == pytest.approx(2 * first) and first == schedule.get_last_lr()[0]
    state = schedule.state_dict()
    other = torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2:].parameters()}], lr=1.0)
    resumed = sk.PersistentCatapultLR(other, [100.0, 200.0], (model, loss_fn, batch), lr_start=5.0)
    resumed.load_state_dict(state)
    assert [group["lr"] for group in other.param_groups] == [first, second]
    for _ in range(20):
        for s in (schedule, resumed):
            s.step()
        assert schedule.get_last_lr() == resumed.get_last_lr()


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (0.0, {}, "lr_target must be positive, and one number or 1, got 0.0"),
        ([1.0, 2.0], {}, r"one number or 1, got \[1.0, 2.0\]"),
        (1.0, {"patience": 0}, "patience must be at least 1, got 0"),
        (1.0, {"rise": -1.0}, "rise must be positive"),
    ],
)
def test_bad_arguments_are_refused(target: Any, options: dict[str, Any], message: str) -> None:
    model, loss_fn, batch = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match=message):
        sk.PersistentCatapultLR(optimizer, target, (model, loss_fn, batch), **options)


def test_a_search_that_finds_less_leaves_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """With patience a search may fall into a catapult, where the critical rate lies below the present one."""
    model = nn.Linear(1, 1, bias=False)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = model, nn.MSELoss(), (torch.ones(1, 1), torch.zeros(1, 1))
    schedule = PersistentCatapultLR(sgd, 10.0, probe, patience=1)
    before = schedule.lr
    found = CriticalLR(before / 2, before / 3, 1.0, 0.01, 5, False)
    monkeypatch.setattr("sharpkern.warmup.persistent.critical_learning_rate", lambda *_, **__: found)
    schedule.step()
    assert schedule.searches == 2
    assert schedule.lr == before == sgd.param_groups[0]["lr"]
