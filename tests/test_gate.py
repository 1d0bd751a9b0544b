"""A program is used only where it gives what eager torch gives: what export drops or freezes never reaches a number."""

from __future__ import annotations

import random
import warnings
from collections import UserDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sharpkern as sk
from sharpkern.curvature.engines import CHECK_EVERY
from sharpkern.rop import ReplayedProgram
from sharpkern.rop.double_backward import DoubleBackward
from sharpkern.rop.rule import RULES


def net(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), *(middle or [nn.Tanh()]), nn.Linear(6, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 4).double(), torch.randint(0, 3, (5,))


def eager(model: nn.Module, loss_fn, data, *, params=None) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and dense Hessian by autograd twice (the transposed derivative of the gradient)."""
    params = list(model.parameters()) if params is None else params
    loss = loss_fn(model(data[0]), data[1])
    parts = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    gradient = torch.cat([g.reshape(-1) for g in parts])
    rows = [
        torch.cat([
            h.reshape(-1)
            for h in torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True)
        ])
        for g in gradient
    ]  # fmt: skip
    return loss.detach(), gradient.detach(), torch.stack(rows)


def agrees(H: sk.HessianOperator, model: nn.Module, loss_fn, data, tolerance: float = 1e-10) -> None:
    loss, gradient, dense = eager(model, loss_fn, data)
    torch.testing.assert_close(H.loss, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(H.gradient, gradient, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(H @ torch.eye(H.n, dtype=torch.float64), dense.T, rtol=tolerance, atol=tolerance)


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):  # noqa: ARG004
        return torch.round(4 * z) / 4

    @staticmethod
    def backward(ctx, g):  # noqa: ARG004
        return g


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):  # noqa: ARG004
        return z.view_as(z)

    @staticmethod
    def backward(ctx, g):  # noqa: ARG004
        return -g


class Apply(nn.Module):
    def __init__(self, f) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


def hooked(x: Tensor) -> Tensor:
    y = torch.tanh(x)
    y.register_hook(lambda g: 0.1 * g)
    return y


def turned(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.reshape(-1, 3, 2)).abs().repeat(1, 2)


def noisy(x: Tensor) -> Tensor:
    return x + torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=x.dtype)


SEEN = {
    "straight-through": (lambda: Apply(lambda x: Round.apply(torch.tanh(x))), "autograd.Function Round"),
    "bound apply": (lambda: Apply(Round.apply), "autograd.Function Round"),
    "gradient reversal": (lambda: Apply(Reverse.apply), "autograd.Function Reverse"),
    "tensor hook": (lambda: Apply(hooked), "gradient hook"),
    "fft": (lambda: Apply(lambda x: torch.fft.fft(x).abs()), "complex"),
    "view as complex": (lambda: Apply(turned), "complex"),
    "own generator": (lambda: Apply(noisy), "Generator"),  # torch 2.11 names the class, with the line
    "branch on a value": (lambda: Apply(lambda x: x.tanh() if x.detach().sum().item() > -1e9 else x), "test_gate.py"),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_what_export_drops_goes_to_autograd_and_is_named(name: str) -> None:
    make, word = SEEN[name]
    model, data = net(make()), batch()
    with pytest.warns(UserWarning, match="autograd") as caught:
        H = sk.HessianOperator(model, F.cross_entropy, data)
    assert word in str(caught[0].message)
    assert isinstance(H._engine, DoubleBackward)
    agrees(H, model, F.cross_entropy, data)


def test_parameter_and_module_hooks_reach_the_trackers_gradient() -> None:
    model, data = net(), batch()
    mask = (torch.rand(6, 4) > 0.5).double()
    model[0].weight.register_hook(lambda g: g * mask)
    model[1].register_full_backward_hook(lambda m, gi, go: (0.1 * gi[0],))  # noqa: ARG005
    F.cross_entropy(model(data[0]), data[1]).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    with pytest.warns(UserWarning, match="gradient hook on 0.weight"):
        sk.SharpnessTracker(model, F.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1)).step(data)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[name], rtol=1e-12, atol=1e-14)


def test_hooks_that_come_later_are_seen_at_the_next_refresh() -> None:
    model, data = net(), batch()
    H = sk.HessianOperator(model, F.cross_entropy, data)
    model[0].weight.register_hook(lambda g: 3 * g)
    with pytest.warns(UserWarning, match="gradient hook"):
        H.refresh()
    torch.testing.assert_close(H.gradient, eager(model, F.cross_entropy, data)[1])


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


def test_penalty_by_autograd_grad_in_the_loss() -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net(nn.Softplus())

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            u = self.inner(x)
            return u + torch.autograd.grad(u.sum(), x, create_graph=True)[0].square().sum()

    model, data = Penalised(), batch()
    with pytest.warns(UserWarning, match="autograd"):
        H = sk.HessianOperator(model, F.cross_entropy, data)
    agrees(H, model, F.cross_entropy, data)


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


def test_python_and_numpy_randomness_is_not_frozen() -> None:
    class LayerDrop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x if random.random() < 0.5 else x + torch.tanh(self.inner(x))

    with pytest.warns(UserWarning, match="Python's random module"):
        H = sk.HessianOperator(net(LayerDrop()), F.cross_entropy, batch())
    losses = set()
    for _ in range(30):
        H.refresh()
        losses.add(float(H.loss))
    assert len(losses) == 2


def test_a_buffer_bound_anew_is_updated() -> None:
    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("ema", torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            self.ema = 0.9 * self.ema + 0.1 * x.detach().mean(0)
            return torch.tanh(x - self.ema)

    model, twin, data = net(Average()), net(Average()), batch()
    twin.load_state_dict(model.state_dict())
    tracker = sk.SharpnessTracker(model, F.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.0))
    with pytest.warns(UserWarning, match="autograd"):
        tracker.step(data)
    for _ in range(2):
        tracker.step(data)
    for _ in range(3):
        twin(data[0])
    torch.testing.assert_close(model[1].ema, twin[1].ema)


def test_building_an_operator_leaves_statistics_of_captured_modules_alone() -> None:
    judge, model, data = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).double(), net(), batch()
    before = {name: b.clone() for name, b in judge.named_buffers()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        H = sk.HessianOperator(model, lambda o, t: judge(o).square().mean() + F.cross_entropy(o, t), data)
        H.refresh()
    assert all(torch.equal(b, before[name]) for name, b in judge.named_buffers())


def test_teacher_whose_data_is_assigned_is_followed() -> None:
    model, teacher, data = net(), net(), batch()
    loss_fn = lambda o, t: (o - teacher(data[0]).detach()).square().mean()  # noqa: E731, ARG005
    H = sk.HessianOperator(model, loss_fn, data)
    for p in teacher.parameters():
        p.data = p.data + 1.0
    H.refresh()
    agrees(H, model, loss_fn, data)


def test_products_after_data_was_written_raise() -> None:
    model = net()
    H = sk.HessianOperator(model, F.cross_entropy, batch())
    model[0].weight.data.add_(0.3)
    with pytest.raises(RuntimeError, match="refresh"):
        H @ torch.ones(H.n, dtype=torch.float64)


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


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (torch.randn(8, 4), "a tensor of shape"),
        ([torch.randn(8, 4)], "a list of 1"),
        ((torch.randn(8, 4), torch.ones(8), torch.ones(8)), "a tuple of 3"),
    ],
)
def test_batches_that_would_be_guessed_are_refused(data, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sk.HessianOperator(nn.Linear(4, 4), lambda o, _: o.square().mean(), data)


@pytest.mark.parametrize(
    ("loss_fn", "words"),
    [
        (lambda o, t: {"loss": F.cross_entropy(o, t)}, r"a dict with \['loss'\]"),
        (lambda o, t: (F.cross_entropy(o, t), o), "a tuple"),
        (lambda o, t: F.cross_entropy(o, t).item(), "got a float"),
        (lambda o, t: F.cross_entropy(o, t, reduction="none"), r"got shape \[5\]"),
        (lambda o, t: F.cross_entropy(o.detach(), t), "got a constant"),
    ],
)
def test_losses_that_are_no_scalar_are_refused(loss_fn, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sk.HessianOperator(net(), loss_fn, batch())


def test_a_users_own_error_is_not_blamed_on_the_export() -> None:
    def broken(output: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG001
        raise KeyError("labels")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError, match="labels"):
            sk.HessianOperator(net(), broken, batch())


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


def test_gauss_newton_needs_outputs_that_it_can_see() -> None:
    @dataclass
    class Output:
        logits: Tensor

    wrapped = net(Apply(torch.tanh))

    class Wrapped(nn.Module):
        def __init__(self, form) -> None:
            super().__init__()
            self.inner, self.form = wrapped, form

        def forward(self, x: Tensor):
            return self.form(self.inner(x))

    data = batch()
    with pytest.raises(ValueError, match="Output"):
        sk.GGNOperator(Wrapped(Output), lambda o, t: F.cross_entropy(o.logits, t), data)
    own_loss = Wrapped(lambda o: {"loss": F.cross_entropy(o, data[1]), "logits": o})
    with pytest.raises(ValueError, match="computes the loss itself"):
        sk.GGNOperator(own_loss, lambda o, _: o["loss"], data)


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


def test_parameters_that_would_not_be_trained_as_in_eager_torch_are_refused() -> None:
    model, data, weight = net(), batch(), nn.Parameter(torch.ones(()).double())
    loss_fn = lambda o, t: weight * F.cross_entropy(o, t)  # noqa: E731
    more = torch.optim.SGD([*model.parameters(), weight], lr=0.1)
    with pytest.raises(ValueError, match="not the model's"):
        sk.SharpnessTracker(model, loss_fn, more).step(data)
    fewer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with pytest.raises(ValueError, match="lacks trainable parameters of the model: .'0.weight'"):
        sk.SharpnessTracker(model, F.cross_entropy, fewer).step(data)
    model[0].weight.register_post_accumulate_grad_hook(lambda p: None)  # noqa: ARG005
    with pytest.raises(ValueError, match=r"backward\(\) only"):
        sk.SharpnessTracker(model, F.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1)).step(data)


def test_a_counter_of_forward_passes_costs_no_check_at_each_refresh() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return torch.tanh(x)

    model, data = net(Counting()), batch()
    H = sk.HessianOperator(model, F.cross_entropy, data)
    assert isinstance(H.engine, ReplayedProgram)
    seen = model[1].calls
    for _ in range(10):
        H.refresh()
    assert model[1].calls <= seen + 1
    agrees(H, model, F.cross_entropy, data)


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
