"""The critical learning rate against closed forms on quadratics and against steps of torch's own optimizers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import PROBLEMS
from torch import Tensor, nn

import sharpkern as sk
from sharpkern.optimizers.next_update import next_update
from sharpkern.train.config import DataConfig
from sharpkern.train.data import load
from sharpkern.train.losses import half_mean_squares
from sharpkern.train.models import FCN
from sharpkern.warmup.critical import CriticalLR

Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05),
    "decay": lambda ps: torch.optim.SGD(ps, lr=0.05, weight_decay=0.3),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9, dampening=0.2),
    "nesterov": lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9, nesterov=True),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.003, amsgrad=True),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.003, weight_decay=0.2),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.003, centered=True, momentum=0.3),
    "gi-adam": lambda ps: sk.GIAdam(ps, lr=0.003),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=0.003),
    "ri-adam": lambda ps: sk.GIAdam(ps, lr=0.003, v0="random"),
}


def steps(model: nn.Module, loss_fn: Any, batch: Any, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        loss_fn(model(batch[0]), batch[1]).backward()
        optimizer.step()


@torch.no_grad()
def value_of(loss_fn: Any, model: nn.Module, batch: Any) -> float:
    return float(loss_fn(model(batch[0]), batch[1]))


def problem() -> tuple[nn.Module, Any, Any]:
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    return model, F.mse_loss, (x, y)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 3])
def test_the_loss_along_the_line_is_that_of_the_optimizers_own_step(name: str, before: int) -> None:
    """A real step with lr just below, and just above, eta_c: the loss falls, and rises."""
    model, loss_fn, batch = problem()
    optimizer = OPTIMIZERS[name](model.parameters())
    steps(model, loss_fn, batch, optimizer, before)
    random = torch.get_rng_state()
    c = sk.critical_learning_rate(model, loss_fn, batch, optimizer, tol=1e-4, rise=1e-2)
    assert 0 < c.lower < c.value < c.lower * 1.0002
    assert c.sharpness == 2 / c.value
    for lr, rises in ((c.lower, False), (c.value, True)):
        twin, other = copy.deepcopy((model, optimizer))
        other.param_groups[0]["lr"] = lr
        torch.set_rng_state(random)
        steps(twin, loss_fn, batch, other, 1)
        after = value_of(loss_fn, twin, batch)
        assert (after > c.loss) == rises
        if rises:
            assert after / c.loss - 1 == pytest.approx(c.rise, rel=1e-6, abs=1e-12)


class Quadratic(nn.Module):
    """``x -> theta``, so that the loss alone decides."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(n, dtype=torch.float64))

    def forward(self, _: Tensor) -> Tensor:
        return self.theta


@pytest.mark.parametrize("parallel", [1, 3])
@pytest.mark.parametrize("start", [1e-6, None, 1e5])
def test_critical_sharpness_of_gradient_descent_on_a_quadratic(parallel: int, start: float | None) -> None:
    """The loss of ``theta - eta g`` is back at its value at ``eta = 2 g'g / g'Hg``."""
    A = torch.randn(8, 8, dtype=torch.float64)
    H = A @ A.T / 8
    model = Quadratic(8)
    g = H @ model.theta.detach()
    truth = float(2 * (g @ g) / (g @ H @ g))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.zeros(1, dtype=torch.float64), H
    c = sk.critical_learning_rate(
        model, lambda t, h: 0.5 * t @ h @ t, batch, optimizer, start=start, tol=1e-3, parallel=parallel
    )
    assert c.lower <= truth * (1 + 1e-9)
    assert truth * (1 - 1e-9) <= c.value <= truth * 1.0011
    assert not c.capped


def test_groups_keep_the_ratio_of_their_rates() -> None:
    model, loss_fn, batch = problem()
    first, last = model[0].parameters(), model[2].parameters()
    optimizer = torch.optim.SGD([{"params": first}, {"params": last, "lr": 0.03}], lr=0.1)
    c = sk.critical_learning_rate(model, loss_fn, batch, optimizer, tol=1e-4)
    for scale, rises in ((0.999, False), (1.001, True)):
        twin, other = copy.deepcopy((model, optimizer))
        for group in other.param_groups:
            group["lr"] *= scale * c.value / 0.1
        steps(twin, loss_fn, batch, other, 1)
        assert (value_of(loss_fn, twin, batch) > c.loss) == rises
    optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(RuntimeError, match="first group's lr is 0 and another's is 0.03"):
        sk.critical_learning_rate(model, loss_fn, batch, optimizer)


@pytest.mark.parametrize("parameterisation", ["sp", "mup", "ntp"])
def test_real_images_at_initialisation_are_critical_between_one_and_three_thresholds(parameterisation: str) -> None:
    data = load(DataConfig("fashion-mnist-5k", limit=300))
    batch = data.train_inputs, F.one_hot(data.train_targets, 10).float()
    for _ in range(3):
        model = FCN(784, 10, width=256, parameterisation=parameterisation, seed=int(torch.randint(10**6, ())))
        sharpness = sk.sharpness(model, half_mean_squares, batch).value
        optimizer = torch.optim.SGD(model.parameters(), lr=2 / sharpness)
        c = sk.critical_learning_rate(model, half_mean_squares, batch, optimizer)
        assert 1 <= c.value * sharpness / 2 <= 3
        assert c.forward_passes <= 9


def test_a_warm_start_takes_five_or_six_forward_passes() -> None:
    model, loss_fn, batch = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    cold = sk.critical_learning_rate(model, loss_fn, batch, optimizer, start=1e-4)
    assert cold.forward_passes > 6
    c = cold
    for _ in range(10):
        steps(model, loss_fn, batch, optimizer, 1)
        c = sk.critical_learning_rate(model, loss_fn, batch, optimizer, start=c)
        assert c.forward_passes <= 6
        fresh = sk.critical_learning_rate(model, loss_fn, batch, optimizer, start=1e-4)
        assert c.value == pytest.approx(fresh.value, rel=0.13)


def count_forwards(model: nn.Module) -> list[int]:
    calls = [0]

    def called(*_: Any) -> None:
        calls[0] += 1

    model.register_forward_hook(called)
    return calls


def test_forward_passes_are_counted_and_bounded() -> None:
    model, loss_fn, batch = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    calls = count_forwards(model)
    for bound in (1, 3, 60):
        calls[0] = 0
        c = sk.critical_learning_rate(model, loss_fn, batch, optimizer, start=1e-5, max_passes=bound)
        assert calls[0] == c.forward_passes + 1  # and the forward pass of the gradient
        assert c.forward_passes <= bound
        assert c.capped == (bound < 60)


def test_the_cap_is_tried_and_never_passed() -> None:
    model, loss_fn, batch = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    free = sk.critical_learning_rate(model, loss_fn, batch, optimizer, tol=1e-3)
    below = sk.critical_learning_rate(model, loss_fn, batch, optimizer, cap=0.7 * free.lower)
    assert (below.value, below.capped, below.rise) == (0.7 * free.lower, True, 0.0)
    above = sk.critical_learning_rate(model, loss_fn, batch, optimizer, cap=1.02 * free.value, start=1e-4, tol=1e-3)
    assert not above.capped
    assert above.value == pytest.approx(free.value, rel=2e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_counts_as_raised(bad: float) -> None:
    """The loss falls without end, but is not a number beyond a wall at ``eta = 3``."""
    model = Quadratic(1)
    with torch.no_grad():
        model.theta.zero_()

    def loss(theta: Tensor, _: Tensor) -> Tensor:
        return torch.where(theta < -3, torch.full_like(theta, bad), theta).sum()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    c = sk.critical_learning_rate(model, loss, (torch.zeros(1), torch.zeros(1)), optimizer)
    assert c.value == pytest.approx(3, rel=1e-4)
    assert c.lower <= 3 < c.value
    assert not math.isfinite(c.rise)


def test_directions_that_do_not_descend() -> None:
    model, loss_fn, batch = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    steps(model, loss_fn, batch, optimizer, 1)
    for p in model.parameters():
        optimizer.state[p]["momentum_buffer"].mul_(-100)
    c = sk.critical_learning_rate(model, loss_fn, batch, optimizer)
    assert (c.value, c.sharpness, c.capped) == (0.0, math.inf, False)
    again = sk.critical_learning_rate(model, loss_fn, batch, torch.optim.SGD(model.parameters(), lr=0.02), start=c)
    assert again.value > 0
    flat = Quadratic(2)
    c = sk.critical_learning_rate(
        flat, lambda t, _: (0 * t).sum(), (torch.zeros(1), torch.zeros(1)), torch.optim.SGD(flat.parameters(), lr=1.0)
    )
    assert (c.value, c.sharpness, c.capped) == (math.inf, 0.0, True)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [x for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor)]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [torch.get_rng_state(), *model.state_dict().values(), *state, *grads]


class Fails(Exception):
    pass


@pytest.mark.parametrize("fail_at", [None, 1, 2, 5])
@pytest.mark.parametrize("parallel", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["momentum", "adam", "ri-adam"])
def test_nothing_is_changed_even_by_an_exception(
    name: str, dtype: torch.dtype, parallel: int, fail_at: int | None
) -> None:
    model = nn.Sequential(
        nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.4), nn.Tanh(), nn.Linear(9, 3), nn.Dropout(0.2)
    ).to(dtype)
    batch = torch.randn(20, 6, dtype=dtype), torch.randn(20, 3, dtype=dtype)
    optimizer = OPTIMIZERS[name](model.parameters())
    schedule = sk.WarmupLR(optimizer, 0.1, 5)  # puts a step of its own on the optimizer
    if name == "adam":
        steps(model, F.mse_loss, batch, optimizer, 2)
        schedule.step()
    optimizer.register_step_post_hook(lambda *_: pytest.fail("a hook ran"))
    versions = [p._version for p in model.parameters()]
    kept = everything(model, optimizer)
    before = [t.clone() for t in kept]
    passes = 0

    def loss(output: Tensor, target: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        if passes == fail_at:
            raise Fails
        return F.mse_loss(output, target)

    if fail_at is None:
        sk.critical_learning_rate(model, loss, batch, optimizer, start=1e-4, parallel=parallel)
    else:
        with pytest.raises(Fails):
            sk.critical_learning_rate(model, loss, batch, optimizer, start=1e-4, parallel=parallel)
    after = everything(model, optimizer)
    assert len(after) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(a is b or a.data_ptr() == b.data_ptr() for a, b in zip(after[1:], kept[1:], strict=True))
    assert [p._version for p in model.parameters()] == versions


def test_every_pass_sees_the_dropout_masks_of_the_coming_step() -> None:
    model = nn.Sequential(nn.Linear(6, 40), nn.Dropout(0.5), nn.Tanh(), nn.Linear(40, 3)).double()
    _, loss_fn, batch = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = torch.get_rng_state()
    cs = [
        sk.critical_learning_rate(model, loss_fn, batch, optimizer, tol=1e-4, parallel=k, max_passes=200)
        for k in (1, 4)
    ]
    assert cs[0].value == pytest.approx(cs[1].value, rel=3e-4)
    for scale, rises in ((0.998, False), (1.002, True)):
        twin, other = copy.deepcopy((model, optimizer))
        other.param_groups[0]["lr"] = scale * cs[0].value
        torch.set_rng_state(state)
        steps(twin, loss_fn, batch, other, 1)
        torch.set_rng_state(state)
        assert (value_of(loss_fn, twin, batch) > cs[0].loss) == rises


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap of flash attention: a loop
@pytest.mark.parametrize("name", PROBLEMS)
def test_batched_passes_find_the_same(name: str) -> None:
    model, loss_fn, batch = PROBLEMS[name]()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    one, four = (
        sk.critical_learning_rate(model, loss_fn, batch, optimizer, tol=1e-2, parallel=k, max_passes=200)
        for k in (1, 4)
    )
    assert one.value == pytest.approx(four.value, rel=2e-2)
    assert one.loss == pytest.approx(four.loss)


def test_next_update_agrees_with_a_real_step() -> None:
    for make in OPTIMIZERS.values():
        model, loss_fn, batch = problem()
        optimizer = make(model.parameters())
        steps(model, loss_fn, batch, optimizer, 2)
        optimizer.zero_grad()
        loss_fn(model(batch[0]), batch[1]).backward()
        gradients = {p: p.grad for p in model.parameters()}
        lr = optimizer.param_groups[0]["lr"]
        want = next_update(optimizer, gradients)
        before = {p: p.detach().clone() for p in want}
        optimizer.step()
        for p, d in want.items():
            torch.testing.assert_close((before[p] - p.detach()) / lr, d, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0.0}, "start and cap must be positive, and start finite, got 0.0 and None"),
        ({"start": math.inf}, "start and cap must be positive, and start finite, got inf and None"),
        ({"cap": -1.0}, "got 0.02 and -1.0"),
        ({"rise": 0.0}, "rise must be positive and tol between 0 and 1, got 0.0"),
        ({"tol": 1.0}, "rise must be positive and tol between 0 and 1, got 0.1 and 1.0"),
        ({"max_passes": 0}, "max_passes and parallel must be at least 1, got 0 and 1"),
        ({"parallel": 0}, "max_passes and parallel must be at least 1, got 60 and 0"),
    ],
)
def test_bad_arguments_are_refused_with_their_values(options: dict[str, Any], message: str) -> None:
    model, loss_fn, batch = problem()
    with pytest.raises(ValueError, match=message):
        sk.critical_learning_rate(model, loss_fn, batch, torch.optim.SGD(model.parameters(), lr=0.02), **options)


def test_bad_problems_are_refused() -> None:
    model, loss_fn, batch = problem()
    sgd = torch.optim.SGD(model.parameters(), lr=0.02)
    with pytest.raises(ValueError, match=r"must be a scalar, got shape \[20, 3\]"):
        sk.critical_learning_rate(model, lambda o, t: o - t, batch, sgd)
    with pytest.raises(ValueError, match="holds none of the model's trainable parameters"):
        sk.critical_learning_rate(model, loss_fn, batch, torch.optim.SGD([nn.Parameter(torch.zeros(1))]))
    with pytest.raises(TypeError, match="LBFGS has no update without a closure"):
        sk.critical_learning_rate(model, loss_fn, batch, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(sk.NonFiniteLossError):
        sk.critical_learning_rate(model, lambda o, t: (o - t).mean() * math.nan, batch, sgd)


def test_half_precision_parameters() -> None:
    model = nn.Linear(4, 2).bfloat16()
    batch = torch.randn(8, 4).bfloat16(), torch.randn(8, 2).bfloat16()
    c = sk.critical_learning_rate(model, F.mse_loss, batch, torch.optim.SGD(model.parameters(), lr=0.1))
    exact = sk.critical_learning_rate(
        (twin := copy.deepcopy(model).float()),
        F.mse_loss,
        tuple(t.float() for t in batch),
        torch.optim.SGD(twin.parameters(), lr=0.1),
    )
    assert c.value == pytest.approx(exact.value, rel=0.3)


def test_a_step_that_is_no_multiple_of_the_rate_is_refused() -> None:
    model, loss_fn, batch = PROBLEMS["mlp"]()
    with pytest.raises(TypeError, match="the step of Adafactor is no multiple of its learning rate"):
        sk.critical_learning_rate(model, loss_fn, batch, torch.optim.Adafactor(model.parameters(), lr=0.1))


def test_each_rate_of_a_batched_pass_counts() -> None:
    model = nn.Linear(1, 1, bias=False)
    batch, sgd = (torch.ones(1, 1), torch.zeros(1, 1)), torch.optim.SGD(model.parameters(), lr=0.1)
    c = sk.critical_learning_rate(model, nn.MSELoss(), batch, sgd, start=1e-9, max_passes=5, parallel=4)
    assert c.forward_passes == 8  # the second pass begins while one rate is left
    assert c.capped


def test_critical_sharpness_is_two_over_the_rate() -> None:
    assert CriticalLR(0.5, 0.4, 1.0, 0.01, 7, False).sharpness == 4.0
    assert CriticalLR(0.0, 0.0, 1.0, 0.0, 0, False).sharpness == math.inf
