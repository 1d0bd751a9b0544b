"""When to measure, if measuring may cost no more than a fraction of training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["measured", "bounded", "carried"]
_FORGET = 0.7
_NEAR = 0.1  # of the threshold: every step matters there


@dataclass
class Budget:
    """Saves a fraction of the steps' own time, half for solves and half for quadratic forms, and spends it on need.

    Need: the sharpness has probably moved by half of ``tol`` since it was last seen, or it is within 10% of the
    threshold. Without need a purse fills up to the cost of two looks, so that the first steps of a catapult after
    a quiet time are measured; a full purse is spent on a look in any case.

    Args:
        fraction: of a step's own time, on average, not counting the first step's solve.
        tol: relative change that matters.
    """

    fraction: float
    tol: float
    solve_purse: float = 0.0  # seconds
    form_purse: float = 0.0
    solve_cost: float = 0.0
    form_cost: float = 0.0
    started: bool = False

    def choose(self, own_seconds: float, moved: float, ratio: float | None) -> Status:
        """Say what to do at a step.

        Args:
            own_seconds: what the step takes without tracking.
            moved: by how much the sharpness has probably changed since it was last seen, relative.
            ratio: last (preconditioned) sharpness over the present threshold, if there is one.
        """
        if not self.started:
            return "measured"
        saved = self.fraction * own_seconds / 2
        self.solve_purse = min(self.solve_purse + saved, 2 * self.solve_cost)
        self.form_purse = min(self.form_purse + saved, 2 * self.form_cost)
        need = moved >= self.tol / 2 or (ratio is not None and abs(ratio - 1) < _NEAR)
        if self.solve_purse >= self.solve_cost * (1 if need else 2):
            return "measured"
        return "bounded" if self.form_purse >= self.form_cost * (1 if need else 2) else "carried"

    def spent(self, status: Status, seconds: float) -> None:
        """Pay for a look, and learn what one costs."""
        if not self.started:
            self.started = True
            self.solve_cost, self.form_cost = seconds / 8, seconds / 50  # the first solve is some 30 products
        elif status == "measured":
            self.solve_purse -= seconds
            self.solve_cost += (1 - _FORGET) * (seconds - self.solve_cost)
        else:
            self.form_purse -= seconds
            self.form_cost += (1 - _FORGET) * (seconds - self.form_cost)

    def state_dict(self) -> dict[str, Any]:
        """Return plain Python values."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict()``'s result."""
        vars(self).update(state)
