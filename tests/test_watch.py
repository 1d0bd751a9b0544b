"""What a program has frozen is followed: Python values, modules, parameters, hooks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import agrees, batch, eager, net
from torch import Tensor, nn

import sharpkern as sk
from sharpkern.curvature.losses import LossModule
from sharpkern.curvature.watch import Kept, Snapshot, changes

FACTOR = 1.0


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


def test_a_global_that_a_function_inside_the_loss_reads_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = net(), batch()

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        def scaled(loss: Tensor) -> Tensor:
            return FACTOR * loss

        return scaled(F.cross_entropy(output, targets))

    H = sk.HessianOperator(model, loss_fn, data)
    monkeypatch.setattr(f"{__name__}.FACTOR", 3.0)
    H.refresh()
    agrees(H, model, loss_fn, data)


def test_what_a_hook_reads_is_followed() -> None:
    model, data, factor = net(), batch(), 1.0
    model[0].register_forward_hook(lambda m, inputs, h: factor * h)  # noqa: ARG005
    H = sk.HessianOperator(model, F.cross_entropy, data)
    factor = 2.0
    H.refresh()
    agrees(H, model, F.cross_entropy, data)


def test_a_forward_hook_and_a_layer_that_come_later_are_followed() -> None:
    model, data = net(), batch()
    H = sk.HessianOperator(model, F.cross_entropy, data)
    model[0].register_forward_hook(lambda m, inputs, h: 2 * h)  # noqa: ARG005
    H.refresh()
    agrees(H, model, F.cross_entropy, data)
    model.append(nn.Softplus())
    H.refresh()
    agrees(H, model, F.cross_entropy, data)


def test_a_loader_is_followed_to_unfrozen_layers() -> None:
    model, data = net(), batch()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    tracker = sk.SharpnessTracker(model, F.cross_entropy, optimizer, tol=1e-6, loader=[batch(), batch()])
    tracker.step(data)
    model[0].requires_grad_(True)
    record = tracker.step(data)
    dense = torch.stack([eager(model, F.cross_entropy, part)[2] for part in tracker._target.loader]).mean(0)
    assert record.sharpness == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-6)


def test_autocast_that_is_switched_on_later_is_followed() -> None:
    model, (x, y) = net().float(), batch()
    data = (x.float(), y)
    H = sk.HessianOperator(model, F.cross_entropy, data)
    before, loss = H.engine, H.loss.clone()
    with torch.autocast("cpu", torch.bfloat16):
        H.refresh()
        assert H.engine is not before
        torch.testing.assert_close(H.loss, F.cross_entropy(model(data[0]), y).detach(), rtol=1e-2, atol=1e-3)
    H.refresh()
    assert H.engine is before
    assert torch.equal(H.loss, loss)


class Holding(nn.Module):
    """Reads and changes a value of each kind that a forward pass can change."""

    def __init__(self) -> None:
        super().__init__()
        count = 0

        def counted() -> int:
            nonlocal count
            count += 1
            return count

        self.counted, self.limit = counted, math.nan
        self.array, self.table, self.values = np.ones(3), torch.ones(2), [1.0, 2.0]
        self.noise, self.numpy = torch.Generator().manual_seed(1), np.random.default_rng(1)

    def forward(self, h: Tensor) -> Tensor:
        self.array[0] += 1
        self.table.mul_(2)
        self.values.append(float(self.numpy.uniform()))
        drawn = torch.rand((), generator=self.noise)
        return h * self.counted() * drawn if self.limit != 0 else h


def values_of(m: Holding) -> list[Any]:
    states = m.noise.get_state().tolist(), m.numpy.bit_generator.state
    return [m.array.tolist(), m.table.tolist(), list(m.values), *states, m.counted.__closure__[0].cell_contents]


def test_all_that_a_pass_has_changed_is_put_back() -> None:
    holding = Holding()
    module = LossModule(net(holding), F.cross_entropy)
    before = values_of(holding)
    kept = Kept(module)
    module(batch())
    assert all(now != then for now, then in zip(values_of(holding), before, strict=True))
    kept.put_back()
    assert values_of(holding) == before


def test_nan_is_no_change() -> None:
    module = LossModule(net(Holding()), F.cross_entropy)
    first, second = Snapshot(module), Snapshot(module)
    assert "nan" in first.values.values()
    assert list(changes(first.values, second.values)) == []
    module.model[1].limit = 1.0
    assert len(list(changes(first.values, Snapshot(module).values))) == 1


def test_a_graph_holds_copies_of_what_is_put_back_and_refuses_what_has_changed_otherwise() -> None:
    holding = Holding()
    kept = Kept(LossModule(net(holding), F.cross_entropy))
    w, other = torch.ones(2, requires_grad=True), torch.ones(2)
    with kept.for_graph():
        y, z = (w * holding.table).sum(), (w * other).sum()
    holding.table.fill_(9)
    assert torch.autograd.grad(y, w)[0].tolist() == [1.0, 1.0]
    other.fill_(9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(z, w)
