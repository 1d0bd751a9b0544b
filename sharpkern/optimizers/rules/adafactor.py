"""Adafactor, torch's and Hugging Face's: the second moment of a matrix is kept as its row and column means.

In both, P contains the clipping of the update and the scaling by the parameter's size, which depend on the gradient and
on the parameter before the step. So P is known before the step only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .rule import Group, Rule, Step, decayed, learning_rate


def _rms(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) / math.sqrt(max(x.numel(), 1))


def _moment(step: Step, key: str, value: Tensor, weight: float) -> Tensor:
    """Return a running average after the step, in the shape of value."""
    if not step.state:
        return value * weight
    kept: Tensor = step.state[key]
    return kept.reshape(value.shape).to(step.dtype).lerp(value, weight)


def _clipped(root: Tensor, g: Tensor, limit: float, rate: float) -> Tensor:
    """Return P^-1/2, flat, of the step ``rate g / (root max(1, rms(g / root) / limit))``."""
    clipping = max(1.0, _rms(g / root) / limit)
    return (rate / (clipping * root)).sqrt_().reshape(-1)


def _torch_kappa(group: Group, _first_step: bool) -> float:
    # The decay goes by lr itself, not by the capped and scaled rate.
    return decayed(2.0, group)


def _torch_adafactor(step: Step) -> Tensor:
    """``P = max(sqrt(V), e1) max(1, rms(g / sqrt(V)) / d) max(1, lr sqrt(t)) / max(e2, rms(theta))``.

    For a matrix ``V = r c / mean(r)``, with r and c the running means of g^2 over rows and columns. The cap
    ``lr <= 1 / sqrt(t)`` is part of P, so that lr P^-1 is what multiplies g.
    """
    g = step.coming_gradient().reshape(step.matrix().shape)
    smallest, floor = step.group["eps"]
    smallest = torch.finfo(step.matrix().dtype).eps if smallest is None else float(smallest)
    weight = step.t ** float(step.group["beta2_decay"])
    if g.ndim > 1:
        rows = _moment(step, "row_var", (g**2).mean(-1, keepdim=True), weight)
        columns = _moment(step, "col_var", (g**2).mean(-2, keepdim=True), weight)
        v = rows @ columns / rows.mean(-2, keepdim=True).clamp(min=smallest)
    else:
        v = _moment(step, "variance", g**2, weight)
    # Not lr / min(lr, 1 / sqrt(t)), as lr may be 0.
    cap = max(1.0, learning_rate(step.group) * math.sqrt(step.t))
    scale = max(float(floor), _rms(step.matrix().detach()))
    return _clipped(v.clamp(min=smallest**2).sqrt(), g, float(step.group["d"]), scale / cap)


def _hugging_face_kappa(group: Group, first_step: bool) -> float:
    b = float(group["beta1"] or 0.0)
    kappa = 2 / (1 - b) if first_step else 2 * (1 + b) / (1 - b)
    # Elsewhere the decay goes by the rate of each parameter. It is then left out: kappa is too high by a share of half
    # that rate times w, which is below 5e-3 w where the parameters are no larger than 1.
    own_rate = group["relative_step"] or group["scale_parameter"]
    return kappa if own_rate else decayed(kappa, group)


def _relative_rate(group: Group, t: float) -> float:
    """Return the rate that the optimizer makes itself, over lr; lr is None here, unless a schedule has shown it."""
    lr = learning_rate(group)
    if lr == 0:
        raise RuntimeError(
            "with relative_step Adafactor makes its own rate, but lr is 0: P is relative to lr. Set None."
        )
    return min(1e-6 * t if group["warmup_init"] else 1e-2, 1 / math.sqrt(t)) / lr


def _hugging_face_adafactor(step: Step) -> Tensor:
    """``P = lr sqrt(V) max(1, rms(g / sqrt(V)) / d) / rate``; V averages ``g^2 + e1``.

    The rate is lr, or ``min(1e-2, 1 / sqrt(t))`` with ``relative_step`` (``1e-6 t`` for 1e-2 with ``warmup_init``),
    times ``max(e2, rms(theta))`` with ``scale_parameter``. With beta1 the updates are averaged, not the gradients; P is
    that of the update before it is averaged.
    """
    group, t = step.group, step.t
    g = step.coming_gradient().reshape(step.matrix().shape)
    weight = t ** float(group["decay_rate"])
    squares = g**2 + float(group["eps"][0])
    if g.ndim > 1:
        rows = _moment(step, "exp_avg_sq_row", squares.mean(-1), weight)
        columns = _moment(step, "exp_avg_sq_col", squares.mean(-2), weight)
        # Roots first: the product of two means near e1 = 1e-30 is below float32.
        root = (rows / rows.mean(-1, keepdim=True)).sqrt().unsqueeze(-1) * columns.sqrt().unsqueeze(-2)
    else:
        root = _moment(step, "exp_avg_sq", squares, weight).sqrt()
    rate = _relative_rate(group, t) if group["relative_step"] else 1.0
    if group["scale_parameter"]:
        rate *= max(float(group["eps"][1]), _rms(step.matrix().detach()))
    return _clipped(root, g, float(group["clip_threshold"]), rate)


# The cap on lr, and a rate that is not lr at all, make the step no multiple of lr. Of a matrix's second moment there
# are only means, so its norm is not to be had: no key is better than that of the vectors alone.
TORCH_ADAFACTOR = Rule(_torch_kappa, _torch_adafactor, ("", ""), scales_with_lr=False, decay_in_gradient=False)
HUGGING_FACE_ADAFACTOR = Rule(
    _hugging_face_kappa,
    _hugging_face_adafactor,
    ("exp_avg", ""),
    scales_with_lr=False,
    decay_in_gradient=False,
    options="lr eps clip_threshold decay_rate beta1 weight_decay scale_parameter relative_step warmup_init",
)
