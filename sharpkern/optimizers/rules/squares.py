"""Gradients over the root of their squares, without a first moment: RMSprop, Adagrad, Adadelta."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import kernels
from .rule import Group, Rule, Step


def _rmsprop_kappa(group: Group, first_step: bool) -> float:
    # The buffer adds up g / P; with P frozen that is SGD's heavy ball.
    return 2.0 if first_step else 2 * (1 + float(group["momentum"]))


def _plain_kappa(_group: Group, _first_step: bool) -> float:
    return 2.0


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


def _adadelta(step: Step) -> Tensor:
    """``P = sqrt(v_t + eps) / sqrt(u_{t-1} + eps)``, with u the running average of squared updates.

    The state holds u_t after a step, so P is known before the step only.
    """
    eps, g = float(step.group["eps"]), step.coming_gradient()
    v = step.average("square_avg", g**2, 1 - float(step.group["rho"]))
    u = step.kept("acc_delta") if step.state else torch.zeros_like(v)
    return ((u + eps) / (v + eps)) ** 0.25


RMSPROP = Rule(_rmsprop_kappa, _rmsprop, ("momentum_buffer", "square_avg"))
ADAGRAD = Rule(_plain_kappa, _adagrad, ("", "sum"))
ADADELTA = Rule(_plain_kappa, _adadelta, ("", "square_avg"))
