"""The operators' solvers over a run: when they are used, and for how many products."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ..curvature.negative import NegativeOperator
from ..curvature.preconditioned import PreconditionedOperator
from ..eigen import ShortLanczos, WarmBlockLanczos, WarmLanczos
from ..eigen import certify as certificate_of
from ..eigen.common import NonFiniteProductError
from ..kernels.precision import tf32_products
from .block_width import width_that_pays
from .budget import Budget, Status
from .followed import Followed
from .pace import PRODUCTS, Pace
from .target import Tracked

_CERTIFY_FAILURE = 0.01

Operator = Tracked | NegativeOperator | PreconditionedOperator


@dataclass(frozen=True)
class Look:
    """What was spent at a step, and what is certain of it.

    Attributes:
        matvecs: Hessian-vector products.
        converged: every solve reached its tolerance.
        upper: certified upper bound of the last operator's largest eigenvalue, if one was asked for.
    """

    matvecs: int = 0
    converged: bool = True
    upper: float | None = None


class Following:
    """Follows the largest eigenvalues of one or two operators through a run.

    Args:
        k: eigenvalues of each.
        tol: relative residual at which a solve stops.
        every: look at steps 1, 1 + every, ... only.
        max_matvecs: the most products of a solve.
        budget: the fraction of the steps' own time that may be spent; None for no limit.
        probe: the operator is a fixed probe's, so that a budget is spent evenly and on alarms, see ``Pace``.
        tf32: let all solves but the first round factors to TF32.
        width: vectors in a product of each solve, 1 for one after the other; None to measure at the first look whether
            blocks pay.

    Attributes:
        followed: name -> what is known of the operator; empty before the first look.
    """

    def __init__(
        self,
        *,
        k: int,
        tol: float,
        every: int,
        max_matvecs: int,
        budget: float | None,
        probe: bool,
        tf32: bool,
        width: int | None,
    ) -> None:
        self.k, self.tol, self.every, self.max_matvecs, self.tf32 = k, tol, every, max_matvecs, tf32
        self.width = width
        self.budget: Budget | Pace | None = None
        if budget is not None:
            self.budget = Pace(budget) if probe else Budget(budget, tol)
        self.followed: dict[str, Followed] = {}

    def choose(self, step: int, deciding: str, own_seconds: float, ratio: float | None, *, certify: bool) -> Status:
        """Say what to do at a step.

        Args:
            step: 1 for the first.
            deciding: name of the operator that the threshold is about.
            own_seconds: what the step takes without tracking.
            ratio: last value over the present threshold, if there is one.
            certify: a certificate is wanted, which is for a measured value.
        """
        # Before ``every``: a certificate bounds a value of this step, and a first value there must be.
        if certify or deciding not in self.followed:
            return "measured"
        if (step - 1) % self.every:
            return "carried"
        if self.budget is None:
            return "measured"
        # Times ``every``, because the steps between saved for this one too.
        if isinstance(self.budget, Pace):
            return self.budget.choose(own_seconds * self.every)
        last = self.followed[deciding]
        return self.budget.choose(own_seconds * self.every, last.drift(step), last.turned, ratio)

    def hear(self, gradients: Mapping[Tensor, Tensor | None]) -> None:
        """Let a budget that listens for alarms have the step's gradients; those that are missing say nothing."""
        if isinstance(self.budget, Pace):
            known = [g for g in gradients.values() if g is not None]
            self.budget.hear(float(torch.nn.utils.get_total_norm(known)) if known else math.nan)

    def look(
        self,
        status: Status,
        operators: Mapping[str, Operator],
        deciding: str,
        step: int,
        paid_from: float,
        *,
        gradient: Tensor,
        certify: bool,
    ) -> Look:
        """Solve for the eigenvalues, or take forms of the last vectors.

        Args:
            status: "measured" or "bounded".
            operators: name -> operator at the present parameters.
            deciding: name of the one that the threshold is about.
            step: 1 for the first.
            paid_from: clock, from which on the time is charged to the budget.
            gradient: ``[n]`` of the step's loss.
            certify: bound each largest eigenvalue from above by a solve from a random start.

        Raises:
            NonFiniteProductError, LinAlgError: nothing can be said of this step. What was followed before
                is as it was, and the next look may go on.
        """
        try:
            return self._look(status, operators, deciding, step, paid_from, gradient, certify=certify)
        except (NonFiniteProductError, LinAlgError):
            # What never was solved has nothing to carry: the next step must measure.
            self.followed = {name: followed for name, followed in self.followed.items() if followed.solves}
            if self.budget is not None and self.budget.started:
                self.budget.charge(time.perf_counter() - paid_from)
            raise

    def _look(
        self,
        status: Status,
        operators: Mapping[str, Operator],
        deciding: str,
        step: int,
        paid_from: float,
        gradient: Tensor,
        *,
        certify: bool,
    ) -> Look:
        matvecs, converged, upper = 0, True, None
        if self.width is None:
            with tf32_products(on=self.tf32):
                self.width, matvecs = width_that_pays(next(iter(operators.values())))
        at_most = None
        if self.budget is not None and self.budget.started and not certify:
            at_most = min(self.max_matvecs, max(self.k, self.budget.matvecs))
        for name, operator in operators.items():
            if name not in self.followed:
                self.followed[name] = self._new()
            followed = self.followed[name]
            if status == "bounded":
                followed.bound(operator, step)
                continue
            extras: list[Tensor] = []
            # Not where the budget pays too little: the start alone is what improves the vector.
            if isinstance(operator, PreconditionedOperator) and (at_most is None or at_most > self.k + 1):
                direction = followed.popups.look(operator, gradient)
                extras += [] if direction is None else [direction]
            if certify:
                # A fresh seed: the promise holds for a start that has had no part in the run.
                certificate = certificate_of(operator, failure=_CERTIFY_FAILURE)
                matvecs += certificate.matvecs
                upper = certificate.upper
                extras.append(certificate.vector[None])
            hint = None if followed.solves else _whitened(operator, gradient)
            result = followed.solve(operator, step, torch.cat(extras) if extras else None, at_most, hint)
            matvecs += result.matvecs + followed.measure_rounding(operator)
            converged = converged and result.converged
        # The first step is not paid for: its solve is long, and the sweeps are recorded during it.
        if self.budget is not None and not self.budget.started:
            matvecs += self._start_budget(self.budget, operators, step)
        elif isinstance(self.budget, Pace):
            self.budget.spent(time.perf_counter() - paid_from, matvecs)
        elif self.budget is not None:
            self.budget.spent(time.perf_counter() - paid_from, matvecs, self.followed[deciding].shortfall)
        return Look(matvecs, converged, upper)

    def _start_budget(self, budget: Budget | Pace, operators: Mapping[str, Operator], step: int) -> int:
        """Time a matvec and a form, now that their sweeps are recorded; return the matvecs spent on it."""
        matvecs, matvec_seconds, form_seconds = 0, 0.0, 0.0
        for name, operator in operators.items():
            followed = self.followed[name]
            followed.bound(operator, step)  # records its sweep, which the second one only replays
            times = [time.perf_counter()]
            followed.bound(operator, step)
            times.append(time.perf_counter())
            at_most = PRODUCTS if isinstance(budget, Pace) else None
            matvecs += (spent := followed.solve(operator, step, None, at_most).matvecs)
            times.append(time.perf_counter())
            form_seconds += times[1] - times[0]
            matvec_seconds += (times[2] - times[1]) / spent
        budget.operators = len(operators)
        budget.start(matvec_seconds, form_seconds)
        return matvecs

    def _new(self) -> Followed:
        """Start to follow an operator. Its random numbers are its own: no other operator changes what is found."""
        generator = torch.Generator().manual_seed(0)
        options = self.k, self.tol, self.max_matvecs, generator
        assert self.width is not None
        if self.width > 1:
            return Followed(WarmBlockLanczos(*options, width=self.width), self.tf32)
        return Followed((ShortLanczos if isinstance(self.budget, Pace) else WarmLanczos)(*options), self.tf32)

    def seen(self, step: int, *, failed: bool, adaptive: bool) -> dict[str, Any]:
        """Return the fields of a step's record that say what was found.

        Args:
            step: 1 for the first.
            failed: nothing was, at this step: NaN where other steps have a number, None where they have None.
            adaptive: there is a preconditioned sharpness.
        """
        followed = {} if failed else self.followed
        plain = followed.get("sharpness")  # there is none where no products are made
        scaled = followed.get("preconditioned_sharpness") if adaptive else None
        none, deciding = math.nan if failed and adaptive else None, scaled or plain
        return {
            "sharpness": math.nan if plain is None else plain.value,
            "sharpness_error": math.nan if plain is None else plain.doubt(step),
            "preconditioned_sharpness": none if scaled is None else scaled.value,
            "preconditioned_sharpness_error": none if scaled is None else scaled.doubt(step),
            "eigenvalues": () if deciding is None else deciding.eigenvalues,
            "overlaps": None if deciding is None else deciding.overlaps,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what continues identically: tensors and plain Python only."""
        return {
            "followed": {name: f.state_dict() for name, f in self.followed.items()},
            "budget": None if self.budget is None else self.budget.state_dict(),
            "width": self.width,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict()``'s result.

        Raises:
            ValueError: a field of a part's state is missing or unknown, or its version is another one; or the state is
                of another ``width``.
        """
        if None not in (self.width, state["width"]) and self.width != state["width"]:
            raise ValueError(
                f"the state is of solves by blocks of {state['width']}, and this tracker's are of {self.width}: "
                "make it with the same block=."
            )
        # What was measured once holds for the whole run, so that a resumed one makes the same products.
        self.width = self.width if state["width"] is None else state["width"]
        self.followed = {name: self._new() for name in state["followed"]}
        for name, followed in self.followed.items():
            followed.load_state_dict(state["followed"][name])
        if self.budget is not None and state["budget"] is not None:
            self.budget.load_state_dict(state["budget"])


def _whitened(operator: Operator, gradient: Tensor) -> Tensor:
    """Return the gradient in the operator's coordinates, ``[1, n]``."""
    scale = operator.inv_sqrt if isinstance(operator, PreconditionedOperator) else 1.0
    return (gradient.to(operator.dtype) * scale)[None]
