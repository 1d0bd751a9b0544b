"""One training step as the tracker saw it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from .budget import Status


@dataclass(frozen=True)
class Record:
    """One training step as the tracker saw it, before the update.

    Attributes:
        step: 1 for the first step.
        loss: at the parameters before the update, on the step's batch. NaN where ``observe`` computed nothing.
        lr: learning rate of the optimizer's first group, as it was when the step was tracked.
        grad_norm: Euclidean norm of the gradient; for ``observe``, of the gradients to step with.
        sharpness: largest algebraic eigenvalue of the Hessian; of minus the loss for an optimizer that maximises it.
            NaN with ``products=False``.
        sharpness_error: at a measured step the residual norm (of the two largest Ritz pairs, where they are closer
            than twice ``tol``) and rounding: an eigenvalue lies this close to ``sharpness``. Else an estimate: that of
            the last measured step, and by how much the sharpness has probably moved since.
        preconditioned_sharpness: largest eigenvalue of P^-1 H for an adaptive optimizer, and for parameter groups with
            learning rates or thresholds of their own, each group scaled so that one threshold holds for all
            (``optimizers.threshold.threshold_scales``); else None.
        preconditioned_sharpness_error: likewise.
        threshold: kappa / lr: training is stable on a quadratic while the (preconditioned) sharpness is below it.
            Infinite when lr is 0; None for an optimizer without a known threshold.
        ratio: (preconditioned) sharpness / threshold; above 1 is beyond the edge of stability.
        matvecs: Hessian-vector products spent at this step.
        status: "measured": solved to ``tol``, or ``converged`` is False. "bounded": the Rayleigh quotient of the last
            measured vector, a lower bound. "carried": the last value. "untracked": none, with ``products=False``.
            "failed": a product or a preconditioner was not finite, so that sharpness, its error and ratio are NaN;
            what was spent before it failed is not in ``matvecs``. The next step is measured as if nothing had been.
        converged: every solve of this step reached ``tol``.
        eigenvalues: the k largest at the last measured step, of ``preconditioned_sharpness``'s operator if there is
            one, else of the Hessian.
        overlaps: for each of their vectors, the length of its projection onto the span of those of the measured step
            before; None at the first. Small ones mark a crossing, or a cluster, whose single vectors mean nothing.
        upper: with ``certify``: with probability at least 0.99 over its random start, the (preconditioned) sharpness is
            at most this. None at steps without ``certify``.
        batch_sharpness, update_curvature: see ``directional_curvatures``; None where not measured.
        seconds: that tracking took: in ``step`` besides loss and gradient, in ``observe`` in all; 0 after ``carry``.
        gradients: the same, in units of the last loss and gradient by the package's own sweeps; NaN at the first step,
            where these are exported. Clocks differ from run to run, so both are left out of comparisons.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    sharpness: float
    sharpness_error: float
    preconditioned_sharpness: float | None
    preconditioned_sharpness_error: float | None
    threshold: float | None
    ratio: float | None
    matvecs: int
    status: Status
    converged: bool
    eigenvalues: tuple[float, ...]
    overlaps: tuple[float, ...] | None
    upper: float | None
    batch_sharpness: float | None = None
    update_curvature: float | None = None
    seconds: float = field(default=0.0, compare=False)
    gradients: float = field(default=math.nan, compare=False)

    @property
    def measured(self) -> bool:
        """Whether the sharpness was solved for at this step."""
        return self.status == "measured"

    def row(self) -> dict[str, Any]:
        """Return a row of metrics: the fields that no clock decides, by name, and ``measured``."""
        kept = {name: value for name, value in vars(self).items() if name not in ("seconds", "gradients")}
        return {**kept, "measured": self.measured}
