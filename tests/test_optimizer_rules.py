"""The table of optimizers, against the steps that the optimizers really take and the quadratics they diverge on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sharpkern as sk
from sharpkern.optimizers import rules
from sharpkern.optimizers.preconditioner import is_adaptive, threshold_preconditioner
from sharpkern.optimizers.threshold import minibatch_thresholds

F64 = torch.float64
Make = Callable[[Any, float], torch.optim.Optimizer]

STEPS: dict[str, tuple[Make, bool]] = {  # whether the step is by the first moment, else by the gradient
    "adagrad": (lambda ps, lr: torch.optim.Adagrad(ps, lr, eps=1e-3), False),
    "adagrad, all options": (
        lambda ps, lr: torch.optim.Adagrad(
            ps, lr, lr_decay=0.3, weight_decay=0.2, initial_accumulator_value=0.4, maximize=True
        ),
        False,
    ),
    "adamax": (lambda ps, lr: torch.optim.Adamax(ps, lr, betas=(0.8, 0.7), eps=1e-3), True),
    "adamax, decay": (lambda ps, lr: torch.optim.Adamax(ps, lr, weight_decay=0.3, maximize=True), True),
    "radam": (lambda ps, lr: torch.optim.RAdam(ps, lr, betas=(0.8, 0.99), eps=1e-3), True),
    "radam, decay": (lambda ps, lr: torch.optim.RAdam(ps, lr, betas=(0.9, 0.95), weight_decay=0.3), True),
    "rmsprop, centered ascent": (lambda ps, lr: torch.optim.RMSprop(ps, lr, centered=True, maximize=True), False),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_real_step_is_the_moment_or_the_gradient_over_p(name: str) -> None:
    make, by_moment = STEPS[name]
    p = nn.Parameter(torch.randn(3, 4, dtype=F64))
    optimizer = make([p], 0.03)
    group = optimizer.param_groups[0]
    for _ in range(12):  # RAdam begins to use its second moment at the sixth
        p.grad = torch.randn_like(p) * torch.logspace(-2, 1, 12, dtype=F64).reshape(3, 4)
        g = (-p.grad if group["maximize"] else p.grad) + group["weight_decay"] * p.detach()
        promised = sk.preconditioner(optimizer, gradients="next").diagonal()
        before = p.detach().clone()
        optimizer.step()
        P = sk.preconditioner(optimizer).diagonal()
        numerator = optimizer.state[p]["exp_avg"] if by_moment else g
        torch.testing.assert_close((p.detach() - before).reshape(-1), -0.03 * numerator.reshape(-1) / P)
        torch.testing.assert_close(promised, P)


def test_radam_with_decoupled_decay_shrinks_the_weights_besides() -> None:
    p = nn.Parameter(torch.randn(7, dtype=F64))
    optimizer = torch.optim.RAdam([p], 0.03, betas=(0.9, 0.95), weight_decay=0.4, decoupled_weight_decay=True)
    for _ in range(9):
        p.grad = torch.randn_like(p)
        before = p.detach().clone()
        optimizer.step()
        P = sk.preconditioner(optimizer).diagonal()
        torch.testing.assert_close(p.detach(), (1 - 0.03 * 0.4) * before - 0.03 * optimizer.state[p]["exp_avg"] / P)


def freeze(optimizer: torch.optim.Optimizer, keys: tuple[str, ...], value: float) -> None:
    """Give second moments a size beside which no gradient counts, at an age when all corrections are 1."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = {key: torch.full_like(p, value) for key in keys}
            optimizer.state[p] = {"step": torch.tensor(1e30), "exp_avg": torch.zeros_like(p), **state}


def growth(optimizer: torch.optim.Optimizer, H: Tensor) -> float:
    """Run an optimizer on ``x'Hx/2``; return its largest distance in the last steps over the first one."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    start, recent = float(sk.flatten(params).detach().norm()), []
    for _ in range(4000):
        gradients = (H @ sk.flatten(params).detach()).split([p.numel() for p in params])
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()
        recent = [*recent[-7:], float(sk.flatten(params).detach().norm()) / start]
        if recent[-1] > 1e4:
            break
    return max(recent)


FROZEN: dict[str, tuple[Make, tuple[str, ...]]] = {
    "adagrad": (lambda ps, lr: torch.optim.Adagrad(ps, lr), ("sum",)),
    "adamax": (lambda ps, lr: torch.optim.Adamax(ps, lr, betas=(0.8, 1 - 1e-16)), ("exp_inf",)),
    "radam": (lambda ps, lr: torch.optim.RAdam(ps, lr, betas=(0.7, 1 - 1e-16)), ("exp_avg_sq",)),
    "radam, decay": (
        lambda ps, lr: torch.optim.RAdam(
            ps, lr, betas=(0.7, 1 - 1e-16), weight_decay=1e-12, decoupled_weight_decay=True
        ),
        ("exp_avg_sq",),
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_with_p_frozen_it_contracts_just_below_the_threshold_and_grows_just_above(name: str) -> None:
    make, keys = FROZEN[name]
    for factor in (0.98, 1.02):
        x, h, lr = nn.Parameter(torch.tensor([1.3], dtype=F64)), 2.3, 1e9
        for _ in range(50):  # lr * h / P = factor * kappa, where weight decay makes kappa depend on lr
            optimizer = make([x], lr)
            freeze(optimizer, keys, 1e20)
            lr = factor * sk.stability_threshold(optimizer) * float(sk.preconditioner(optimizer).diagonal()) / h
        optimizer = make([x], lr)
        freeze(optimizer, keys, 1e20)
        assert (growth(optimizer, torch.tensor([[h]], dtype=F64)) > 1e2) == (factor > 1)
        assert factor > 1 or abs(x.item()) < 1e-2


@pytest.mark.parametrize("make", [torch.optim.Adagrad, torch.optim.Adamax, torch.optim.RAdam])
def test_the_first_step_overshoots_exactly_beyond_its_own_threshold(make: Any) -> None:
    for factor in (0.98, 1.02):
        x = nn.Parameter(torch.tensor([1.7], dtype=F64))
        x.grad = 2.3 * x.detach()
        curvature = 2.3 / float(sk.preconditioner(make([x]), gradients="next").diagonal())
        make([x], lr=factor * sk.stability_threshold(make([x]), first_step=True) / curvature).step()
        assert (abs(x.item()) > 1.7) == (factor > 1)


def momenta(ps: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        [
            {"params": ps[:1], "momentum": 0.9},
            {"params": ps[1:2], "lr": 3 * lr, "momentum": 0.6, "nesterov": True, "weight_decay": 0.2},
            {"params": ps[2:], "lr": 0.5 * lr, "momentum": 0.3, "dampening": 0.2},
        ],
        lr=lr,
    )


def betas(ps: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(
        [{"params": ps[:1]}, {"params": ps[1:2], "lr": 0.2 * lr, "betas": (0.5, 1 - 1e-16)}, {"params": ps[2:]}],
        lr=lr,
        betas=(0.9, 1 - 1e-16),
        weight_decay=3e-7,
    )
    optimizer.param_groups[2]["weight_decay"] = 0.0
    freeze(optimizer, ("exp_avg_sq",), 4e10)
    return optimizer


GROUPS: dict[str, Make] = {
    "rates": lambda ps, lr: torch.optim.SGD([{"params": ps[:2]}, {"params": ps[2:], "lr": 10 * lr}], lr=lr),
    "decay": lambda ps, lr: torch.optim.SGD(
        [{"params": ps[:2], "weight_decay": 0.7}, {"params": ps[2:]}], lr=lr, momentum=0.5
    ),
    "momenta": momenta,
    "betas": betas,
}


@pytest.mark.parametrize("name", GROUPS)
def test_one_ratio_holds_for_groups_that_differ(name: str) -> None:
    """Just below ratio 1 the optimizer converges on a random quadratic, just above it diverges."""
    make = GROUPS[name]
    A = torch.randn(6, 6, dtype=F64)
    H = A @ A.t() + 0.3 * torch.eye(6, dtype=F64)

    def build(lr: float) -> torch.optim.Optimizer:
        return make([nn.Parameter(torch.randn(n, dtype=F64)) for n in (2, 1, 3)], lr)

    def ratio(lr: float) -> float:
        optimizer = build(lr)
        s = threshold_preconditioner(optimizer).inv_sqrt()
        return lr * float(torch.linalg.eigvalsh(s[:, None] * H * s)[-1]) / sk.stability_threshold(optimizer)

    low, high = 0.0, 1e-3
    while ratio(high) < 1:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) < 1 else (low, middle)
    assert is_adaptive(build(high))
    assert growth(build(0.97 * high), H) < 1e-2
    assert growth(build(1.03 * high), H) > 1e2


class TwoWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.ones(1, dtype=F64)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0] * self.a + x[:, 1] * self.b


def test_the_tracker_sees_a_group_that_is_beyond_its_edge_from_the_step_its_rate_changes() -> None:
    model, batch = TwoWeights(), (torch.eye(2, dtype=F64), torch.zeros(2, dtype=F64))  # the loss is a^2 + b^2
    optimizer = torch.optim.SGD([{"params": [model.a]}, {"params": [model.b]}], lr=0.01)
    tracker = sk.SharpnessTracker(model, lambda out, y: (out - y).square().sum(), optimizer, every=50)
    record = tracker.step(batch)
    assert record.ratio == pytest.approx(0.01) and record.preconditioned_sharpness is None
    optimizer.param_groups[1]["lr"] = 1.5
    with pytest.raises(RuntimeError, match="nothing to carry"):
        tracker.carry(1.0, 1.0)
    for _ in range(3):
        record = tracker.step(batch)
        optimizer.step()
        assert record.ratio == pytest.approx(1.5) and record.sharpness == pytest.approx(2.0)
        assert record.preconditioned_sharpness == pytest.approx(300.0)
    optimizer.param_groups[1]["lr"] = 0.01
    record = tracker.step(batch)
    assert record.ratio == pytest.approx(0.01) and record.preconditioned_sharpness is None


def test_the_trackers_ratio_weighs_each_group_by_its_own_threshold() -> None:
    model = TwoWeights()
    batch = torch.diag(torch.tensor([1.0, 3.0], dtype=F64)), torch.zeros(2, dtype=F64)  # curvatures 2 and 18
    groups = [{"params": [model.a]}, {"params": [model.b], "momentum": 0.9}]  # thresholds 2 and 3.8
    tracker = sk.SharpnessTracker(
        model, lambda out, y: (out - y).square().sum(), torch.optim.SGD(groups, lr=0.01), tol=1e-6
    )
    assert tracker.step(batch).ratio == pytest.approx(0.01 * 18 / 3.8)


def test_a_little_weight_decay_on_a_part_needs_no_second_solve() -> None:
    p, q = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    usual = torch.optim.SGD([{"params": [p], "weight_decay": 5e-4}, {"params": [q]}], lr=0.1, momentum=0.9)
    assert not is_adaptive(usual)
    impossible = torch.optim.SGD([{"params": [p], "weight_decay": 30.0}, {"params": [q]}], lr=0.1)
    with pytest.raises(ValueError, match="weight decay alone makes a group unstable"):
        is_adaptive(impossible)


class Renamed(torch.optim.Adam):
    """A subclass with options of its own, and Adam's step."""


class Signed(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        return None


class Begun(torch.optim.RMSprop):
    def _init_group(self, *args: Any) -> Any:
        return super()._init_group(*args)


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))


def test_a_subclass_follows_its_parent_only_while_it_leaves_the_step_alone() -> None:
    params = [nn.Parameter(torch.zeros(1))]
    assert rules.rule_of(Renamed(params)) is rules.rule_of(torch.optim.Adam(params))
    assert sk.stability_threshold(Renamed(params)) == pytest.approx(38)
    for cls, what in ((Signed, "Signed overrides step of Adam"), (Begun, "Begun overrides _init_group of RMSprop")):
        for read in (sk.stability_threshold, sk.preconditioner, is_adaptive):
            with pytest.raises(TypeError, match=rf"{what}, so no rule.*register\(cls, rule\)"):
                read(cls(params))


def test_a_registered_rule_is_used_everywhere(restored: None) -> None:
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    rules.register(Signed, rules.Rule(lambda group, first: 7.0, lambda step: step.gradient * 0 + 0.5))
    optimizer = Signed([w])
    assert sk.stability_threshold(optimizer) == 7.0
    assert sk.preconditioner(optimizer, gradients="next").diagonal().tolist() == [4.0, 4.0]
    optimizer.state[w] = {"exp_avg": torch.tensor([3.0, 4.0])}
    assert sk.optimizer_norms(optimizer)["m"] == 5.0


def test_norms_find_the_moments_that_the_table_names_and_adams_for_unknown_optimizers() -> None:
    for make, m, v in (
        (torch.optim.Adamax, "exp_avg", "exp_inf"), (torch.optim.NAdam, "exp_avg", "exp_avg_sq"),
        (torch.optim.Adagrad, "", "sum"),
    ):  # fmt: skip
        p = nn.Parameter(torch.zeros(3, dtype=F64))
        p.grad = torch.randn_like(p)
        optimizer = make([p])
        optimizer.step()
        got, state = sk.optimizer_norms(optimizer), optimizer.state[p]
        assert got["m"] == pytest.approx(float(state[m].norm()) if m else 0.0)
        assert got["v"] == pytest.approx(float(state[v].norm()))


def test_a_trainers_wrapper_is_looked_through_and_another_is_not() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer, self.state, self.param_groups = optimizer, optimizer.state, optimizer.param_groups

    wrapped = Wrapper(sk.GIAdam([nn.Parameter(torch.zeros(1))]))
    with pytest.raises(TypeError, match="Wrapper; supported"):  # a Lookahead holds an optimizer too
        sk.stability_threshold(wrapped)
    Wrapper.__module__ = "accelerate.optimizer"
    assert sk.stability_threshold(wrapped) == pytest.approx(38)
    (p,) = wrapped.param_groups[0]["params"]
    P = sk.preconditioner(wrapped, gradients={p: torch.ones(1)})
    assert float(P.diagonal()) == pytest.approx(0.1 / 0.001**0.5, rel=1e-4)  # GIAdam's, not Adam's


def test_the_allowed_rise_is_ten_times_smaller_for_adaptive_optimizers() -> None:
    p = [nn.Parameter(torch.zeros(1))]
    assert rules.rule_of(torch.optim.SGD(p)).rise == 0.1
    assert {rules.rule_of(make(p)).rise for make in (torch.optim.Adam, sk.GIAdam, torch.optim.RMSprop)} == {0.01}


def test_plateaus_of_the_batch_sharpness_are_known_for_sgd_only() -> None:
    params = [nn.Parameter(torch.zeros(1))]
    assert minibatch_thresholds(torch.optim.SGD(params, lr=0.1)) == (2.0, 2.0)
    assert minibatch_thresholds(torch.optim.SGD(params, lr=0.1, momentum=0.9)) == pytest.approx((0.2, 3.8))
    for other in (torch.optim.Adam(params), torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True)):
        with pytest.raises(TypeError, match="known for SGD with one momentum"):
            minibatch_thresholds(other)
