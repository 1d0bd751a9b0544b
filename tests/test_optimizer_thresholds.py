"""Every row of the table: kappa against the lr at which a run with P frozen really diverges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optimizer_twins as twins
import pytest
import torch
from torch import Tensor, nn, optim

import sharpkern as sk
from sharpkern.optimizers.preconditioner import is_adaptive, threshold_preconditioner

F64 = torch.float64


def moments(optimizer: optim.Optimizer, **values: float) -> None:
    """Give every parameter an old state with second moments of a size beside which no gradient counts."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = {key: torch.full_like(p, value) for key, value in values.items()}
            optimizer.state[p] = {"step": torch.tensor(1e30), "exp_avg": torch.zeros_like(p), **state}


def nadam_moments(optimizer: optim.Optimizer) -> None:
    moments(optimizer, exp_avg_sq=1e20)
    for state in optimizer.state.values():
        state["mu_product"] = torch.tensor(0.0)


def young_moments(optimizer: optim.Optimizer) -> None:
    """Adafactor's: t^-30 of the gradient goes into its moment, and lr stays below 1 / sqrt(t)."""
    key = "variance" if isinstance(optimizer, optim.Adafactor) else "exp_avg_sq"
    moments(optimizer, **{key: 1.0})
    for state in optimizer.state.values():
        state["step"] = torch.tensor(10.0) if key == "variance" else 10


def averaging(weight: float) -> Callable[[optim.Optimizer], None]:
    """Schedule-free, with a newest weight that stays as it is."""

    def freeze(optimizer: optim.Optimizer) -> None:
        def reset(*_: Any) -> None:
            for group in optimizer.param_groups:
                lr = group["lr"]
                group.update(k=10**18, lr_max=lr, weight_sum=lr**2 * (1 - weight) / weight)

        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p] = {"z": p.detach().clone(), "exp_avg_sq": torch.full_like(p, 1e20)}
        reset()
        optimizer.register_step_post_hook(reset)
        twins.begin(optimizer)

    return freeze


OLD = 1 - 1e-16  # an average that does not move
# A group's options; what makes it one of a frozen P; and options of a second group.
FROZEN: dict[str, tuple[Any, dict[str, Any], Callable[[optim.Optimizer], None], dict[str, Any]]] = {
    "adagrad": (optim.Adagrad, {}, lambda o: moments(o, sum=1e20), {}),
    "adamax": (optim.Adamax, {"betas": (0.8, OLD)}, lambda o: moments(o, exp_inf=1e20), {"betas": (0.3, OLD)}),
    "radam": (optim.RAdam, {"betas": (0.7, OLD)}, lambda o: moments(o, exp_avg_sq=1e20), {"betas": (0.9, OLD)}),
    "radam, decay": (
        optim.RAdam, {"betas": (0.7, OLD), "weight_decay": 1e-12, "decoupled_weight_decay": True},
        lambda o: moments(o, exp_avg_sq=1e20), {"weight_decay": 0.0},
    ),
    "nadam": (optim.NAdam, {"betas": (0.8, OLD)}, nadam_moments, {"betas": (0.5, OLD)}),
    "nadam, decay": (
        optim.NAdam, {"betas": (0.8, OLD), "weight_decay": 1e-12, "decoupled_weight_decay": True}, nadam_moments,
        {"weight_decay": 0.0},
    ),
    "rmsprop": (
        optim.RMSprop, {"alpha": 1.0, "momentum": 0.6}, lambda o: moments(o, square_avg=1e20, momentum_buffer=0.0),
        {"momentum": 0.2},
    ),
    "adadelta": (optim.Adadelta, {"rho": OLD}, lambda o: moments(o, square_avg=1e20, acc_delta=1e4), {}),
    "adafactor": (optim.Adafactor, {"beta2_decay": -30.0, "eps": (1e-9, 1e3), "d": 1e30}, young_moments, {}),
    "adafactor, decay": (
        optim.Adafactor, {"beta2_decay": -30.0, "eps": (1e-9, 1e3), "d": 1e30, "weight_decay": 300.0}, young_moments,
        {"weight_decay": 0.0},
    ),
    "hf adafactor": (
        twins.Adafactor,
        {"decay_rate": -30.0, "clip_threshold": 1e30, "relative_step": False, "scale_parameter": False,
         "weight_decay": 0.3},
        young_moments, {"weight_decay": 0.0},
    ),
    "hf adafactor, beta1": (
        twins.Adafactor,
        {"decay_rate": -30.0, "clip_threshold": 1e30, "relative_step": False, "scale_parameter": False, "beta1": 0.7},
        young_moments, {"beta1": 0.3},
    ),
    "schedule-free sgd": (twins.SGDScheduleFree, {"momentum": 0.9}, averaging(0.02), {"momentum": 0.6}),
    "schedule-free sgd, early": (
        twins.SGDScheduleFree, {"momentum": 0.8, "weight_decay": 0.1}, averaging(0.4), {"momentum": 0.3},
    ),
    "schedule-free adamw": (
        twins.AdamWScheduleFree, {"betas": (0.9, OLD), "weight_decay": 1e-12}, averaging(0.02), {"betas": (0.7, OLD)},
    ),
}  # fmt: skip


def growth(optimizer: optim.Optimizer, H: Tensor) -> float:
    """Run an optimizer on ``x'Hx/2``; return its largest distance in the last steps over the first one."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    start, recent = float(sk.flatten(params).detach().norm()), []
    for _ in range(4000):
        gradients = (H @ sk.flatten(params).detach()).split([p.numel() for p in params])
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()
        recent = [*recent[-7:], float(sk.flatten(params).detach().norm()) / start]
        if not 1e-9 < recent[-1] < 1e4:
            break
    return max(recent)


def curvature(optimizer: optim.Optimizer, H: Tensor) -> float:
    """Return the largest eigenvalue of S P^-1 H, from the matrix."""
    gradients = {p: torch.zeros_like(p) for group in optimizer.param_groups for p in group["params"]}
    s = threshold_preconditioner(optimizer, gradients).inv_sqrt()
    return float(torch.linalg.eigvalsh(s[:, None] * H * s)[-1])


def edge(build: Callable[[float], optim.Optimizer], H: Tensor) -> float:
    """Return the lr at which the ratio is 1, by bisection: kappa depends on lr."""

    def ratio(lr: float) -> float:
        optimizer = build(lr)
        return lr * curvature(optimizer, H) / sk.stability_threshold(optimizer)

    low, high = 0.0, 1e-4
    while ratio(high) < 1:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) < 1 else (low, middle)
    return high


@pytest.mark.parametrize("name", FROZEN)
def test_with_p_frozen_it_contracts_1_percent_below_the_threshold_and_grows_1_percent_above(name: str) -> None:
    make, options, freeze, _ = FROZEN[name]

    def build(lr: float) -> optim.Optimizer:
        optimizer = make([nn.Parameter(torch.tensor([1.3], dtype=F64))], lr=lr, **options)
        freeze(optimizer)
        return optimizer

    H = torch.tensor([[2.3]], dtype=F64)
    lr = edge(build, H)
    assert growth(build(0.99 * lr), H) < 1e-2
    assert growth(build(1.01 * lr), H) > 1e2


SGDS: dict[str, list[dict[str, Any]]] = {
    "rates": [{}, {}],
    "decay": [{"weight_decay": 0.7}, {"momentum": 0.0}],
    "momenta": [{"momentum": 0.9}, {"momentum": 0.6, "nesterov": True, "weight_decay": 0.2}],
    "dampening": [{"momentum": 0.5}, {"momentum": 0.3, "dampening": 0.2}],
}
TWO_GROUPS = {
    **{f"sgd, {name}": (optim.SGD, a, lambda o: None, b) for name, (a, b) in SGDS.items()},
    "adamw": (
        optim.AdamW, {"betas": (0.9, OLD), "weight_decay": 3e-12}, lambda o: moments(o, exp_avg_sq=1e20),
        {"betas": (0.5, OLD)},
    ),
    "gi-adam": (sk.GIAdam, {"betas": (0.9, OLD)}, lambda o: moments(o, exp_avg_sq=1e20), {"betas": (0.5, OLD)}),
    **FROZEN,
}  # fmt: skip


@pytest.mark.parametrize("name", TWO_GROUPS)
def test_one_ratio_holds_for_two_groups(name: str) -> None:
    """2% below ratio 1 the run converges on a random quadratic, 2% above it diverges."""
    make, options, freeze, second = TWO_GROUPS[name]
    A = torch.randn(5, 5, dtype=F64)
    H = A @ A.t() + 0.5 * torch.eye(5, dtype=F64)
    starts = [torch.randn(2, dtype=F64), torch.randn(3, dtype=F64)]

    def build(lr: float) -> optim.Optimizer:
        first, other = (nn.Parameter(x.clone()) for x in starts)
        groups = [{"params": [first]}, {"params": [other], "lr": 3 * lr, **second}]
        optimizer = make(groups, lr=lr, **options)
        freeze(optimizer)
        return optimizer

    lr = edge(build, H)
    assert is_adaptive(build(lr))
    assert growth(build(0.98 * lr), H) < 3e-2
    assert growth(build(1.02 * lr), H) > 1e2


class Quadratic(nn.Module):
    """The loss a'Aa + b'Bb, as a model whose output is the loss's residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(2, dtype=F64)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.cat([self.a, self.b])


@pytest.mark.parametrize("name", ["nadam", "adamw", "adafactor", "schedule-free sgd"])
def test_the_ratio_that_the_tracker_prints_is_1_where_a_run_of_two_groups_begins_to_diverge(name: str) -> None:
    make, options, freeze, second = TWO_GROUPS[name]
    batch = torch.randn(6, 4, dtype=F64), torch.zeros(6, dtype=F64)
    H = 2 * batch[0].t() @ batch[0]
    for factor in (0.98, 1.02):
        model = Quadratic()

        def build(lr: float, model: Quadratic = model) -> optim.Optimizer:
            groups = [{"params": [model.a]}, {"params": [model.b], "lr": 3 * lr, **second}]
            optimizer = make(groups, lr=lr, **options)
            freeze(optimizer)
            return optimizer

        optimizer = build(factor * edge(build, H))
        tracker = sk.SharpnessTracker(model, lambda out, y: (out - y).square().sum(), optimizer, tol=1e-6, every=50)
        records = []
        for _ in range(400):
            records.append(tracker.step(batch))
            optimizer.step()
            if not 1e-6 < records[-1].loss / records[0].loss < 1e6:
                break
        assert records[0].ratio == pytest.approx(factor, rel=5e-3)  # decay makes kappa depend on lr
        assert (records[-1].loss > records[0].loss) == (factor > 1)


CLIMBERS = [name for name, (make, *_) in TWO_GROUPS.items() if hasattr(make, "_init_group")]


@pytest.mark.parametrize("name", CLIMBERS)
def test_an_ascent_is_stable_by_the_negative_curvature(name: str) -> None:
    """With maximize=True on ``-x'Hx/2``: the curvature is that of minus the loss."""
    make, options, freeze, _ = TWO_GROUPS[name]
    A = torch.randn(3, 3, dtype=F64)
    H = A @ A.t() + 0.5 * torch.eye(3, dtype=F64)
    start = torch.randn(3, dtype=F64)

    def build(lr: float) -> optim.Optimizer:
        optimizer = make([nn.Parameter(start.clone())], lr=lr, maximize=True, **options)
        freeze(optimizer)
        return optimizer

    lr = edge(build, H)
    assert growth(build(0.98 * lr), -H) < 3e-2
    assert growth(build(1.02 * lr), -H) > 1e2


FIRST = [
    optim.Adagrad,
    optim.Adamax,
    optim.RAdam,
    optim.NAdam,
    optim.Adadelta,
    optim.Adafactor,
    twins.Adafactor,
    twins.AdamWScheduleFree,
]


@pytest.mark.parametrize("make", FIRST, ids=lambda make: make.__qualname__)
def test_the_first_step_overshoots_exactly_beyond_its_own_threshold(make: Any) -> None:
    more: dict[str, Any] = {}
    if make is twins.Adafactor:
        more = {"relative_step": False, "beta1": 0.6}
    elif make is optim.Adafactor:
        more = {"eps": (None, 50.0)}  # lr, capped at 1, has to reach the threshold
    for factor in (0.99, 1.01):
        x = nn.Parameter(torch.tensor([1.7], dtype=F64))
        x.grad = 2.3 * x.detach()
        lr = 1e-3
        for _ in range(3):
            optimizer = twins.begin(make([x], lr=lr, **more))
            P = float(sk.preconditioner(optimizer, gradients="next").diagonal())
            lr = factor * sk.stability_threshold(optimizer, first_step=True) * P / 2.3
        twins.begin(make([x], lr=lr, **more)).step()
        assert (abs(x.item()) > 1.7) == (factor > 1)


def test_a_warmup_of_its_own_raises_a_schedule_free_threshold() -> None:
    """The optimizer multiplies lr by 1/4, 2/4, ... itself; kappa belongs to the lr that the user sees."""
    for make in (twins.SGDScheduleFree, twins.AdamWScheduleFree):
        p = nn.Parameter(torch.ones(2, dtype=F64))
        optimizer = twins.begin(make([p], lr=0.01, warmup_steps=4))
        for t in range(1, 7):
            p.grad = torch.ones_like(p)
            got = sk.stability_threshold(optimizer)
            optimizer.step()
            group = optimizer.param_groups[0]
            c = group["lr_max"] ** 2 / group["weight_sum"]
            M = []  # the map of (y, z) is linear in a = lr h / P: find where it has the eigenvalue -1
            for a in (0.0, 1.0):
                b = 0.9
                M.append([[1 - c - a * (1 - b * (1 - c)), c], [-a, 1.0]])
            M0, M1 = (torch.tensor(m, dtype=F64) + torch.eye(2, dtype=F64) for m in M)
            at = float(torch.linalg.det(M0) / (torch.linalg.det(M0) - torch.linalg.det(M1)))
            assert got == pytest.approx(at / min(1.0, t / 4))
