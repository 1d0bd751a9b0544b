"""When to measure, and for how many products, if measuring may cost no more than a fraction of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..eigen.state import check_state

Status = Literal["measured", "bounded", "carried", "untracked", "failed"]
_FORGET_COST = 0.7  # weight of the older looks in the running means of what a look costs, per look
_NEAR = 0.1  # of the threshold: every step matters there
_TURNED = 0.3  # relative change of the forms since the solve: their vector is out of date by then
_SHORT = 0.05  # a Rayleigh quotient that stayed this far below the solve after it was no estimate
_LEAST, _WHOLE = 2, 8  # matvecs: the fewest that improve a vector, and what a solve to ``tol`` may well take
_VERSION = 1  # of a saved state: raise it when a field changes its name or its meaning
# What a later step depends on; fraction and tol are the constructor's, so a resumed run may change them.
_KEPT = ("operators", "purse", "matvec_cost", "form_cost", "forms", "shortfall", "started")


@dataclass
class Budget:
    """Saves a fraction of the steps' own time, and spends it on solves and quadratic forms.

    Need: the sharpness has probably moved by half of ``tol`` since it was last seen, or it is within 10% of the
    threshold. Then a form is taken as soon as it can be paid, unless the vector is out of date: the forms since the
    last solve have moved by 30%, or have cost as much as a whole solve, or at the last solve the start's Rayleigh
    quotient lay 5% below the value found. Then all goes to a solve, as soon as two matvecs can be paid, and it gets
    as many as can be. Without need the purse fills up to two whole solves, and is spent on one in any case.

    Args:
        fraction: of a step's own time, on average, not counting the first step's solve.
        tol: relative change that matters.
        operators: how many are solved at each measured step.
    """

    fraction: float
    tol: float
    operators: int = 1
    purse: float = 0.0  # seconds
    matvec_cost: float = 0.0  # seconds, of one Hessian-vector product of every operator
    form_cost: float = 0.0
    forms: float = 0.0  # seconds since the last solve
    shortfall: float = 0.0  # of the last solve's start, relative
    started: bool = False

    def start(self, matvec_seconds: float, form_seconds: float) -> None:
        """Take the costs of a matvec and a form of every operator, timed when nothing is done for the first time."""
        self.matvec_cost, self.form_cost, self.started = matvec_seconds, form_seconds, True

    def choose(self, own_seconds: float, moved: float, turned: float, ratio: float | None) -> Status:
        """Say what to do at a step.

        Args:
            own_seconds: what the step takes without tracking.
            moved: by how much the sharpness has probably changed since it was last seen, relative.
            turned: by how much it had changed then since the last solve, relative.
            ratio: last (preconditioned) sharpness over the present threshold, if there is one.
        """
        if not self.started:
            return "measured"
        whole = _WHOLE * self.matvec_cost
        self.purse = min(self.purse + self.fraction * own_seconds, 2 * whole)
        # Half of tol, because the form or the solve that answers the need has an error of its own.
        need = moved >= self.tol / 2 or (ratio is not None and abs(ratio - 1) < _NEAR)
        if self.purse >= 2 * whole:
            return "measured"
        if not need:
            return "carried"
        if self.forms >= whole or turned > _TURNED or self.shortfall > _SHORT:
            return "measured" if self.purse >= _LEAST * self.matvec_cost else "carried"
        return "bounded" if self.purse >= self.form_cost else "carried"

    @property
    def matvecs(self) -> int:
        """How many matvecs the purse pays for, of each operator."""
        return max(_LEAST, int(self.purse / self.matvec_cost)) if self.matvec_cost else _LEAST

    def spent(self, seconds: float, matvecs: int, shortfall: float) -> None:
        """Pay for a look, and learn what one costs.

        Args:
            seconds: it took.
            matvecs: of all operators; 0 for a form.
            shortfall: of a solve: by how much its start's Rayleigh quotient lay below the value found, relative.
        """
        self.charge(seconds)
        if matvecs:
            self.forms, self.shortfall = 0.0, shortfall
            self.matvec_cost += (1 - _FORGET_COST) * (seconds * self.operators / matvecs - self.matvec_cost)
        else:
            self.forms += seconds
            self.form_cost += (1 - _FORGET_COST) * (seconds - self.form_cost)

    def charge(self, seconds: float) -> None:
        """Pay for a look that gave no value."""
        self.purse -= seconds

    def state_dict(self) -> dict[str, Any]:
        """Return plain Python values."""
        return {"version": _VERSION, **{name: getattr(self, name) for name in _KEPT}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict()``'s result.

        Raises:
            ValueError: a field is missing or unknown, or the state is of another version.
        """
        check_state("Budget", state, _KEPT, _VERSION)
        for name in _KEPT:
            setattr(self, name, state[name])
