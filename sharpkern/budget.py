"""When to measure, if measuring may cost no more than a fraction of training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["measured", "bounded", "carried"]
_FORGET = 0.7
_NEAR = 0.1  # of the threshold: every step matters there
_TURNED = 0.3


@dataclass
class Budget:
    """Saves a fraction of the steps' own time, and spends it on solves and quadratic forms, about half on each.

    Need: the sharpness has probably moved by half of ``tol`` since it was last seen, or it is within 10% of the
    threshold. Then a form is taken as soon as it can be paid; once the forms since the last solve have cost as much
    as a solve, or have moved by 30%, so that the vector is out of date, all goes to the next solve. Without need the
    purse fills up to the cost of two solves, and is spent on one in any case.

    Args:
        fraction: of a step's own time, on average, not counting the first step's solve.
        tol: relative change that matters.
    """

    fraction: float
    tol: float
    purse: float = 0.0  # seconds
    solve_cost: float = 0.0
    form_cost: float = 0.0
    forms: float = 0.0  # seconds since the last solve
    started: bool = False

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
        self.purse = min(self.purse + self.fraction * own_seconds, 2 * self.solve_cost)
        need = moved >= self.tol / 2 or (ratio is not None and abs(ratio - 1) < _NEAR)
        if self.purse >= 2 * self.solve_cost:
            return "measured"
        if not need:
            return "carried"
        if self.forms >= self.solve_cost or turned > _TURNED:
            return "measured" if self.purse >= self.solve_cost else "carried"
        return "bounded" if self.purse >= self.form_cost else "carried"

    def spent(self, status: Status, seconds: float) -> None:
        """Pay for a look, and learn what one costs."""
        if not self.started:
            self.started = True
            self.solve_cost, self.form_cost = seconds / 8, seconds / 50  # the first solve is some 30 products
            return
        self.purse -= seconds
        if status == "measured":
            self.forms = 0.0
            self.solve_cost += (1 - _FORGET) * (seconds - self.solve_cost)
        else:
            self.forms += seconds
            self.form_cost += (1 - _FORGET) * (seconds - self.form_cost)

    def state_dict(self) -> dict[str, Any]:
        """Return plain Python values."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict()``'s result."""
        vars(self).update(state)
