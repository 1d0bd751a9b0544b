"""Which engine a loss gets, how many are made, and when none is asked for anew."""

from __future__ import annotations

import warnings
from collections import UserDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import agrees, batch, net
from torch import Tensor, nn

import sharpkern as sk
from sharpkern.curvature import engines
from sharpkern.rop import ReplayedProgram


def test_a_value_that_changes_at_every_step_ends_in_autograd_with_one_warning() -> None:
    model, data, step = net(), batch(), [0]

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets) + (0.1 * (step[0] - 3) if step[0] > 3 else 0.0) * output.square().mean()

    tracker = sk.SharpnessTracker(model, loss_fn, torch.optim.SGD(model.parameters(), lr=0.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step[0] in range(12):
            record = tracker.step(data)
            assert record.loss == pytest.approx(float(loss_fn(model(data[0]), data[1])), rel=1e-12)
    messages = [str(w.message) for w in caught if "sharpkern" in str(w.message)]
    assert len(messages) == 1
    assert "step" in messages[0]
    assert "0-d" in messages[0]


def test_values_that_change_now_and_then_stay_with_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sharpkern.curvature.engines._RECENT", 3)
    model, data, weight = net(), batch(), 0.0
    loss_fn = lambda o, t: F.cross_entropy(o, t) + weight * o.square().mean()  # noqa: E731
    H = sk.HessianOperator(model, loss_fn, data)
    for phase in range(6):
        weight = 0.5 * phase
        for _ in range(4):
            H.refresh()
        assert isinstance(H.engine, ReplayedProgram)
        torch.testing.assert_close(H.loss, loss_fn(model(data[0]), data[1]).detach())


def test_a_map_that_each_pass_leaves_behind_costs_no_check_at_each_refresh() -> None:
    class Keeping(nn.Module):
        kept = None

        def forward(self, x: Tensor) -> Tensor:
            self.kept = torch.tanh(x)
            return self.kept

    model, data = net(Keeping()), batch()
    H = sk.HessianOperator(model, F.cross_entropy, data)
    assert isinstance(H.engine, ReplayedProgram)
    seen = model[1].kept
    assert type(seen) is Tensor, "a tensor of the trace is left"
    for _ in range(10):
        H.refresh()
    assert model[1].kept is seen
    agrees(H, model, F.cross_entropy, data)


def test_mappings_of_another_class_are_taken_as_dicts_by_one_engine() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor, y: Tensor, names: list[str] | None = None) -> Tensor:  # noqa: ARG002
            return self.inner(x)

    model = Named()
    H = None
    for i in range(5):
        data = UserDict(zip("xy", batch(), strict=True)) | {"names": [f"image {i}"]}
        if H is None:
            H = sk.HessianOperator(model, lambda o, b: F.cross_entropy(o, b["y"]), data)
        else:
            H.refresh(data)
    assert len(H._engines) == 1
    assert isinstance(H._engine, ReplayedProgram)


def test_arrays_in_a_batch_are_compared_by_their_numbers() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor, y: Tensor, ids: np.ndarray) -> Tensor:  # noqa: ARG002
            return self.inner(x)

    data = [dict(zip("xy", batch(), strict=True)) | {"ids": np.arange(i, i + 5)} for i in range(3)]
    with pytest.warns(UserWarning, match="numpy"):
        H = sk.HessianOperator(Named(), lambda o, b: F.cross_entropy(o, b["y"]), data[0])
    for d in data:
        H.refresh(d)
        torch.testing.assert_close(H.loss, F.cross_entropy(H.module.model.inner(d["x"]), d["y"]).detach())


def test_a_users_own_error_is_not_blamed_on_the_export() -> None:
    def broken(output: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG001
        raise KeyError("labels")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError, match="labels"):
            sk.HessianOperator(net(), broken, batch())


class _Weighted:
    def __init__(self) -> None:
        self.weight = 0.5

    def __call__(self, output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets) + self.weight * output.square().mean()


def _counted_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count eager passes from outside: a counter of the loss's own would be a value that it changes."""
    runs: list[int] = []
    right = engines.run_eagerly
    monkeypatch.setattr(engines, "run_eagerly", lambda *args: runs.append(1) or right(*args))
    return runs


def test_a_changed_value_costs_one_eager_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, loss_fn, runs = net(), batch(), _Weighted(), _counted_passes(monkeypatch)
    H = sk.HessianOperator(model, loss_fn, data)
    assert len(runs) == 1
    loss_fn.weight = 0.7
    H.refresh()
    assert len(runs) == 2
    assert isinstance(H.engine, ReplayedProgram)
    agrees(H, model, loss_fn, data)


def test_a_check_that_fails_costs_one_eager_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hidden:
        __slots__ = ("value",)

    monkeypatch.setattr("sharpkern.curvature.engines.CHECK_EVERY", 3)
    hidden, weighted, model, data = Hidden(), _Weighted(), net(), batch()
    runs = _counted_passes(monkeypatch)
    hidden.value = 1.0
    loss_fn = lambda o, t: getattr(hidden, "".join(["val", "ue"])) * weighted(o, t)  # noqa: E731
    H = sk.HessianOperator(model, loss_fn, data)
    hidden.value = 2.0
    for _ in range(3):
        H.refresh()
    assert len(runs) == 2
    agrees(H, model, loss_fn, data)


def test_hooks_get_real_tensors_back_without_a_second_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, kept, gradients = net(), batch(), [], []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: gradients.append(1) or grad(*a, **k))

    def keep(_: nn.Module, __: object, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    model[1].register_forward_hook(keep)
    H = sk.HessianOperator(model, F.cross_entropy, data)
    assert isinstance(H.engine, ReplayedProgram)
    assert len(gradients) == 1
    assert type(kept[-1]) is Tensor
    torch.testing.assert_close(kept[-1].detach(), torch.tanh(model[0](data[0])).detach(), rtol=1e-12, atol=0)
    assert kept[-1].requires_grad
    with pytest.raises(Exception, match="hook"):  # the graph that the hook holds has kept no activations
        kept[-1].sum().backward()


class Hooked(nn.Module):
    """Puts hooks on a tensor in its forward pass, which torch allows only where gradients are recorded."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        y.retain_grad()
        return y


@pytest.mark.parametrize("grad", [False, True])
def test_a_gauss_newton_matrix_of_a_model_that_puts_hooks_on_its_tensors(grad: bool) -> None:
    model, plain, data = net(Hooked()), net(), batch()
    plain.load_state_dict(model.state_dict())
    with torch.set_grad_enabled(grad):
        G = sk.GGNOperator(model, F.cross_entropy, data)
        E = sk.EmpiricalFisherOperator(model, F.cross_entropy, data)
    torch.testing.assert_close(G.to_dense(), sk.GGNOperator(plain, F.cross_entropy, data).to_dense())
    torch.testing.assert_close(E.to_dense(), sk.EmpiricalFisherOperator(plain, F.cross_entropy, data).to_dense())


def test_the_warning_points_at_the_line_outside_of_the_package() -> None:
    model = net()
    model[0].weight.register_hook(lambda g: g)
    with pytest.warns(UserWarning, match="gradient hook") as caught:
        sk.sharpness(model, F.cross_entropy, batch())
    assert caught[0].filename == __file__
