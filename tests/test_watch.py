"""What a program has frozen is followed: Python values, modules, parameters, hooks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_models import agrees, batch, eager, net
from torch import Tensor, nn

import sharpkern as sk


def test_annealed_python_values_are_followed() -> None:
    model, data = net(nn.Dropout(0.0)), batch()
    weight, box = 0.0, {"scale": 1.0}

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        return box["scale"] * F.cross_entropy(output, targets) + weight * output.square().mean()

    H = sk.HessianOperator(model, loss_fn, data)
    agrees(H, model, loss_fn, data)
    weight = 5.0
    H.refresh()
    agrees(H, model, loss_fn, data)
    box["scale"] = 0.3
    H.refresh()
    agrees(H, model, loss_fn, data)
    assert len(H._engines) == 3
    model[1].p = 1.0  # everything is dropped
    H.refresh()
    torch.testing.assert_close(H.loss, loss_fn(model(data[0]), data[1]).detach())


def test_hooks_that_come_later_are_seen_at_the_next_refresh() -> None:
    model, data = net(), batch()
    H = sk.HessianOperator(model, F.cross_entropy, data)
    model[0].weight.register_hook(lambda g: 3 * g)
    with pytest.warns(UserWarning, match="gradient hook"):
        H.refresh()
    torch.testing.assert_close(H.gradient, eager(model, F.cross_entropy, data)[1])


def test_teacher_whose_data_is_assigned_is_followed() -> None:
    model, teacher, data = net(), net(), batch()
    loss_fn = lambda o, t: (o - teacher(data[0]).detach()).square().mean()  # noqa: E731, ARG005
    H = sk.HessianOperator(model, loss_fn, data)
    for p in teacher.parameters():
        p.data = p.data + 1.0
    H.refresh()
    agrees(H, model, loss_fn, data)


def test_frozen_unfrozen_and_replaced_parameters_are_followed() -> None:
    model, data = net(), batch()
    model[0].requires_grad_(False)
    H = sk.HessianOperator(model, F.cross_entropy, data)
    assert H.n == 21
    model[0].requires_grad_(True)
    H.refresh()
    agrees(H, model, F.cross_entropy, data)
    model[2] = nn.Linear(6, 3).double()
    H.refresh()
    agrees(H, model, F.cross_entropy, data)
    model.load_state_dict({name: t.clone() for name, t in net().state_dict().items()}, assign=True)
    H.refresh()
    agrees(H, model, F.cross_entropy, data)


def test_the_tracker_follows_unfrozen_and_new_layers() -> None:
    model, data = net(), batch()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    tracker = sk.SharpnessTracker(model, F.cross_entropy, optimizer, tol=1e-6)
    tracker.step(data)
    model[0].requires_grad_(True)
    for _ in range(2):
        record = tracker.step(data)
        assert record.sharpness == pytest.approx(sk.sharpness(model, F.cross_entropy, data, tol=1e-8).value, rel=1e-6)
        assert float(model[0].weight.grad.norm()) > 0
    model[2] = nn.Linear(6, 3).double()
    tracker.optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    record = tracker.step(data)
    loss, gradient, dense = eager(model, F.cross_entropy, data)
    assert record.loss == pytest.approx(float(loss), rel=1e-12)
    torch.testing.assert_close(torch.cat([p.grad.reshape(-1) for p in model.parameters()]), gradient)
    assert record.sharpness == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-6)
