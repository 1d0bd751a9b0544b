"""Adam's family: a first moment, over the root of a second one or over a running maximum."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import kernels
from .rule import Group, Rule, Step, decayed
from .sgd import schedule_free_kappa


def _kappa(group: Group, first_step: bool) -> float:
    b = float(group["betas"][0])
    # Both for a first moment without its bias correction, which P holds: m is (1 - b) g at the first step, and
    # (1 - b) / (1 + b) of g in a swing with a period of two.
    kappa = 2 / (1 - b) if first_step else 2 * (1 + b) / (1 - b)
    return decayed(kappa, group) if group.get("decoupled_weight_decay") else kappa


def _second_moment(step: Step) -> Tensor:
    """Return ``v_t``, the running average of squared gradients."""
    squared = None if step.gradient is None else step.gradient**2
    return step.average("exp_avg_sq", squared, 1 - float(step.group["betas"][1]))


def _corrected(step: Step, v: Tensor, factor: float) -> Tensor:
    """Return P^-1/2 for ``P = factor (sqrt(v / (1 - b2^t)) + eps)``."""
    correction = 1 - float(step.group["betas"][1]) ** step.t
    return kernels.inv_sqrt_adam(v, bias_correction2=correction, eps=float(step.group["eps"]), factor=factor)


def _adam(step: Step) -> Tensor:
    """``P = (1 - b1^t) (sqrt(v_t / (1 - b2^t)) + eps)``; with amsgrad v_t is the running maximum."""
    if step.gradient is None:
        v = step.kept("max_exp_avg_sq" if step.group["amsgrad"] else "exp_avg_sq")
    else:
        # GIAdam starts from v_0 = g^2, so v_1 is g^2 too.
        starts = not step.state and getattr(step.optimizer, "starts_from_gradient", False)
        v = step.gradient**2 if starts else _second_moment(step)
        if step.group["amsgrad"] and step.state:
            v = torch.maximum(v, step.kept("max_exp_avg_sq"))
    return _corrected(step, v, step.correction)


def _radam(step: Step) -> Tensor:
    """``P = (1 - b1^t) (sqrt(v_t) + eps) / (r_t sqrt(1 - b2^t))``; ``P = 1 - b1^t`` while v_t is too young to use.

    r_t is the rectification. Unlike Adam, eps stands inside the bias correction of v_t.
    """
    beta2 = float(step.group["betas"][1])
    v = _second_moment(step)
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


def _mu(group: Group, t: float) -> float:
    """NAdam's momentum of step t, which rises from about b1 / 2 to b1."""
    return float(group["betas"][0]) * (1 - 0.5 * 0.96 ** (t * float(group["momentum_decay"])))


def _nadam_weights(group: Group, t: float, product: float) -> tuple[float, float]:
    """Return the weights c, d of step t, ``c g + d m``; product is that of the momenta mu_1 to mu_t."""
    following = _mu(group, t + 1)
    return (1 - _mu(group, t)) / (1 - product), following / (1 - product * following)


def _nadam_swing(b: float, c: float, d: float) -> float:
    """Return ``(c g + d m) / g`` in a swing with a period of two, where the average is ``m = g (1 - b) / (1 + b)``."""
    return c + d * (1 - b) / (1 + b)


def _nadam_factor(group: Group, t: float, product: float) -> float:
    """Return how much smaller P is than the denominator at step t, so that one kappa holds for all t."""
    b = float(group["betas"][0])
    return _nadam_swing(b, 1 - b, b) / _nadam_swing(b, *_nadam_weights(group, t, product))


def _nadam_kappa(group: Group, first_step: bool) -> float:
    """``2 (1 + b1) / ((1 - b1) (1 + 2 b1))``: Nesterov's threshold, for averages of gradients."""
    b = float(group["betas"][0])
    if first_step:  # m = (1 - b) g
        product = _mu(group, 1)
        c, d = _nadam_weights(group, 1, product)
        kappa = 2 / ((c + d * (1 - b)) * _nadam_factor(group, 1, product))
    else:
        kappa = 2 / _nadam_swing(b, 1 - b, b)
    return decayed(kappa, group) if group.get("decoupled_weight_decay") else kappa


def _nadam(step: Step) -> Tensor:
    """``P = f_t (sqrt(v_t / (1 - b2^t)) + eps)``; f_t goes to 1 and takes the place of Adam's ``1 - b1^t``."""
    product = float(step.state.get("mu_product", 1.0))
    # The state holds the product up to the last step.
    if step.gradient is not None:
        product *= _mu(step.group, step.t)
    factor = _nadam_factor(step.group, step.t, product) if step.first_moment_correction else 1.0
    return _corrected(step, _second_moment(step), factor)


def _schedule_free_kappa(group: Group, first_step: bool) -> float:
    return schedule_free_kappa(float(group["betas"][0]), group, first_step)


def _schedule_free(step: Step) -> Tensor:
    """``P = sqrt(v_t / (1 - b2^t)) + eps``; b1 averages parameters, so there is no first moment to correct."""
    return _corrected(step, _second_moment(step), 1.0)


# Keys of the moments other than Adam's are named: norms are looked up by them.
ADAM = Rule(_kappa, _adam)
RADAM = Rule(_kappa, _radam)
ADAMAX = Rule(_kappa, _adamax, ("exp_avg", "exp_inf"))
NADAM = Rule(_nadam_kappa, _nadam)
SCHEDULE_FREE_ADAMW = Rule(
    _schedule_free_kappa,
    _schedule_free,
    ("", "exp_avg_sq"),
    scales_with_lr=False,  # as in ``sgd``
    decay_in_gradient=False,
    # Before schedulefree 1.3 eps stood elsewhere; those versions have no ``scheduled_lr``.
    options="lr betas eps r k warmup_steps train_mode weight_sum lr_max scheduled_lr weight_lr_power weight_decay "
    "foreach",
)
