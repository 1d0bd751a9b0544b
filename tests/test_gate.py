"""A program is used only where it gives what eager torch gives, at first and at every later check."""

from __future__ import annotations

import copy
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from small_models import Apply, agrees, batch, eager, net
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sharpkern as sk
from sharpkern.curvature.engines import CHECK_EVERY
from sharpkern.rop import ReplayedProgram
from sharpkern.rop.rule import RULES


def test_a_wrong_rule_never_reaches_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = RULES[torch.ops.aten.tanh.default]
    right = cls.backward
    monkeypatch.setattr(cls, "backward", lambda self, *args: tuple(-g for g in right(self, *args)))
    model, data = net(), batch()
    with pytest.warns(UserWarning, match="differs from the eager model in the gradient of '0"):
        H = sk.HessianOperator(model, F.cross_entropy, data)
    agrees(H, model, F.cross_entropy, data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trusting = sk.HessianOperator(model, F.cross_entropy, data, verify=False)
    assert float((trusting.gradient - H.gradient).abs().max()) > 1e-3


def test_a_change_that_cannot_be_seen_is_found_at_the_next_check() -> None:
    class Hidden:
        __slots__ = ("value",)

    hidden = Hidden()
    hidden.value = 1.0
    read = {"f": lambda: getattr(hidden, "".join(["val", "ue"]))}["f"]
    model, data = net(), batch()
    loss_fn = lambda o, t: read() * F.cross_entropy(o, t)  # noqa: E731
    H = sk.HessianOperator(model, loss_fn, data)
    hidden.value = 2.0
    for _ in range(CHECK_EVERY):
        H.refresh()
    agrees(H, model, loss_fn, data)


def test_programs_that_take_turns_are_each_checked() -> None:
    class Hidden:
        __slots__ = ("value",)

    hidden = Hidden()
    hidden.value = 1.0
    model, large = net(), batch()
    small = large[0][:3], large[1][:3]
    loss_fn = lambda o, t: getattr(hidden, "".join(["val", "ue"])) * F.cross_entropy(o, t)  # noqa: E731
    H = sk.HessianOperator(model, loss_fn, large)
    H.refresh(small)
    hidden.value = 2.0
    for _ in range(CHECK_EVERY + 1):
        H.refresh(large)
        H.refresh(small)
    for data in (large, small):
        H.refresh(data)
        torch.testing.assert_close(H.loss, loss_fn(model(data[0]), data[1]).detach())


def test_buffers_and_random_states_are_left_alone() -> None:
    model, data = net(nn.BatchNorm1d(6), nn.Dropout(0.5)), batch()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state, python = torch.get_rng_state(), random.getstate()
    H = sk.HessianOperator(model, F.cross_entropy, data)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert random.getstate() == python
    assert all(p.grad is None for p in model.parameters())
    torch.set_rng_state(state)  # one primal sweep has drawn one mask, as a training step does
    loss = F.cross_entropy(model(data[0]), data[1])
    torch.testing.assert_close(H.loss, loss.detach())


def test_building_an_operator_leaves_statistics_of_captured_modules_alone() -> None:
    judge, model, data = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).double(), net(), batch()
    before = {name: b.clone() for name, b in judge.named_buffers()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        H = sk.HessianOperator(model, lambda o, t: judge(o).square().mean() + F.cross_entropy(o, t), data)
        H.refresh()
    assert all(torch.equal(b, before[name]) for name, b in judge.named_buffers())


def test_captured_parameters_are_parameters() -> None:
    model, data = net(), batch()
    captured, weight = list(model.parameters()), model[0].weight

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets) + 0.5 * sum(p.square().sum() for p in captured) + weight.sum() ** 2

    H = sk.HessianOperator(model, loss_fn, data)
    assert isinstance(H._engine, ReplayedProgram)
    agrees(H, model, loss_fn, data)
    with torch.no_grad():
        weight.mul_(1.3)
    H.refresh()
    agrees(H, model, loss_fn, data)


def test_reentrant_checkpoints_stay_in_the_program() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda z: torch.tanh(self.inner(z)), x, use_reentrant=True)

    model, data = net(Checkpointed()), batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        H = sk.HessianOperator(model, F.cross_entropy, data)
    assert isinstance(H._engine, ReplayedProgram)
    plain = net(Apply(lambda x: torch.tanh(model[1].inner(x))))
    plain[0], plain[2] = model[0], model[2]
    params = list(model.parameters())
    _, gradient, dense = eager(plain, F.cross_entropy, data, params=params)
    torch.testing.assert_close(H.gradient, gradient)
    torch.testing.assert_close(H @ torch.eye(H.n, dtype=torch.float64), dense)


@pytest.mark.parametrize(("layer", "sweeps"), [(nn.Tanh(), 1), (nn.Dropout(0.5), 2), (nn.BatchNorm1d(4), 2)])
def test_the_comparisons_sweeps_serve_the_refresh_where_nothing_is_drawn_or_written(
    layer: nn.Module, sweeps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    original = ReplayedProgram.forward
    monkeypatch.setattr(ReplayedProgram, "forward", lambda *a, **k: (runs.append(1), original(*a, **k))[1])
    model = nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 2)).double()
    batch = torch.randn(6, 3).double(), torch.randint(2, (6,))
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    H = sk.HessianOperator(model, nn.CrossEntropyLoss(), batch, update_buffers=True)
    assert len(runs) == sweeps
    torch.manual_seed(1)
    loss = nn.functional.cross_entropy(twin(batch[0]), batch[1])
    assert float(H.loss) == pytest.approx(loss.item(), rel=1e-12)
    g = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(twin.parameters()))])
    torch.testing.assert_close(H.gradient, g, rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)
    H.refresh()
    assert len(runs) == sweeps + 1
