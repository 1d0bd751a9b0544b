"""Curvature in an optimizer's own norm, and along its own step: what there is to say where no diagonal P exists.

Three numbers, for one Hessian H:

    sharpness               max d'Hd over |d|_2 <= 1: H alone, no optimizer
    generalised sharpness   max d'Hd over |d| <= 1 in the optimizer's norm: the worst direction that it could take
    update curvature        u'Hu for the step u that it takes now: one direction, momentum and all
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..eigen import SymmetricOperator, lanczos
from ..eigen.common import check_whole
from .next_update import next_update
from .preconditioner import Gradients
from .rules import learning_rate
from .unit_ball import Cube, Ellipsoid, UnitBall, unit_ball


class ParameterSpaceOperator(SymmetricOperator, Protocol):
    """A symmetric operator on flat vectors of named parameters, such as ``HessianOperator``."""

    params: dict[str, Tensor]


@dataclass(frozen=True)
class GeneralisedSharpness:
    """The largest ``d'Hd`` found with d in the optimizer's unit ball.

    Attributes:
        value: ``d'Hd``, of the direction below.
        direction: d, ``[n]``, in the operator's dtype and order.
        kind: "eigenvalue" of ``P^-1/2 H P^-1/2``, by Lanczos, where the ball is an ellipsoid; else "lower bound": no
            method is known that finds the maximum in the cube (it contains the maximum cut of a graph) or in the
            spectral ball for certain.
        converged: Lanczos reached ``tol``; or the ascent from every start came to rest.
        products: with H, counted by columns.
    """

    value: float
    direction: Tensor
    kind: Literal["eigenvalue", "lower bound"]
    converged: bool
    products: int


@dataclass(frozen=True)
class UpdateCurvature:
    """Second-order change of the loss along an optimizer's next step, ``theta - lr u``.

    ``Record.update_curvature`` of a tracker is ``u'Hu / u'Pu`` of the same u, at every step.

        L(theta - lr u) - L(theta) = -lr g'u + lr^2 u'Hu / 2

    Attributes:
        curvature: ``u'Hu``.
        slope: ``g'u``.
        squared_norm: ``u'u``.
    """

    curvature: float
    slope: float
    squared_norm: float

    @property
    def directional_sharpness(self) -> float:
        """``u'Hu / u'u``: between the smallest and the largest eigenvalue of H; a ZeroDivisionError where u is 0."""
        return self.curvature / self.squared_norm

    @property
    def critical_lr(self) -> float:
        """The lr at which the second-order change is 0, ``2 g'u / u'Hu``; inf without one, 0 where u climbs."""
        # Momentum may point uphill: no step is then short enough.
        if self.slope <= 0:
            return 0.0
        return 2 * self.slope / self.curvature if self.curvature > 0 else math.inf


def generalised_sharpness(
    operator: ParameterSpaceOperator,
    optimizer: torch.optim.Optimizer,
    *,
    gradients: Gradients = None,
    starts: int = 8,
    max_products: int = 2000,
    tol: float = 1e-3,
    generator: torch.Generator | None = None,
) -> GeneralisedSharpness:
    """Return the largest ``d'Hd`` with ``|d| <= 1`` in the norm in which the optimizer descends (``unit_ball``).

        SGD           the largest eigenvalue of H                    Lanczos: an eigenvalue
        Adam, ...     the largest eigenvalue of ``P^-1 H``           Lanczos: an eigenvalue
        Lion          max d'Hd over the cube, NP-hard                ascent: a lower bound
        Muon          max d'Hd, spectral norm of every matrix <= 1   ascent: a lower bound

    The ascent goes from d towards the steepest direction of Hd, as far as ``d'Hd`` rises: Frank-Wolfe with an exact
    line search. Where H is positive it goes all the way, as a power iteration does. It never falls, and rests at a
    stationary point. In the cube too many vertices are stationary for an ascent from a random one to get far. So every
    component of d is first a vector with one number for each start, of length at most 1 (the relaxation of Goemans and
    Williamson with few columns), and random hyperplanes round what that ascent finds.

    The value is about steepest descent in the norm, ``theta <- theta - eta |g|_* d``, *without momentum*: there the
    loss falls to second order while it is below ``2 / eta``. For steps of a fixed length, as sign descent and Muon
    without momentum make, that is ``generalised_threshold``. Momentum and weight decay move the threshold, and no
    formula is known: for a run with them see ``update_curvature``. As a lower bound, the value can show that a
    threshold is passed, never that it is not.

    Args:
        operator: H, such as a ``HessianOperator``. Directions of parameters that the optimizer does not hold are 0.
        optimizer: one of the table in ``optimizers.rules``; only read. ``maximize`` changes nothing: for an ascent give
            the operator of the negative loss.
        gradients: for P of a diagonal optimizer, as for ``preconditioner``; the others need none.
        starts: columns of the ascent; more find more.
        max_products: with H, over all columns.
        tol: where an ascent rests: no direction promises a relative rise of more (or Lanczos's ``tol``).
        generator: of the random starts, on the CPU; None for seed 0.

    Returns:
        A ``GeneralisedSharpness``: its ``kind`` says what the value is.

    Raises:
        TypeError: the optimizer has no rule.
        ValueError: starts, max_products or tol is too small; the optimizer holds no parameter of the operator.
        RuntimeError: a product is not finite; see ``preconditioner``.

    Source: Islamov, Crawshaw, Cohen and Gower, Non-Euclidean gradient descent operates at the edge of stability (2026),
    for the definition and the threshold; Goemans and Williamson, Improved approximation algorithms for maximum cut
    (1995); Burer and Monteiro (2003), for few columns.
    """
    if starts < 1 or max_products < 2 * starts + 1 or not tol > 0:
        raise ValueError(
            f"starts must be at least 1, max_products at least 2 starts + 1 and tol positive, got {starts}, "
            f"{max_products} and {tol}."
        )
    check_whole(operator, "the generalised sharpness")
    ball = unit_ball(optimizer, list(operator.params.values()), gradients=gradients)
    generator = generator or torch.Generator().manual_seed(0)
    if isinstance(ball, Ellipsoid):
        return _eigenvalue(operator, ball, max_products, tol, generator)
    return _lower_bound(operator, ball, starts, max_products, tol, generator)


def generalised_threshold(optimizer: torch.optim.Optimizer, gradients: Mapping[Tensor, Tensor]) -> float:
    """Return the generalised sharpness up to which the loss falls to second order, *without momentum*.

    ``2 |g|_* / lr`` for Lion and Muon, whose step has a fixed length: ``eta = lr / |g|_*`` makes it steepest descent.
    ``2 / lr`` for a diagonal P. lr is the first group's.

    Args:
        optimizer: one of the table in ``optimizers.rules``; only read.
        gradients: parameter -> gradient.

    Raises:
        TypeError, ValueError: see ``unit_ball``.
    """
    lr = learning_rate(optimizer.param_groups[0])
    # P does not matter for the ellipsoid: its steepest descent is the optimizer's own step, dual norm included.
    ball = unit_ball(optimizer, list(gradients), gradients=gradients)
    size = 1.0 if isinstance(ball, Ellipsoid) else ball.dual_norm(_flat(gradients.values()))
    return 2 * size / lr if lr > 0 else math.inf


def update_curvature(
    operator: ParameterSpaceOperator, optimizer: torch.optim.Optimizer, gradients: Mapping[Tensor, Tensor]
) -> UpdateCurvature:
    """Return the curvature of the loss along the step that the optimizer would take now.

    Defined for every optimizer that has a step, with momentum, weight decay and any geometry: u is what ``next_update``
    returns. It is about this one step and says nothing of others: a run may be unstable in a direction that u hardly
    contains.

    Args:
        operator: H at the present parameters.
        optimizer: only read.
        gradients: parameter -> gradient, at the same parameters; the others do not move.

    Returns:
        An ``UpdateCurvature``.

    Raises:
        ValueError: a gradient belongs to no parameter of the operator.
        TypeError, RuntimeError: see ``next_update``.

    Cost: one product with H, and the copies of ``next_update``.
    Source: the second-order Taylor polynomial; u'Hu / u'u is the normalised directional sharpness of the Muon papers.

    >>> class Diagonal:
    ...     n, dtype, device, params = 2, torch.float64, torch.device("cpu"), {"w": torch.ones(2).double()}
    ...
    ...     def matmat(self, V):
    ...         return torch.tensor([[4.0], [1.0]]).double() * V
    >>> w = Diagonal.params["w"]
    >>> update_curvature(Diagonal(), torch.optim.SGD([w], lr=0.1), {w: torch.tensor([4.0, 1.0]).double()})
    UpdateCurvature(curvature=65.0, slope=17.0, squared_norm=17.0)
    """
    # A gradient that no column of H belongs to would be lost without a word.
    check_whole(operator, "the update's curvature")
    own = {id(p) for p in operator.params.values()}
    if strange := [list(p.shape) for p in gradients if id(p) not in own]:
        raise ValueError(f"gradients holds parameters that are not the operator's, of shapes {strange[:5]}.")
    updates = next_update(optimizer, gradients)
    u = _flat(updates.get(p, torch.zeros_like(p, dtype=torch.float64)) for p in operator.params.values())
    g = _flat(gradients.get(p, torch.zeros_like(p)).to(torch.float64) for p in operator.params.values())
    # Of unit length for the product, in which the squares of a very long or short u could overflow or vanish.
    length = float(torch.linalg.vector_norm(u))
    if length == 0:
        return UpdateCurvature(0.0, 0.0, 0.0)
    unit = (u / length).to(operator.dtype)
    along = float(_dots(unit[None], operator.matmat(unit[:, None]).t()))
    return UpdateCurvature(along * length**2, float(g @ u), length**2)


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


class _Scaled:
    """``S A S`` for a diagonal S."""

    def __init__(self, operator: SymmetricOperator, scale: Tensor) -> None:
        self.operator, self.scale = operator, scale[:, None]
        self.n, self.dtype, self.device = operator.n, operator.dtype, operator.device

    def matmat(self, V: Tensor) -> Tensor:
        return self.scale * self.operator.matmat(self.scale * V)


def _eigenvalue(
    operator: SymmetricOperator, ball: Ellipsoid, max_products: int, tol: float, generator: torch.Generator
) -> GeneralisedSharpness:
    scale = ball.inv_sqrt.to(operator.dtype)
    found = lanczos(_Scaled(operator, scale), tol=tol, max_matvecs=max_products, generator=generator)
    return GeneralisedSharpness(
        float(found.eigenvalues[0]), scale * found.eigenvectors[0], "eigenvalue", found.converged, found.matvecs
    )


def _lower_bound(
    operator: SymmetricOperator, ball: UnitBall, starts: int, max_products: int, tol: float, generator: torch.Generator
) -> GeneralisedSharpness:
    """Ascend from random starts, and return the best."""
    # Drawn on the CPU, so that results do not depend on the device.
    rows = torch.randn(starts, operator.n, dtype=operator.dtype, generator=generator).to(operator.device)
    spent = 0
    # One product is kept for the value returned.
    left = (max_products - 1) // starts
    if isinstance(ball, Cube) and starts > 1:
        radii = ball.radii.to(operator.dtype)

        def lengthen(block: Tensor) -> Tensor:
            return torch.nn.functional.normalize(block, dim=0) * radii

        # Half of the budget at most, as what is rounded still has to be polished.
        relaxed = _ascend(operator, lengthen(rows), lengthen, tol, left // 2, joint=True)
        # Hyperplanes: row j of mixing @ V has the sides of the vectors to the j-th; the cube's steepest takes signs.
        mixing = torch.randn(starts, starts, dtype=operator.dtype, generator=generator).to(operator.device)
        rows, spent = mixing @ relaxed.rows, relaxed.steps
    final = _ascend(operator, ball.steepest(rows).to(rows.dtype), ball.steepest, tol, left - spent, joint=False)
    best = final.rows[int(final.values.argmax())]
    # Anew: the ascent's own products are sums of earlier ones.
    value = float(_dots(best[None], operator.matmat(best[:, None]).t()))
    if not math.isfinite(value):
        raise RuntimeError("a product of the operator is not finite: its values cannot be trusted.")
    return GeneralisedSharpness(value, best, "lower bound", final.rested, starts * (spent + final.steps) + 1)


@dataclass(frozen=True)
class _Ascent:
    """Where an ascent ended: ``[k, n]`` rows, their values ``[k]``, steps of k products each, whether it rested."""

    rows: Tensor
    values: Tensor
    steps: int
    rested: bool


def _ascend(
    operator: SymmetricOperator,
    rows: Tensor,
    steepest: Callable[[Tensor], Tensor],
    tol: float,
    steps: int,
    *,
    joint: bool,
) -> _Ascent:
    """Raise ``d'Hd`` of every row by Frank-Wolfe steps; jointly, the sum of all, with one step length for all."""

    def dots(x: Tensor, y: Tensor) -> Tensor:
        return _dots(x, y).sum(0, keepdim=True) if joint else _dots(x, y)

    products = operator.matmat(rows.t()).t()
    rested, taken = False, 1
    while taken < steps:
        target = steepest(products).to(rows.dtype)
        slope = dots(target - rows, products)
        values = dots(rows, products)
        # 2 slope is the rise that the tangent promises: of no convex form can the rise be smaller.
        rested = bool((2 * slope <= tol * values.abs()).all())
        if rested:
            break
        images = operator.matmat(target.t()).t()
        taken += 1
        bend = dots(target - rows, images - products)
        # d + a (target - d) has the form value + 2 a slope + a^2 bend: where it is convex, the end a = 1 is best.
        # A row at rest has a slope of rounding size and either sign: clamped, as it must not leave the ball.
        length = torch.where(bend >= 0, torch.ones_like(bend), (-slope / bend).clamp(0.0, 1.0))
        # lerp gives the target itself at 1, so that vertices stay vertices.
        weight = length.to(rows.dtype)[:, None]
        rows, products = rows.lerp(target, weight), products.lerp(images, weight)
    return _Ascent(rows, _dots(rows, products), taken, rested)


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """Return the dot products of rows, ``[k]`` float64."""
    return (x * y).sum(1, dtype=torch.float64)
