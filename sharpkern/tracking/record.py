"""One training step as the tracker saw it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from .budget import Status


@dataclass(frozen=True)
class Record:
    """One training step as the tracker saw it, before the update.

    ``print`` shows the numbers to four digits and leaves out fields that are None; ``repr`` shows everything.

    Attributes:
        step: 1 for the first step.
        loss: on the step's batch, at the parameters before the update. NaN where ``observe`` computed nothing.
        lr: learning rate of the optimizer's first group, as it was when the step was tracked.
        grad_norm: Euclidean norm of the gradient; for ``observe``, of the gradients that the optimizer steps with.
        sharpness: largest algebraic eigenvalue of the loss's Hessian. For an optimizer with ``maximize=True``, that of
            minus the loss. NaN with ``products=False`` and at a failed step.
        sharpness_error: at a measured step, some eigenvalue lies within this distance of ``sharpness``: the norm of the
            residual and an allowance for rounding. Where the two largest Ritz values are closer than twice ``tol``, the
            norm of both residuals together is taken. At a carried or bounded step it is an estimate: the error of the
            last measured step, and by how much the sharpness has probably moved since.
        preconditioned_sharpness: largest eigenvalue of P^-1 H, where P is the diagonal by which an adaptive optimizer
            divides its step. Also there where parameter groups have learning rates or thresholds of their own: each
            group is then scaled so that one threshold holds for all (``optimizers.threshold.threshold_scales``).
            None for other optimizers.
        preconditioned_sharpness_error: as ``sharpness_error``, of ``preconditioned_sharpness``.
        threshold: kappa / lr. On a quadratic loss, training is stable while the sharpness, or the preconditioned
            sharpness where there is one, is below this. Infinite where lr is 0; None for an optimizer whose threshold
            is not known.
        ratio: the sharpness, or the preconditioned sharpness where there is one, divided by ``threshold``. Above 1 is
            beyond the edge of stability.
        matvecs: Hessian-vector products spent at this step.
        status: how the sharpness of this step was found.
            "measured": by a solve to ``tol``; where it ended early, ``converged`` is False.
            "bounded": as the Rayleigh quotient of the last measured vector, which is a lower bound.
            "carried": not at all; the last value is repeated.
            "untracked": not at all, because of ``products=False``.
            "failed": it could not be, for example as a product was not finite. Sharpness, its error and ratio are NaN,
            and ``matvecs`` leaves out what was spent before. The next step is measured as if nothing had been.
        converged: whether every solve of this step reached ``tol``.
        eigenvalues: the k largest at the last measured step, in descending order: of P^-1 H where there is a
            preconditioned sharpness, else of the Hessian.
        overlaps: one number for each of these eigenvalues' vectors: the length of its projection onto the span of the
            vectors of the measured step before. Close to 1 means that the direction has stayed. A small one means that
            eigenvalues have crossed, or lie so close together that their single vectors mean nothing. None at the
            first measured step.
        upper: only with ``certify``: with probability at least 0.99 over a random start, the (preconditioned) sharpness
            is at most this.
        batch_sharpness: g'Hg / g'g, the curvature of the batch's loss along the batch's own gradient g; None where it
            was not measured.
        update_curvature: u'Hu / u'Pu, the curvature along the optimizer's next update u; None where it was not
            measured.
        seconds: time that tracking took: for ``step`` besides loss and gradient, for ``observe`` in all; 0 after
            ``carry``.
        gradients: ``seconds`` divided by the time that the package's own sweeps take for loss and gradient; NaN at the
            first step, where the sweeps are made. This and ``seconds`` differ from run to run, so that comparing two
            records with ``==`` leaves both out.
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

    def __str__(self) -> str:
        fields = ((name, _rounded(value)) for name, value in vars(self).items() if value is not None)
        return f"Record({', '.join(f'{name}={value}' for name, value in fields)})"

    @property
    def measured(self) -> bool:
        """Whether the sharpness was solved for at this step."""
        return self.status == "measured"

    def row(self) -> dict[str, Any]:
        """Return a row of metrics: the fields that no clock decides, by name, and ``measured``."""
        kept = {name: value for name, value in vars(self).items() if name not in ("seconds", "gradients")}
        return {**kept, "measured": self.measured}


def _rounded(value: Any) -> str:
    """Write a field's value for a reader: numbers to four digits."""
    if isinstance(value, tuple):
        return f"[{', '.join(_rounded(v) for v in value)}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
