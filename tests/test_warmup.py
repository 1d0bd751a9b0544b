"""Stability thresholds by iterating real optimizers on quadratics; schedules against their closed formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sharpkern as sk

Make = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]

SGD: dict[str, Make] = {
    "plain": lambda ps, lr: torch.optim.SGD(ps, lr=lr),
    "momentum": lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.9),
    "small momentum": lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.35),
    "average form": lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.9, dampening=0.9),
    "dampened": lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.8, dampening=0.3),
    "nesterov": lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.9, nesterov=True),
    "small nesterov": lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.4, nesterov=True),
    "decay": lambda ps, lr: torch.optim.SGD(ps, lr=lr, weight_decay=0.37),
    "momentum, decay": lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.9, weight_decay=0.37),
    "nesterov, decay": lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.7, nesterov=True, weight_decay=0.37),
    "dampening without momentum": lambda ps, lr: torch.optim.SGD(ps, lr=lr, dampening=0.5),
}


def rosette(n: int) -> Tensor:
    """A random rotation."""
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]


def growth(make: Make, lr: float, H: Tensor) -> float:
    """Run an optimizer on ``x'Hx/2`` from a random point; return final over initial distance."""
    x = nn.Parameter(torch.randn(len(H), dtype=torch.float64))
    start = float(x.detach().norm())
    optimizer = make([x], lr)
    recent = []
    for _ in range(3000):
        x.grad = H @ x.detach()
        optimizer.step()
        recent = [*recent[-7:], float(x.detach().norm()) / start]
        if recent[-1] > 1e4:  # far more than any transient of a stable momentum
            break
    return max(recent)


def critical_lr(make: Make, top: float) -> float:
    """Solve ``lr * top = kappa(lr)``; kappa is linear in lr where weight decay enters it."""
    x = [nn.Parameter(torch.zeros(1))]
    at = {lr: sk.stability_threshold(make(x, lr)) for lr in (0.0, 1.0)}
    return at[0.0] / (top + at[0.0] - at[1.0])


@pytest.mark.parametrize("name", SGD)
def test_sgd_contracts_just_below_the_threshold_and_grows_just_above(name: str) -> None:
    make = SGD[name]
    top = 3.7
    Q = rosette(3)
    H = Q @ torch.diag(torch.tensor([top, 1.3, 0.4], dtype=torch.float64)) @ Q.t()
    lr = critical_lr(make, top)
    assert growth(make, 0.98 * lr, H) < 1e-2
    assert growth(make, 1.02 * lr, H) > 1e2


ADAMS: dict[str, Make] = {
    "adam": lambda ps, lr: torch.optim.Adam(ps, lr=lr, betas=(0.9, 1 - 1e-16)),
    "small beta1": lambda ps, lr: torch.optim.Adam(ps, lr=lr, betas=(0.3, 1 - 1e-16)),
    "adamw": lambda ps, lr: torch.optim.AdamW(ps, lr=lr, betas=(0.9, 1 - 1e-16), weight_decay=0.0),
    "adamw, decay": lambda ps, lr: torch.optim.AdamW(ps, lr=lr, betas=(0.9, 1 - 1e-16), weight_decay=0.2),
    "gi-adam, decay": lambda ps, lr: sk.GIAdam(ps, lr, (0.8, 1 - 1e-16), weight_decay=0.2, decoupled=True),
    "rmsprop": lambda ps, lr: torch.optim.RMSprop(ps, lr=lr, alpha=1.0),
    "rmsprop, momentum": lambda ps, lr: torch.optim.RMSprop(ps, lr=lr, alpha=1.0, momentum=0.6),
}


def frozen(make: Make, v: Tensor) -> Make:
    """Freeze the second moment of a real optimizer at v.

    Adam's beta2 is the largest number below 1, so v hardly moves, and its step count is 1e30, so that both
    bias corrections are 1. RMSprop's alpha is 1.
    """

    def build(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        optimizer = make(params, lr)
        for p in params:
            if isinstance(optimizer, torch.optim.Adam):
                optimizer.state[p] = {
                    "step": torch.tensor(1e30), "exp_avg": torch.zeros_like(p), "exp_avg_sq": v.clone()
                }  # fmt: skip
            else:
                optimizer.state[p] = {
                    "step": torch.tensor(1.0), "square_avg": v.clone(), "momentum_buffer": torch.zeros_like(p)
                }  # fmt: skip
        return optimizer

    return build


@pytest.mark.parametrize("name", ADAMS)
def test_frozen_adaptive_optimizers_contract_below_and_grow_above(name: str) -> None:
    v = torch.tensor([0.25, 4.0, 9.0], dtype=torch.float64)
    make = frozen(ADAMS[name], v)
    A = torch.randn(3, 3, dtype=torch.float64)
    H = A @ A.t() + 0.3 * torch.eye(3, dtype=torch.float64)
    x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    s = sk.preconditioner(make([x], 1.0)).inv_sqrt()
    torch.testing.assert_close(s, (v.sqrt() + 1e-8) ** -0.5)
    top = float(torch.linalg.eigvalsh(s[:, None] * H * s)[-1])
    lr = critical_lr(make, top)
    assert growth(make, 0.98 * lr, H) < 1e-2
    assert growth(make, 1.02 * lr, H) > 1e2


FIRST: dict[str, Make] = {
    **{name: make for name, make in SGD.items() if "decay" not in name},
    "sgd, decay": SGD["decay"],
    "adam": lambda ps, lr: torch.optim.Adam(ps, lr=lr, betas=(0.9, 0.99)),
    "gi-adam": lambda ps, lr: sk.GIAdam(ps, lr=lr, betas=(0.7, 0.99)),
    "adamw, decay": lambda ps, lr: torch.optim.AdamW(ps, lr=lr, weight_decay=0.2),
    "rmsprop, momentum": lambda ps, lr: torch.optim.RMSprop(ps, lr=lr, momentum=0.9),
}


@pytest.mark.parametrize("name", FIRST)
def test_the_very_first_step_overshoots_exactly_beyond_its_own_threshold(name: str) -> None:
    make = FIRST[name]
    h, x0 = 2.3, 1.7
    for factor in (0.98, 1.02):
        x = nn.Parameter(torch.tensor([x0], dtype=torch.float64))
        x.grad = h * x.detach()
        lr = 0.01
        for _ in range(60):  # solve lr * curvature = factor * kappa; P depends on nothing that moves with lr
            optimizer = make([x], lr)
            curvature = h * float(sk.preconditioner(optimizer, gradients="next").inv_sqrt() ** 2)
            lr = factor * sk.stability_threshold(optimizer, first_step=True) / curvature
        make([x], lr).step()
        assert (abs(x.item()) > x0) == (factor > 1)


@settings(max_examples=12, deadline=None, database=None)
@given(
    top=st.floats(0.3, 30), b=st.floats(0.1, 0.97), decay=st.floats(0, 0.9), form=st.sampled_from(["", "n", "d"]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_random_momenta_decays_and_curvatures(top: float, b: float, decay: float, form: str, seed: int) -> None:
    """SGD from random settings: 2% below the threshold it converges, 2% above it grows."""
    torch.manual_seed(seed)
    Q = rosette(3)
    H = Q @ torch.diag(torch.tensor([top, 0.5 * top, 0.2 * top], dtype=torch.float64)) @ Q.t()

    def make(ps: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        dampening = 0.5 * b if form == "d" else 0.0
        return torch.optim.SGD(
            ps, lr=lr, momentum=b, dampening=dampening, nesterov=form == "n", weight_decay=decay * top
        )

    lr = critical_lr(make, top)
    assert growth(make, 0.98 * lr, H) < 1e-2
    assert growth(make, 1.02 * lr, H) > 1e2


def test_thresholds_of_the_table() -> None:
    p = [nn.Parameter(torch.zeros(1))]
    table = [
        (torch.optim.SGD(p, lr=0.3), 2.0, 2.0),
        (torch.optim.SGD(p, lr=0.3, momentum=0.9), 3.8, 2.0),
        (torch.optim.SGD(p, lr=0.3, momentum=0.9, dampening=0.9), 38.0, 2.0),
        (torch.optim.SGD(p, lr=0.3, momentum=0.9, nesterov=True), 3.8 / 2.8, 2 / 1.9),
        (torch.optim.SGD(p, lr=0.3, weight_decay=0.5), 2.0 - 0.15, 2.0 - 0.15),
        (torch.optim.Adam(p), 38.0, 20.0),
        (torch.optim.Adam(p, weight_decay=0.5), 38.0, 20.0),
        (sk.GIAdam(p), 38.0, 20.0),
        (torch.optim.AdamW(p, lr=0.3, weight_decay=0.5), 38 - 0.15 * 19, 20 - 0.15 * 10),
        (torch.optim.RMSprop(p), 2.0, 2.0),
        (torch.optim.RMSprop(p, momentum=0.9), 3.8, 2.0),
        (torch.optim.SGD([{"params": p, "momentum": 0.5}], lr=torch.tensor(0.3)), 3.0, 2.0),
    ]
    for optimizer, kappa, first in table:
        assert sk.stability_threshold(optimizer) == pytest.approx(kappa), optimizer
        assert sk.stability_threshold(optimizer, first_step=True) == pytest.approx(first), optimizer


def test_the_smallest_threshold_of_several_groups_counts() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b], "weight_decay": 0.5}], lr=0.4, momentum=0.5)
    assert sk.stability_threshold(optimizer) == pytest.approx(3.0 - 0.2)


def optimizer_of(groups: int = 1) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(2))]} for _ in range(groups)], lr=123.0)


def run(optimizer: torch.optim.Optimizer, schedule: sk.WarmupLR, steps: int) -> list[list[float]]:
    """The lr that each optimizer step really uses, for each group."""
    used = []
    for _ in range(steps):
        used.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return used


@settings(max_examples=40, deadline=None, database=None)
@given(
    target=st.floats(1e-6, 100), part=st.floats(0, 1), warmup=st.integers(1, 12), power=st.floats(0.3, 3),
    extra=st.integers(1, 10), cosine=st.booleans(), end=st.floats(0, 1) | st.none(),
)  # fmt: skip
def test_every_step_uses_the_closed_formula(
    target: float, part: float, warmup: int, power: float, extra: int, cosine: bool, end: float | None
) -> None:
    optimizer = optimizer_of()
    init, total = part * target, warmup + extra
    schedule = sk.WarmupLR(
        optimizer, target, warmup, lr_init=init, power=power, decay="cosine" if cosine else "constant",
        total_steps=total, lr_min=None if end is None else end * target,
    )  # fmt: skip
    used = [lr for (lr,) in run(optimizer, schedule, total + 3)]
    low = target / 10 if end is None else end * target
    for t, lr in enumerate(used, start=1):
        if t <= warmup:
            want = init + (target - init) * (t / warmup) ** power
        elif cosine:
            want = low + (target - low) * 0.5 * (1 + math.cos(math.pi * min(1, (t - warmup) / extra)))
        else:
            want = target
        assert lr == pytest.approx(want, rel=1e-9, abs=1e-15)
        assert lr <= target
    assert used[warmup - 1] == pytest.approx(target, rel=1e-12)
    if cosine:
        assert used[total - 1] == used[-1] == pytest.approx(low, rel=1e-9, abs=1e-15)


@settings(max_examples=40, deadline=None, database=None)
@given(
    part=st.floats(0, 1.2), warmup=st.integers(1, 30), power=st.floats(0.3, 3), extra=st.integers(1, 10),
    cosine=st.booleans(),
)  # fmt: skip
def test_a_kept_slope_is_that_of_the_warmup_from_zero(
    part: float, warmup: int, power: float, extra: int, cosine: bool
) -> None:
    target = 0.7
    init = min(part, 1.0) * target
    total = warmup + extra
    optimizer = optimizer_of()
    schedule = sk.WarmupLR(
        optimizer, target, warmup, lr_init=init, power=power, keep_slope=True, total_steps=total,
        decay="cosine" if cosine else "constant",
    )  # fmt: skip
    used = [lr for (lr,) in run(optimizer, schedule, total + 2)]
    slope = [min(target, init + target * (t / warmup) ** power) for t in range(1, total + 3)]
    reached = next(t for t, lr in enumerate(slope, 1) if lr >= target * (1 - 1e-12))
    assert schedule.reached == reached == sk.steps_to_target(warmup, init, target, power=power)
    for t, lr in enumerate(used, start=1):
        if t <= reached or not cosine:
            want = slope[t - 1]
        else:
            s = min(1, (t - reached) / (total - reached))
            want = target / 10 + 0.9 * target * 0.5 * (1 + math.cos(math.pi * s))
        assert lr == pytest.approx(want, rel=1e-9)


def net() -> tuple[nn.Module, Callable[..., Tensor], tuple[Tensor, Tensor]]:
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    return model, nn.functional.mse_loss, (torch.randn(40, 6), torch.randn(40, 3))


def test_a_critical_start_is_the_line_searchs_and_reaches_the_target_when_predicted() -> None:
    model, loss_fn, batch = net()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 9.0}], lr=5.0
    )
    twin = torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 6.0}], lr=3.0)
    found = sk.critical_learning_rate(model, loss_fn, batch, twin)
    assert not found.capped
    target, steps = 4 * found.value, 40
    schedule = sk.WarmupLR(optimizer, [target, 2 * target], steps, lr_init="critical", probe=(model, loss_fn, batch))
    assert schedule.lr_init[0] == pytest.approx(found.value, rel=0.15)  # brackets of width 1/16 from two starts
    assert schedule.lr_init[1] == pytest.approx(2 * schedule.lr_init[0])
    eta = schedule.lr_init[0]
    used = run(optimizer, schedule, steps)
    reach = next(t for t, (lr, _) in enumerate(used, 1) if lr == target)
    assert reach == math.ceil(steps * (1 - eta / target)) < steps
    assert [lr for lr, _ in used[:5]] == pytest.approx([eta + target * t / steps for t in range(1, 6)])
    assert [b / a for a, b in used] == pytest.approx([2.0] * steps)
    saved = sk.steps_saved(steps, eta, target, forward_passes=schedule.forward_passes)
    assert saved == pytest.approx(steps * eta / target - schedule.forward_passes / 2)


def test_a_target_below_the_critical_rate_needs_no_warmup() -> None:
    model, loss_fn, batch = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    target = 0.5 * sk.critical_learning_rate(model, loss_fn, batch, optimizer).lower
    schedule = sk.WarmupLR(optimizer, target, 100, lr_init="critical", probe=(model, loss_fn, batch))
    assert run(optimizer, schedule, 3) == [[target]] * 3
    assert (schedule.lr_init, schedule.reached) == ([target], 1)
    assert sk.steps_to_target(100, 2.0, 1.0) == 1
    assert sk.steps_saved(100, 2.0, 1.0, forward_passes=6) == 97.0


def test_a_critical_start_resumes_from_its_state_whatever_the_new_start(tmp_path: Any) -> None:
    model, loss_fn, batch = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = sk.WarmupLR(optimizer, 9.0, 30, lr_init="critical", probe=(model, loss_fn, batch))
    run(optimizer, schedule, 5)
    torch.save(schedule.state_dict(), tmp_path / "state.pt")
    rest = run(optimizer, schedule, 30)
    fresh = optimizer_of()
    resumed = sk.WarmupLR(fresh, 9.0, 30, lr_init=1.0)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert run(fresh, resumed, 30) == rest


def test_one_warmup_step_is_no_warmup() -> None:
    optimizer = optimizer_of()
    assert run(optimizer, sk.WarmupLR(optimizer, 0.5, 1), 3) == [[0.5]] * 3


def test_linear_warmup_from_zero() -> None:
    optimizer = optimizer_of()
    used = run(optimizer, sk.WarmupLR(optimizer, 0.8, 4), 6)
    assert used == [[pytest.approx(x)] for x in (0.2, 0.4, 0.6, 0.8, 0.8, 0.8)]


def test_groups_share_a_number_or_have_their_own() -> None:
    optimizer = optimizer_of(2)
    assert run(optimizer, sk.WarmupLR(optimizer, 1.0, 2), 3) == [[0.5, 0.5], [1.0, 1.0], [1.0, 1.0]]
    optimizer = optimizer_of(2)
    schedule = sk.WarmupLR(
        optimizer, [1.0, 4.0], 2, lr_init=[0.5, 0.0], decay="cosine", total_steps=4, lr_min=(0.0, 2.0)
    )
    want = [[0.75, 2.0], [1.0, 4.0], [0.5, 3.0], [0.0, 2.0]]
    assert run(optimizer, schedule, 4) == [pytest.approx(row) for row in want]


@pytest.mark.parametrize("at", [0, 3, 5, 9, 14])
@pytest.mark.parametrize("optimizer_first", [False, True])
def test_a_schedule_resumes_identically_from_its_state(at: int, optimizer_first: bool, tmp_path: Any) -> None:
    def build() -> tuple[torch.optim.Optimizer, sk.WarmupLR]:
        optimizer = optimizer_of(2)
        schedule = sk.WarmupLR(optimizer, [0.3, 0.7], 5, lr_init=0.01, power=1.5, decay="cosine", total_steps=12)
        return optimizer, schedule

    optimizer, schedule = build()
    run(optimizer, schedule, at)
    torch.save([optimizer.state_dict(), schedule.state_dict()], tmp_path / "state.pt")
    rest = run(optimizer, schedule, 16 - at)
    first, second = torch.load(tmp_path / "state.pt", weights_only=True)
    optimizer, schedule = build()
    restores = [lambda: optimizer.load_state_dict(first), lambda: schedule.load_state_dict(second)]
    for restore in restores if optimizer_first else reversed(restores):
        restore()
    assert run(optimizer, schedule, 16 - at) == rest


def test_a_restored_schedule_sets_the_learning_rate_by_itself() -> None:
    optimizer = optimizer_of()
    schedule = sk.WarmupLR(optimizer, 1.0, 10)
    run(optimizer, schedule, 6)
    fresh = optimizer_of()
    restored = sk.WarmupLR(fresh, 1.0, 10)
    restored.load_state_dict(schedule.state_dict())
    assert fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == pytest.approx(0.7)
    assert restored.get_last_lr() == schedule.get_last_lr()


def test_a_tensor_learning_rate_stays_a_tensor() -> None:
    lr = torch.tensor(9.0, dtype=torch.float64)
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(2))], lr=lr)
    schedule = sk.WarmupLR(optimizer, 1.0, 4)
    assert run(optimizer, schedule, 2) == [[0.25], [0.5]]
    state = schedule.state_dict()
    assert run(optimizer, schedule, 2) == [[0.75], [1.0]]
    schedule.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] is lr
    assert run(optimizer, schedule, 1) == [[0.75]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_target": 0.0}, "lr_target must be finite and positive, got 0.0"),
        ({"lr_target": float("nan")}, "lr_target must be finite and positive, got nan"),
        (
            {"lr_target": [0.1, 0.2, 0.3]},
            "lr_target must be a number or 2, one for each parameter group, got 3",
        ),
        ({"lr_init": -0.1}, "lr_init must be finite and not negative, got -0.1"),
        ({"lr_init": 2.0}, "lr_init must be at most lr_target = 1.0, got 2.0"),
        ({"lr_init": "critical"}, r"'critical' with probe=\(model, loss_fn, batch\), got 'critical' and probe=None"),
        ({"lr_init": "zero", "probe": (1, 2, 3)}, "got 'zero' and probe=given"),
        ({"lr_min": 2.0}, "lr_min must be at most lr_target = 1.0, got 2.0"),
        ({"lr_min": float("inf")}, "lr_min must be finite and not negative, got inf"),
        ({"warmup_steps": 0}, "warmup_steps must be at least 1 .*, got 0"),
        ({"power": 0.0}, "power must be positive, got 0.0"),
        ({"decay": "linear"}, "decay must be 'constant' or 'cosine', got 'linear'"),
        ({"decay": "cosine"}, "needs total_steps above warmup_steps = 5, got None"),
        ({"decay": "cosine", "total_steps": 5}, "needs total_steps above warmup_steps = 5, got 5"),
    ],
)
def test_bad_schedules_are_refused_with_their_values(options: dict[str, Any], message: str) -> None:
    arguments = {"lr_target": 1.0, "warmup_steps": 5, **options}
    optimizer = optimizer_of(2)
    with pytest.raises(ValueError, match=message):
        sk.WarmupLR(optimizer, **arguments)
    assert optimizer.param_groups[0]["lr"] == 123.0
