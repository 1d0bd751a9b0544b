"""Curvature along two directions of a training step, each for about half a Hessian-vector product."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..curvature.parameters import flatten
from ..kernels import gram
from ..optimizers.next_update import next_update
from ..optimizers.preconditioner import Preconditioner
from ..optimizers.rules import inner_optimizer
from .gradients import climbs
from .target import StepHessian

_PARALLEL = 1e-6  # distance of two unit vectors below which one form serves for both
_SMALL = 1e-12  # square of a length; below this and above its inverse vectors are scaled


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
    g, u = _Direction.of(hessian.gradient.to(hessian.dtype)), None
    # The gradients may be clipped or accumulated, so they need not be along g even for plain SGD.
    update: Mapping[Tensor, Tensor] | None = {p: gradients[p] for p in params}
    if not _follows_gradient(optimizer):
        update = _next_update(optimizer, {p: gradients[p] for p in params}) if two_forms else None
    if update is not None:
        u = _Direction.of(flatten([update[p] for p in params]).to(hessian.device, hessian.dtype))
    if g is not None and u is not None and g.is_parallel_to(u):
        u = g
    elif not two_forms:
        u = None
    # One block, because the two share every read of the weights.
    directions = [d for d in (g, None if u is g else u) if d is not None]
    if not directions:
        return None, None
    sign = -1.0 if climbs(optimizer) else 1.0  # to climb is to descend minus the loss
    forms = hessian.form_rows(_rows([d.vector for d in directions])).tolist()
    along = {id(d): sign * form / d.square for d, form in zip(directions, forms, strict=True)}
    batch = None if g is None else along[id(g)]
    if u is None:
        return batch, None
    return batch, along[id(u)] * (1.0 if preconditioner is None else _euclidean_share(u, preconditioner, params))


@dataclass(frozen=True)
class _Direction:
    """A vector that need not have length one, which would cost a copy.

    Attributes:
        vector: ``[n]``.
        square: of its length.
    """

    vector: Tensor
    square: float

    @staticmethod
    def of(v: Tensor) -> _Direction | None:
        """Take a vector whose square, and that of its product with H, neither under- nor overflows; None if it is 0."""
        square = _inner(v, v)
        if _SMALL < square < 1 / _SMALL:
            return _Direction(v, square)
        largest = float(v.abs().max())
        if largest == 0 or not math.isfinite(largest):
            return None
        v = v / largest
        return _Direction(v, _inner(v, v))

    def is_parallel_to(self, other: _Direction) -> bool:
        # The sums are float64's, so that 1 - cos^2 of two float32 vectors has twelve digits.
        product = _inner(self.vector, other.vector)
        return self.square * other.square - product**2 < _PARALLEL**2 * self.square * other.square


def _inner(v: Tensor, w: Tensor) -> float:
    return float(gram(v.unsqueeze(0), w.unsqueeze(0)))


def _rows(vectors: list[Tensor]) -> Tensor:
    return vectors[0].unsqueeze(0) if len(vectors) == 1 else torch.stack(vectors)


def _euclidean_share(u: _Direction, preconditioner: Preconditioner, params: list[Tensor]) -> float:
    """Return u'u / u'Pu."""
    stretched = u.vector / preconditioner.inv_sqrt(params).to(u.vector)
    return u.square / _inner(stretched, stretched)


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
