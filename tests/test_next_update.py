"""The next update, against the step that the optimizer then takes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import optimizer_twins as twins
import pytest
import torch
from torch import Tensor, nn, optim

from sharpkern.optimizers.next_update import next_update
from sharpkern.optimizers.rules import learning_rate

F64 = torch.float64
Make = Callable[[list[nn.Parameter]], optim.Optimizer]


def groups(params: list[nn.Parameter], **second: Any) -> list[dict[str, Any]]:
    return [{"params": params[:1]}, {"params": params[1:], **second}]


OPTIMIZERS: dict[str, Make] = {
    "nadam": lambda ps: optim.NAdam(groups(ps, lr=0.3), lr=0.1, weight_decay=0.1, maximize=True),
    "adadelta": lambda ps: optim.Adadelta(groups(ps, rho=0.5), lr=0.1),
    "adafactor": lambda ps: optim.Adafactor(groups(ps, lr=0.3), lr=0.1, weight_decay=0.2),
    "adafactor, capped": lambda ps: optim.Adafactor(ps, lr=3.0),
    "muon": lambda ps: optim.Muon(groups(ps, lr=0.3, nesterov=False), lr=0.1, weight_decay=0.2),
    "muon, adjusted": lambda ps: optim.Muon(ps, lr=0.1, adjust_lr_fn="match_rms_adamw"),
    "asgd": lambda ps: optim.ASGD(ps, lr=0.1, t0=2, lambd=0.3),
    "rprop": lambda ps: optim.Rprop(ps, lr=0.1),
    "lion": lambda ps: twins.Lion(groups(ps, lr=0.3), lr=0.1, weight_decay=0.2),
    "timm lion": lambda ps: twins.TimmLion(ps, lr=0.1, weight_decay=0.2),
    "schedule-free sgd": lambda ps: twins.SGDScheduleFree(groups(ps, lr=0.3), lr=0.1, warmup_steps=5),
    "schedule-free adamw": lambda ps: twins.AdamWScheduleFree(ps, lr=0.1, weight_decay=0.1),
    "hf adafactor": lambda ps: twins.Adafactor(ps, weight_decay=0.2),
    "hf adafactor, beta1": lambda ps: twins.Adafactor(ps, lr=0.1, beta1=0.8, relative_step=False),
}


def build(make: Make, dtype: torch.dtype = F64) -> tuple[list[nn.Parameter], optim.Optimizer]:
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((4, 6), (5, 3))]
    optimizer = make(params)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return params, optimizer


def drawn(params: list[nn.Parameter], size: float = 1.0) -> dict[Tensor, Tensor]:
    return {p: size * torch.randn_like(p) for p in params}


def take(optimizer: optim.Optimizer, gradients: dict[Tensor, Tensor]) -> None:
    for p, g in gradients.items():
        p.grad = g.clone()
    optimizer.step()


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_step_taken_next_over_lr(name: str, steps: int) -> None:
    params, optimizer = build(OPTIMIZERS[name])
    for _ in range(steps):
        take(optimizer, drawn(params))
    gradients = drawn(params)
    lr = learning_rate(optimizer.param_groups[0])
    got = next_update(optimizer, gradients)
    before = [p.detach().clone() for p in params]
    take(optimizer, gradients)
    for p, x in zip(params, before, strict=True):
        assert got[p].dtype == F64
        torch.testing.assert_close(got[p], (x - p.detach()) / lr, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_of_the_optimizer_changes(name: str) -> None:
    params, optimizer = build(OPTIMIZERS[name])
    take(optimizer, drawn(params))
    state = copy.deepcopy(optimizer.state_dict())
    values = [p.detach().clone() for p in params]
    gradients = drawn(params)
    kept = {p: g.clone() for p, g in gradients.items()}
    next_update(optimizer, gradients)
    now = optimizer.state_dict()
    assert str(now) == str(state) and now["param_groups"] == state["param_groups"]
    for index, entries in state["state"].items():
        for key, value in entries.items():
            assert torch.equal(torch.as_tensor(now["state"][index][key]), torch.as_tensor(value)), key
    assert all(torch.equal(p, x) for p, x in zip(params, values, strict=True))
    assert all(torch.equal(gradients[p], g) for p, g in kept.items())


@pytest.mark.parametrize("name", ["nadam", "adadelta", "adafactor", "lion", "hf adafactor", "schedule-free adamw"])
def test_float32_parameters_of_any_dimension_step_in_float64(name: str) -> None:
    params = [nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (5,), ())]
    optimizer = OPTIMIZERS[name](params)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(2):
        take(optimizer, drawn(params))
    gradients, lr = drawn(params), learning_rate(optimizer.param_groups[0])
    got = next_update(optimizer, gradients)
    before = [p.detach().clone() for p in params]
    take(optimizer, gradients)
    for p, x in zip(params, before, strict=True):
        torch.testing.assert_close(got[p], (x - p.detach()).double() / lr, rtol=1e-4, atol=1e-5)


def test_in_float32_muon_agrees_to_the_rounding_of_its_bfloat16() -> None:
    params, optimizer = build(OPTIMIZERS["muon"], torch.float32)
    gradients = drawn(params)
    got = next_update(optimizer, gradients)
    before = [p.detach().clone() for p in params]
    take(optimizer, gradients)
    for p, x in zip(params, before, strict=True):
        step = (x - p.detach()).double() / 0.1
        assert float((got[p] - step).norm() / step.norm()) < 2e-2


def test_adafactor_keeps_the_rounding_of_float32_as_its_smallest_moment() -> None:
    """Gradients below that: the step divides by 1.2e-7, not by their own size."""
    params, optimizer = build(lambda ps: optim.Adafactor(ps, lr=0.1), torch.float32)
    gradients = drawn(params, 1e-9)
    got = next_update(optimizer, gradients)
    before = [p.detach().double() for p in params]
    take(optimizer, gradients)
    for p, x in zip(params, before, strict=True):
        step = (x - p.detach().double()) / 0.1
        torch.testing.assert_close(got[p], step, rtol=1e-2, atol=5e-6)
        assert float(got[p].abs().max()) < 0.2  # 1 were it float64's


@pytest.mark.parametrize("name", ["muon", "lion", "nadam", "adadelta"])
def test_where_the_step_is_a_multiple_of_lr_the_update_does_not_know_it(name: str) -> None:
    params, optimizer = build(OPTIMIZERS[name])
    take(optimizer, drawn(params))
    gradients = drawn(params)
    want = next_update(optimizer, gradients)
    for lr in (0.0, 1e-12, torch.tensor(3.0, dtype=F64)):
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.testing.assert_close(next_update(optimizer, gradients)[params[0]], want[params[0]])


@pytest.mark.parametrize("name", ["adafactor", "schedule-free adamw"])
def test_where_it_is_no_multiple_a_rate_of_zero_is_an_error(name: str) -> None:
    params, optimizer = build(OPTIMIZERS[name])
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    with pytest.raises(RuntimeError, match=r"lr is 0, and the step of Ada\w+ is no multiple of lr: set lr first"):
        next_update(optimizer, drawn(params))


def test_a_first_rate_of_zero_among_others_a_closure_and_no_rate_are_errors() -> None:
    params, optimizer = build(lambda ps: optim.SGD(groups(ps, lr=0.3), lr=0.0))
    with pytest.raises(RuntimeError, match=r"the first group's lr is 0 and another's is 0\.3"):
        next_update(optimizer, drawn(params))
    with pytest.raises(TypeError, match="LBFGS has no update without a closure"):
        next_update(optim.LBFGS(params), drawn(params))
    optimizer.param_groups[0].pop("lr")
    with pytest.raises(TypeError, match=r"this optimizer has none, only \['dampening', "):
        next_update(optimizer, drawn(params))


def test_a_wrapper_is_looked_through_with_its_own_groups() -> None:
    class Wrapped(optim.Optimizer):
        def __init__(self, optimizer: optim.Optimizer) -> None:
            self.optimizer, self.param_groups = optimizer, [{**optimizer.param_groups[0], "weight_decay": 0.5}]

        def step(self, closure: Any = None) -> None:
            raise AssertionError("the wrapper's own step was taken")

    Wrapped.__module__ = "accelerate.optimizer"
    p = nn.Parameter(torch.ones(1, dtype=F64))
    got = next_update(Wrapped(optim.SGD([p], lr=0.1)), {p: torch.tensor([2.0], dtype=F64)})
    assert math.isclose(got[p].item(), 2.5)
