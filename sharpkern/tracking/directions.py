"""Curvature along two directions of a training step, each for about half a Hessian-vector product."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..curvature.parameters import flatten
from ..optimizers.next_update import next_update
from ..optimizers.preconditioner import Preconditioner
from ..optimizers.rules import inner_optimizer
from .gradients import climbs
from .target import StepHessian

_PARALLEL = 1e-6  # distance of two unit vectors below which one form serves for both


def directional_curvatures(
    hessian: StepHessian,
    optimizer: torch.optim.Optimizer,
    gradients: Mapping[Tensor, Tensor],
    preconditioner: Preconditioner | None,
    *,
    two_forms: bool = True,
) -> tuple[float | None, float | None]:
    """Return the batch sharpness and the curvature along the next update.

        batch sharpness    g'Hg / g'g
        update curvature   u'Hu / u'Pu,   theta <- theta - lr u

    An optimizer with ``maximize=True`` descends minus the loss, and both are of that.

    Args:
        hessian: H of the step's batch, with its gradient g.
        optimizer: makes u from the gradients; only read.
        gradients: parameter -> the gradient that the optimizer will step with.
        preconditioner: P; None for the Euclidean norm.
        two_forms: False leaves the update curvature out where it needs a form of its own.

    Returns:
        Both; None for a direction of length zero or left out, and for an optimizer without a next update.

    Cost: one form each, about half a Hessian-vector product; one for both where u is a multiple of g. The next update
    is a step of a copy of the optimizer.
    Source: batch sharpness, Andreyev and Beneventano, Edge of stochastic stability (arXiv 2412.20553).
    """
    params = list(hessian.params.values())
    g, u = _unit(hessian.gradient.to(hessian.dtype)), None
    # The gradients may be clipped or accumulated, so they need not be along g even for plain SGD.
    update: Mapping[Tensor, Tensor] | None = {p: gradients[p] for p in params}
    if not _follows_gradient(optimizer):
        update = _next_update(optimizer, {p: gradients[p] for p in params}) if two_forms else None
    if update is not None:
        u = _unit(flatten([update[p] for p in params]).to(hessian.device, hessian.dtype))
    if g is not None and u is not None and min(float((u - g).norm()), float((u + g).norm())) < _PARALLEL:
        u = g
    elif not two_forms:
        u = None
    # One block, because the two share every read of the weights.
    directions = [d for d in (g, None if u is g else u) if d is not None]
    sign = -1.0 if climbs(optimizer) else 1.0  # to climb is to descend minus the loss
    forms = (sign * hessian.form_rows(torch.stack(directions))).tolist() if directions else []
    along = {id(d): form for d, form in zip(directions, forms, strict=True)}
    batch = None if g is None else along[id(g)]
    if u is None:
        return batch, None
    scale = 1.0
    if preconditioner is not None:  # the form is of the Euclidean unit vector
        scale = float(torch.linalg.vector_norm(u / preconditioner.inv_sqrt(params).to(u), dtype=torch.float64)) ** 2
    return batch, along[id(u)] / scale


def _follows_gradient(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether the next update is a multiple of the gradient, which saves taking a copy's step."""
    groups = optimizer.param_groups
    plain = type(inner_optimizer(optimizer)) is torch.optim.SGD and len({float(g["lr"]) for g in groups}) == 1
    return plain and all(g["momentum"] == 0 and g["weight_decay"] == 0 for g in groups)


def _next_update(optimizer: torch.optim.Optimizer, gradients: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor] | None:
    try:
        return next_update(optimizer, gradients, precise=False)
    except (TypeError, RuntimeError):
        # It needs a closure, as LBFGS does; or lr is 0, and the step is no multiple of it.
        return None


def _unit(v: Tensor) -> Tensor | None:
    """Scale to length one, so that no square under- or overflows; None if there is no direction."""
    largest = float(v.abs().max())
    if largest == 0 or not math.isfinite(largest):
        return None
    v = v / largest
    return v / torch.linalg.vector_norm(v)
