"""What each optimizer does: one table, from an optimizer's class to its rule.

A rule says how P^-1/2 is read from the optimizer's state, where the optimizer turns unstable, what its moments are
called, and how far the loss may rise at the critical learning rate. Everything else in this package asks ``rule_of``.
To add an optimizer, add its entry to the table at the end of this file, or call ``register`` from your own code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from .gi_adam import GIAdam
from .parts import local_part

Group = dict[str, Any]
Optimizer = torch.optim.Optimizer


@dataclass(frozen=True)
class Step:
    """One parameter's part in a step, as ``Rule.inv_sqrt`` sees it.

    Attributes:
        optimizer: only read.
        group: the parameter group that holds the parameter.
        state: the parameter's state; {} before its first step, and then ``gradient`` is given.
        gradient: flat ``[n]``, as the moments see it: its sign turned under ``maximize``, coupled weight decay added.
            None where P is that of the step last taken, to be read from the state as it is.
        dtype: of the result, float32 or float64.
        first_moment_correction: whether P has the factor ``1 - b1^t``.
    """

    optimizer: Optimizer
    group: Group
    state: dict[str, Any]
    gradient: Tensor | None
    dtype: torch.dtype
    first_moment_correction: bool

    @cached_property
    def t(self) -> float:
        """The number of the step that P belongs to, 1 for the first."""
        done = float(self.state["step"]) if self.state else 0.0
        return done if self.gradient is None else done + 1

    def kept(self, key: str) -> Tensor:
        """Return an entry of the state, flat ``[n]``; this process's part of a DTensor."""
        return local_part(self.state[key]).reshape(-1).to(self.dtype)

    def average(self, key: str, value: Tensor | None, weight: float) -> Tensor:
        """Return a running average after the step, flat: ``average + weight (value - average)``, from zero."""
        if value is None:
            return self.kept(key)
        return self.kept(key).lerp(value, weight) if self.state else value * weight

    @property
    def correction(self) -> float:
        """The bias correction of the first moment, ``1 - b1^t``; 1 where P is asked for without it."""
        return 1 - float(self.group["betas"][0]) ** self.t if self.first_moment_correction else 1.0


@dataclass(frozen=True)
class Rule:
    """One optimizer.

    Attributes:
        kappa: ``(group, first_step) -> float``: on a quadratic loss the group is stable while ``lr * curvature`` is
            below kappa, decoupled weight decay included; ``first_step`` asks for the step with an empty momentum.
        inv_sqrt: ``Step -> [n]``: P^-1/2 of one parameter, flat, in the step's dtype; None for P = 1.
        moments: keys of the state that hold the first and the second moment; "" for none.
        rise: relative rise of the loss that one step at the critical learning rate may cause. Adaptive optimizers get
            less: a spike inflates their second moment for ``1 / (1 - b2)`` steps.
    """

    kappa: Callable[[Group, bool], float]
    inv_sqrt: Callable[[Step], Tensor] | None = None
    moments: tuple[str, str] = ("exp_avg", "exp_avg_sq")
    rise: float = 0.01

    @property
    def adaptive(self) -> bool:
        """Whether P is anything but the identity, parameter groups apart."""
        return self.inv_sqrt is not None


def register(cls: type[Optimizer], rule: Rule) -> None:
    """Make an optimizer class known, or replace its rule, for the whole process.

    Args:
        cls: the class. Subclasses that override neither ``step`` nor ``_init_group`` follow it.
        rule: check it as tests/test_optimizer_rules.py does: step the optimizer, and compare.
    """
    _RULES[cls] = rule


def rule_of(optimizer: Optimizer) -> Rule:
    """Return an optimizer's rule.

    Raises:
        TypeError: its class is not in the table, or overrides a part of the step of one that is.
    """
    cls = type(inner_optimizer(optimizer))
    base = next((c for c in cls.__mro__ if c in _RULES), None)
    known = ", ".join(f"sharpkern.{c.__name__}" if c is GIAdam else c.__name__ for c in _RULES)
    hint = f"supported: {known}; others by sharpkern.optimizers.rules.register(cls, rule)."
    if base is None:
        raise TypeError(f"no preconditioner and no stability threshold is known for {cls.__name__}; {hint}")
    changed = [name for name in ("step", "_init_group") if _body(cls, name) is not _body(base, name)]
    if changed:
        raise TypeError(
            f"{cls.__name__} overrides {' and '.join(changed)} of {base.__name__}, so no rule is known for "
            f"{cls.__name__}; {hint}"
        )
    return _RULES[base]


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that a trainer's wrapper steps; others that hold an optimizer may change its step."""
    inner = getattr(optimizer, "optimizer", None)
    trainer = type(optimizer).__module__.partition(".")[0] in _WRAPPERS
    return inner if trainer and isinstance(inner, Optimizer) else optimizer


def _body(cls: type[Optimizer], name: str) -> Any:
    """Return a method without its decorators: torch hooks ``step`` of every class at its first instance."""
    return inspect.unwrap(getattr(cls, name, None) or _body)


def _sgd_kappa(group: Group, first_step: bool) -> float:
    b, dampening = float(group["momentum"]), float(group["dampening"])
    if b == 0:
        kappa = 2.0
    elif first_step:  # the first buffer is the gradient itself, not dampened
        kappa = 2 / (1 + b) if group["nesterov"] else 2.0
    elif group["nesterov"]:
        kappa = 2 * (1 + b) / (1 + 2 * b)
    else:
        kappa = 2 * (1 + b) / (1 - dampening)
    # Coupled decay adds w to every curvature; P is 1, so kappa can take it off again.
    return kappa - float(group["lr"]) * float(group["weight_decay"])


def _adam_kappa(group: Group, first_step: bool) -> float:
    b = float(group["betas"][0])
    kappa = 2 / (1 - b) if first_step else 2 * (1 + b) / (1 - b)
    if group.get("decoupled_weight_decay"):
        kappa *= 1 - float(group["lr"]) * float(group["weight_decay"]) / 2
    return kappa


def _rmsprop_kappa(group: Group, first_step: bool) -> float:
    return 2.0 if first_step else 2 * (1 + float(group["momentum"]))


def _plain_kappa(_group: Group, _first_step: bool) -> float:
    return 2.0


def _adam(step: Step) -> Tensor:
    """``P = (1 - b1^t) (sqrt(v_t / (1 - b2^t)) + eps)``; with amsgrad v_t is the running maximum."""
    beta2 = float(step.group["betas"][1])
    if step.gradient is None:
        v = step.kept("max_exp_avg_sq" if step.group["amsgrad"] else "exp_avg_sq")
    else:
        squared = step.gradient**2
        # GIAdam starts from v_0 = g^2, so v_1 is g^2 too.
        starts = not step.state and getattr(step.optimizer, "starts_from_gradient", False)
        v = squared if starts else step.average("exp_avg_sq", squared, 1 - beta2)
        if step.group["amsgrad"] and step.state:
            v = torch.maximum(v, step.kept("max_exp_avg_sq"))
    return kernels.inv_sqrt_adam(
        v, bias_correction2=1 - beta2**step.t, eps=float(step.group["eps"]), factor=step.correction
    )


def _radam(step: Step) -> Tensor:
    """``P = (1 - b1^t) (sqrt(v_t) + eps) / (r_t sqrt(1 - b2^t))``; ``P = 1 - b1^t`` while v_t is too young to use.

    r_t is the rectification. Unlike Adam, eps stands inside the bias correction of v_t.
    """
    beta2 = float(step.group["betas"][1])
    squared = None if step.gradient is None else step.gradient**2
    v = step.average("exp_avg_sq", squared, 1 - beta2)
    correction2 = 1 - beta2**step.t
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step.t * beta2**step.t / correction2
    if length <= 5:  # torch's own bound: before, RAdam steps by the first moment alone
        return torch.full_like(v, step.correction**-0.5)
    r = ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)) ** 0.5
    factor = step.correction / (r * correction2**0.5)
    return kernels.inv_sqrt_adam(v, bias_correction2=1.0, eps=float(step.group["eps"]), factor=factor)


def _adamax(step: Step) -> Tensor:
    """``P = (1 - b1^t) u_t``, where ``u_t = max(b2 u_{t-1}, |g_t| + eps)``."""
    if step.gradient is None:
        u = step.kept("exp_inf")
    else:
        u = step.gradient.abs() + float(step.group["eps"])
        if step.state:
            u = torch.maximum(u, float(step.group["betas"][1]) * step.kept("exp_inf"))
    return (u * step.correction) ** -0.5


def _rmsprop(step: Step) -> Tensor:
    """``P = sqrt(v_t) + eps``; centered: v_t less the squared running mean of g."""
    weight = 1 - float(step.group["alpha"])
    v = step.average("square_avg", None if step.gradient is None else step.gradient**2, weight)
    if step.group["centered"]:
        # Rounding may take the difference below zero, where all gradients were alike.
        v = (v - step.average("grad_avg", step.gradient, weight) ** 2).clamp_(min=0)
    return kernels.inv_sqrt_adam(v, bias_correction2=1.0, eps=float(step.group["eps"]), factor=1.0)


def _adagrad(step: Step) -> Tensor:
    """``P = (1 + (t - 1) lr_decay) (sqrt(s_t) + eps)``, with s_t the sum of all squared gradients."""
    total = step.kept("sum")  # there from the start, at initial_accumulator_value
    if step.gradient is not None:
        total = total + step.gradient**2
    slower = 1 + (step.t - 1) * float(step.group["lr_decay"])
    return kernels.inv_sqrt_adam(total, bias_correction2=1.0, eps=float(step.group["eps"]), factor=slower)


# Lightning and accelerate wrap an optimizer without changing what it does to the parameters.
_WRAPPERS = ("accelerate", "lightning", "pytorch_lightning")
_ADAM = Rule(_adam_kappa, _adam)
# Exact classes. A subclass follows its parent only while it overrides no part of the step: see ``rule_of``.
_RULES: dict[type[Optimizer], Rule] = {
    torch.optim.SGD: Rule(_sgd_kappa, moments=("momentum_buffer", ""), rise=0.1),
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    GIAdam: _ADAM,
    torch.optim.RMSprop: Rule(_rmsprop_kappa, _rmsprop, ("momentum_buffer", "square_avg")),
    torch.optim.RAdam: Rule(_adam_kappa, _radam),
    torch.optim.Adamax: Rule(_adam_kappa, _adamax, ("exp_avg", "exp_inf")),
    torch.optim.Adagrad: Rule(_plain_kappa, _adagrad, ("", "sum")),
}
