"""Python values: those that the forward pass itself changes, and those that change where only its code can reach."""

from __future__ import annotations

import copy
import functools
import itertools
import random
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import agrees, batch, eager, net
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sharpkern as sk
from sharpkern.curvature.repeatable import ChangedLossError, NotRepeatableError
from sharpkern.rop.double_backward import DoubleBackward

SLOPE = 1.0


class Moving(nn.Module):
    """A layer whose forward pass changes something that the next pass sees."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.count, self.values, self.last = kind, 0, [1.0], None
        self.noise, self.numpy, self.python = (
            torch.Generator().manual_seed(3),
            np.random.default_rng(3),
            random.Random(3),
        )
        self.steps = itertools.count(1)
        self.table = torch.ones(6, dtype=torch.float64)
        self.teacher = nn.Linear(4, 6).double().requires_grad_(False)

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(getattr(self, self.kind)(h))

    def counter(self, h: Tensor) -> Tensor:
        self.count += 1
        return h * self.count

    def appended(self, h: Tensor) -> Tensor:
        self.values.append(0.5)
        return h * sum(self.values)

    def remembered(self, h: Tensor) -> Tensor:
        before, self.last = self.last, h.detach()
        return h if before is None else h + before

    def rebound(self, h: Tensor) -> Tensor:
        self.table = 0.5 * self.table + h.detach().mean(0)
        return h * self.table

    def written(self, h: Tensor) -> Tensor:
        result = h * self.table.clone()
        self.table.mul_(0.5).add_(h.detach().mean(0))
        return result

    def followed(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            self.teacher.weight.mul_(0.5).add_(h.mean())
        return h + self.teacher.weight.sum()

    def torch_noise(self, h: Tensor) -> Tensor:
        return h * torch.rand(6, generator=self.noise, dtype=torch.float64)

    def numpy_noise(self, h: Tensor) -> Tensor:
        return h * float(self.numpy.uniform(0.5, 1))

    def python_noise(self, h: Tensor) -> Tensor:
        return h * self.python.uniform(0.5, 1)


REWOUND = [
    "counter", "appended", "remembered", "rebound", "written", "followed", "torch_noise", "numpy_noise", "python_noise",
]  # fmt: skip


class Taking(Moving):
    def taken(self, h: Tensor) -> Tensor:
        return h / next(self.steps)


def twins(kind: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = net(Taking(kind) if kind == "taken" else Moving(kind))
    twin = net(Taking(kind) if kind == "taken" else Moving(kind))
    twin.load_state_dict(model.state_dict())
    return model, twin


@pytest.mark.filterwarnings("ignore:sharpkern. this model does not export")
@pytest.mark.parametrize("kind", [*REWOUND, "taken"])
def test_a_tracker_moves_what_the_forward_pass_moves_once_per_step(kind: str) -> None:
    model, twin = twins(kind)
    tracker = sk.SharpnessTracker(model, F.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.0), max_matvecs=2)
    for _ in range(3):
        data = batch()
        record = tracker.step(data)
        loss = F.cross_entropy(twin(data[0]), data[1])
        twin.zero_grad()
        loss.backward()
        assert record.loss == pytest.approx(float(loss.detach()), rel=1e-12)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert p.grad is None if q.grad is None else torch.allclose(p.grad, q.grad, rtol=1e-10, atol=1e-13)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("kind", REWOUND)
def test_an_operator_leaves_what_the_forward_pass_moves(kind: str) -> None:
    model, twin = twins(kind)
    data = batch()
    what = "a tensor of shape" if kind in ("written", "followed") else "model.1."
    with pytest.warns(UserWarning, match=f"its own forward pass changes \\({what}"):
        H = sk.HessianOperator(model, F.cross_entropy, data)
    assert isinstance(H.engine, DoubleBackward)
    H.refresh()  # sees the same values again
    loss, gradient, dense = eager(twin, F.cross_entropy, data, params=trained(twin))
    torch.testing.assert_close(H.loss, loss)
    torch.testing.assert_close(H.gradient, gradient)
    torch.testing.assert_close(H @ torch.eye(H.n, dtype=torch.float64), dense)


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def scaled(h: Tensor) -> Tensor:
    return SLOPE * h


class Slotted:
    __slots__ = ("slope",)

    def __init__(self, slope: float) -> None:
        self.slope = slope


class Configured:
    slope = 1.0


class Global(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(scaled(h))


class OfClass(nn.Module):
    slope = 1.0

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(self.slope * h)


class Reading(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(self.config.slope * h)


def test_values_that_only_the_code_can_reach_are_followed() -> None:
    slots, space, hooked = Slotted(1.0), SimpleNamespace(slope=1.0), {"slope": 1.0}
    model, data = net(Global(), OfClass(), Reading(slots), Reading(space), Reading(Configured)), batch()
    model[0].register_forward_hook(lambda m, inputs, h: hooked["slope"] * h)  # noqa: ARG005
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    smooth = functools.partial(F.cross_entropy, label_smoothing=0.0)

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        return smooth(output, targets) + optimizer.param_groups[0]["lr"] * output.square().mean()

    H = sk.HessianOperator(model, loss_fn, data)
    agrees(H, model, loss_fn, data)
    for i, change in enumerate([
        lambda: globals().update(SLOPE=0.5),
        lambda: setattr(OfClass, "slope", 0.6),
        lambda: setattr(slots, "slope", 0.7),
        lambda: setattr(space, "slope", 0.8),
        lambda: setattr(Configured, "slope", 0.9),
        lambda: hooked.update(slope=1.1),
        lambda: smooth.keywords.update(label_smoothing=0.2),
        lambda: optimizer.param_groups[0].update(lr=0.3),
        lambda: setattr(model[1], "forward", torch.sin),
        lambda: setattr(OfClass, "forward", lambda self, h: torch.cos(h)),  # noqa: ARG005
    ]):  # fmt: skip
        change()
        assert not H._engines.unchanged(), i
        loss = loss_fn(model(data[0]), data[1]).detach()
        # The fourth is one export too many, and double backward takes over.
        with pytest.warns(UserWarning, match="changes from step to step") if i == 3 else nullcontext():
            H.refresh()
        torch.testing.assert_close(H.loss, loss, rtol=1e-12, atol=0)
    agrees(H, model, loss_fn, data)


def test_a_global_is_not_taken_for_an_attribute_or_a_local_of_its_name() -> None:
    globals().update(h=0.0, config=0.0)
    H = sk.HessianOperator(net(Reading(SimpleNamespace(slope=1.0))), F.cross_entropy, batch())
    globals().update(h=1.0, config=1.0)
    assert H._engines.unchanged()


def test_products_see_the_numbers_that_the_pass_wrote_and_the_tensor_keeps_its_own() -> None:
    memory, shift = torch.rand(4).double(), torch.randn(4).double()

    def loss_fn(params: dict[str, torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        memory.mul_(0.5).add_(batch)
        return torch.tanh(params["w"] * memory).square().sum()

    before, w, v = memory.clone(), torch.randn(4).double(), torch.randn(4).double()
    with pytest.warns(UserWarning, match="autograd"):
        H = sk.HessianOperator(None, loss_fn, shift, params={"w": w})
    now = 0.5 * before + shift
    dense = torch.autograd.functional.hessian(lambda w: torch.tanh(w * now).square().sum(), w)
    torch.testing.assert_close(H @ v, dense @ v, rtol=1e-10, atol=1e-12)
    assert torch.equal(memory, before)


class Checkpointed(nn.Module):
    """A region that runs once more in every backward pass, and moves statistics and a counter each time."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.reentrant, self.passes = reentrant, 0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.region, self.first(x), use_reentrant=self.reentrant))

    def region(self, h: Tensor) -> Tensor:
        self.passes += 1
        return torch.tanh(self.norm(h))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:sharpkern. this model does not export")
def test_products_through_a_checkpoint_move_nothing(reentrant: bool) -> None:
    model = Checkpointed(reentrant).double()
    twin = copy.deepcopy(model)
    optimizer, plain = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    x, y = torch.randn(12, 4).double(), torch.randint(0, 3, (12,))
    tracker = sk.SharpnessTracker(model, F.cross_entropy, optimizer)
    for _ in range(3):
        tracker.step((x, y))
        before = [b.clone() for b in model.buffers()]
        tracker.observe((x, y))
        assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
        optimizer.step()
        plain.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        plain.step()
        assert model.passes == twin.passes
        for a, b in zip([*model.buffers(), *model.parameters()], [*twin.buffers(), *twin.parameters()], strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:sharpkern. this model does not export")
def test_passes_beside_training_are_refused_where_they_would_take_from_an_iterator() -> None:
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    for use in (
        lambda m: sk.SharpnessTracker(m, F.cross_entropy, sgd(m.parameters())).observe(batch()),
        lambda m: sk.SharpnessTracker(m, F.cross_entropy, sgd(m.parameters()), probe=batch()).step(batch()),
        lambda m: sk.SharpnessTracker(m, F.cross_entropy, sgd(m.parameters())).step(
            sk.MicroBatches([batch(), batch()])
        ),
        lambda m: sk.DatasetHessian(m, F.cross_entropy, [batch(), batch()]),
    ):
        model, _ = twins("taken")
        with pytest.raises(NotRepeatableError, match=r"reads an iterator \(model\.1\.steps\)"):
            use(model)


@pytest.mark.filterwarnings("ignore:sharpkern. this model does not export")
@pytest.mark.parametrize("kind", REWOUND)
def test_micro_batches_that_are_run_again_see_the_same_values_or_are_refused(kind: str) -> None:
    model, twin = twins(kind)
    parts = [batch(), batch()]
    H = sk.ChunkedHessian(model, F.cross_entropy, sk.MicroBatches(parts), update_buffers=True)
    total = sum(len(y) for _, y in parts)
    losses = [F.cross_entropy(twin(x), y) * len(y) / total for x, y in parts]
    torch.testing.assert_close(H.loss, sum(losses).detach())
    with pytest.raises(ChangedLossError, match=r"micro-batch \d gave a loss of"):
        H.matvec(torch.ones(H.n, dtype=torch.float64))
    # A tracker notes that it could not measure, and training goes on.
    tracker = sk.SharpnessTracker(model, F.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match=r"micro-batch \d gave a loss of"):
        assert tracker.step(sk.MicroBatches(parts)).status == "failed"
