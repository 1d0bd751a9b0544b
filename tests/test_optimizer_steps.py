"""Every row of the table: P against the step really taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import optimizer_twins as twins
import pytest
import torch
from torch import Tensor, nn, optim

import sharpkern as sk
from sharpkern.optimizers.preconditioner import is_adaptive
from sharpkern.optimizers.rules import learning_rate, rule_of

F64 = torch.float64
SHAPES = [(3, 4), (5,), (2, 3, 4), ()]
Make = Callable[[Any, float], optim.Optimizer]

# What lr / P multiplies: the gradient, the first moment, or, below, something of the optimizer's own.
STEPS: dict[str, tuple[Make, str]] = {
    "sgd": (lambda ps, lr: optim.SGD(ps, lr, weight_decay=0.2, maximize=True), "gradient"),
    "adagrad": (lambda ps, lr: optim.Adagrad(ps, lr, eps=1e-3), "gradient"),
    "adagrad, all options": (
        lambda ps, lr: optim.Adagrad(
            ps, lr, lr_decay=0.3, weight_decay=0.2, initial_accumulator_value=0.4, maximize=True
        ),
        "gradient",
    ),
    "adamax": (lambda ps, lr: optim.Adamax(ps, lr, betas=(0.8, 0.7), eps=1e-3), "moment"),
    "adamax, decay": (lambda ps, lr: optim.Adamax(ps, lr, weight_decay=0.3, maximize=True), "moment"),
    "radam": (lambda ps, lr: optim.RAdam(ps, lr, betas=(0.8, 0.99), eps=1e-3), "moment"),
    "radam, decay": (lambda ps, lr: optim.RAdam(ps, lr, betas=(0.9, 0.95), weight_decay=0.3, maximize=True), "moment"),
    "radam, decoupled": (
        lambda ps, lr: optim.RAdam(ps, lr, betas=(0.9, 0.95), weight_decay=0.4, decoupled_weight_decay=True), "moment"
    ),
    "adamw, ascent": (lambda ps, lr: optim.AdamW(ps, lr, weight_decay=0.4, maximize=True, amsgrad=True), "moment"),
    "rmsprop, centered ascent": (lambda ps, lr: optim.RMSprop(ps, lr, centered=True, maximize=True), "gradient"),
    "nadam": (lambda ps, lr: optim.NAdam(ps, lr, betas=(0.8, 0.95), eps=1e-3), "nadam"),
    "nadam, decay": (lambda ps, lr: optim.NAdam(ps, lr, weight_decay=0.3, momentum_decay=0.1, maximize=True), "nadam"),
    "nadam, decoupled": (lambda ps, lr: optim.NAdam(ps, lr, weight_decay=0.3, decoupled_weight_decay=True), "nadam"),
    "adadelta": (lambda ps, lr: optim.Adadelta(ps, lr, rho=0.7), "gradient"),
    "adadelta, decay": (lambda ps, lr: optim.Adadelta(ps, lr, eps=1e-3, weight_decay=0.3, maximize=True), "gradient"),
    "adafactor": (lambda ps, lr: optim.Adafactor(ps, lr), "gradient"),
    "adafactor, capped and clipped": (lambda ps, lr: optim.Adafactor(ps, 30 * lr, maximize=True, d=1.5), "gradient"),
    "adafactor, decay": (
        lambda ps, lr: optim.Adafactor(ps, lr, weight_decay=0.3, eps=(0.5, 1.7), foreach=True), "gradient"
    ),
    "hf adafactor, own rate": (lambda ps, lr: twins.Adafactor(ps), "gradient"),
    "hf adafactor, warmup": (lambda ps, lr: twins.Adafactor(ps, warmup_init=True, weight_decay=0.3), "gradient"),
    "hf adafactor, lr": (
        lambda ps, lr: twins.Adafactor(
            ps, lr, relative_step=False, scale_parameter=False, weight_decay=0.3, clip_threshold=1.4
        ),
        "gradient",
    ),
    "hf adafactor, beta1": (
        lambda ps, lr: twins.Adafactor(ps, lr, beta1=0.8, relative_step=False), "averaged updates"
    ),
    "schedule-free sgd": (lambda ps, lr: twins.SGDScheduleFree(ps, lr, weight_decay=0.2, warmup_steps=5), "z"),
    "schedule-free adamw": (
        lambda ps, lr: twins.AdamWScheduleFree(ps, lr, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2, warmup_steps=5),
        "z",
    ),
}  # fmt: skip
ONLY_BEFORE = ("adadelta", "adafactor", "hf adafactor")  # their state does not tell P of the last step


def decay_of(optimizer: optim.Optimizer, p: Tensor, kind: str) -> tuple[float, float]:
    """Return the weight decay added to the gradient, and the share by which the step shrinks the parameter."""
    group = optimizer.param_groups[0]
    w, lr = group["weight_decay"], learning_rate(group)
    if (
        isinstance(optimizer, optim.AdamW)
        or group.get("decoupled_weight_decay")
        or isinstance(optimizer, optim.Adafactor)
    ):
        return 0.0, lr * w
    if isinstance(optimizer, twins.Adafactor):
        t = optimizer.state[p].get("step", 0) + 1
        rate = min(1e-6 * t if group["warmup_init"] else 1e-2, t**-0.5) if group["relative_step"] else lr
        rms = float(p.detach().square().mean().sqrt()) if group["scale_parameter"] else 1.0
        return 0.0, w * rate * max(rms, group["eps"][1] if group["scale_parameter"] else 0.0)
    return (0.0 if kind == "z" else w), 0.0


def what_p_divides(optimizer: optim.Optimizer, p: Tensor, g: Tensor, kind: str, P: Tensor, D: Tensor) -> Tensor:
    """Return the numerator of the step just taken."""
    state, group = optimizer.state[p], optimizer.param_groups[0]
    if kind == "moment":
        return state["exp_avg"]
    if kind == "nadam":  # the optimizer's own two terms, over D = P without its factor
        b, t, later = group["betas"][0], float(state["step"]), float(state["mu_product"])
        mu, following = (b * (1 - 0.5 * 0.96 ** (i * group["momentum_decay"])) for i in (t, t + 1))
        both = g * (1 - mu) / (1 - later) + state["exp_avg"] * following / (1 - later * following)
        return both * (P / D).reshape(p.shape)
    return g


@pytest.mark.parametrize("name", STEPS)
def test_p_is_what_the_real_step_divides_by(name: str) -> None:
    """To 1e-6 in every element, over twelve steps: RAdam begins to use its second moment at the sixth."""
    make, kind = STEPS[name]
    params = [nn.Parameter(torch.randn(shape, dtype=F64)) for shape in SHAPES]
    optimizer = twins.begin(make(params, 0.03))
    lr = learning_rate(optimizer.param_groups[0])
    for _ in range(12):
        for p in params:
            p.grad = torch.randn_like(p) * torch.logspace(-2, 1, p.numel(), dtype=F64).reshape(p.shape)
        given = [p.grad.clone() for p in params]  # schedule-free optimizers use p.grad as scratch
        P = sk.preconditioner(optimizer, gradients="next")
        D = sk.preconditioner(optimizer, gradients="next", first_moment_correction=False)
        decays = [decay_of(optimizer, p, kind) for p in params]
        before = [p.detach().clone() for p in params]
        kept = [{k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, Tensor)} for p in params]
        optimizer.step()
        for p, g, x, old, (coupled, shrunk) in zip(params, given, before, kept, decays, strict=True):
            g = (-g if optimizer.param_groups[0].get("maximize") else g) + coupled * x
            P_p, D_p = P.diagonal([p]), D.diagonal([p])
            step, rate = p.detach() - (1 - shrunk) * x, lr
            if kind == "z":
                group = optimizer.param_groups[0]
                rate = group["scheduled_lr"]
                step = optimizer.state[p]["z"] - old.get("z", x) + rate * group["weight_decay"] * x
            elif kind == "averaged updates":
                b, m = 0.8, optimizer.state[p]["exp_avg"]
                step = -(m - b * old.get("exp_avg", torch.zeros_like(m))) / (1 - b)
            recovered = -rate * what_p_divides(optimizer, p, g, kind, P_p, D_p) / step
            torch.testing.assert_close(recovered.reshape(-1), P_p, rtol=1e-6, atol=0)
        if not name.startswith(ONLY_BEFORE):
            torch.testing.assert_close(sk.preconditioner(optimizer).diagonal(), P.diagonal(), rtol=1e-6, atol=0)
        else:
            with pytest.raises(RuntimeError, match="does not keep what made P of its last step: pass gradients='next'"):
                sk.preconditioner(optimizer)


def test_nadams_factor_makes_one_threshold_hold_at_every_age() -> None:
    """``kappa P`` is ``lr h`` at which NAdam's step of that age takes a swinging parameter to its negative."""
    b = 0.8
    p = nn.Parameter(torch.randn(3, dtype=F64))
    optimizer = optim.NAdam([p], 0.01, betas=(b, 0.9))
    kappa = sk.stability_threshold(optimizer)
    for _ in range(30):
        p.grad = torch.randn_like(p)
        optimizer.step()
        state, group = optimizer.state[p], optimizer.param_groups[0]
        t, product = float(state["step"]), float(state["mu_product"])
        mu, following = (b * (1 - 0.5 * 0.96 ** (i * group["momentum_decay"])) for i in (t, t + 1))
        swing = 0.0
        for i in range(200):  # the average of 1, -1, 1, ...
            swing = b * swing + (1 - b) * (-1) ** (199 - i)
        step = (1 - mu) / (1 - product) + following / (1 - product * following) * swing
        P, D = (sk.preconditioner(optimizer, first_moment_correction=c).diagonal() for c in (True, False))
        torch.testing.assert_close(kappa * P, 2 * D / step, rtol=1e-6, atol=0)


@pytest.mark.parametrize("twin", twins.NAMES, ids=twins.NAMES.get)
def test_a_stand_in_steps_like_the_class_it_stands_for(twin: Any) -> None:
    if twins.original(twin) is None:
        pytest.skip(f"{twins.NAMES[twin]} is not installed")
    options = {"lr": 0.03, "weight_decay": 0.2}
    for more in {
        twins.Adafactor: [
            {"lr": None}, {"lr": None, "warmup_init": True}, {"relative_step": False, "beta1": 0.7},
            {"relative_step": False, "scale_parameter": False},
        ],
        twins.SGDScheduleFree: [{"warmup_steps": 3}, {"r": 0.5}],
        twins.AdamWScheduleFree: [{"warmup_steps": 3, "betas": (0.8, 0.9)}, {"r": 0.5}],
    }.get(twin, [{"betas": (0.8, 0.95)}]):  # fmt: skip
        params = [nn.Parameter(torch.randn(shape, dtype=F64)) for shape in SHAPES]
        others = [nn.Parameter(p.detach().clone()) for p in params]
        ours, theirs = twin(params, **options | more), twins.original(twin)(others, **options | more)
        assert rule_of(ours) is rule_of(theirs)
        for optimizer in (ours, theirs):
            twins.begin(optimizer)
        for _ in range(6):
            for p, q in zip(params, others, strict=True):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
            ours.step()
            theirs.step()
            for p, q in zip(params, others, strict=True):
                torch.testing.assert_close(p, q)
                held = theirs.state[q]
                assert set(held) <= set(ours.state[p]) and all(
                    torch.equal(torch.as_tensor(held[key]).isfinite(), torch.as_tensor(ours.state[p][key]).isfinite())
                    for key in held
                )


def test_rates_of_zero_tensors_and_none() -> None:
    """lr is only a unit for P: a tensor, None, and 0 in all groups are fine."""
    p, q = (nn.Parameter(torch.randn(4, dtype=F64)) for _ in range(2))
    gradients = {x: torch.randn_like(x) for x in (p, q)}
    for make in (optim.Adam, optim.NAdam, optim.Adafactor, optim.Adadelta):
        want = sk.preconditioner(make([p, q], lr=1e-4), gradients=gradients).diagonal()
        for lr in (0.0, torch.tensor(1e-4, dtype=F64)):
            optimizer = make([p, q], lr=lr)
            torch.testing.assert_close(sk.preconditioner(optimizer, gradients=gradients).diagonal(), want)
            assert math.isfinite(sk.stability_threshold(optimizer))
    own = twins.Adafactor([{"params": [p]}, {"params": [q]}])
    assert sk.stability_threshold(own) == 2.0 and is_adaptive(own)
    own.param_groups[1]["lr"] = own.param_groups[0]["lr"] = 0.0
    with pytest.raises(RuntimeError, match="makes its own rate, but lr is 0"):
        sk.preconditioner(own, gradients=gradients)
