"""When to look at a fixed probe, if looking may cost no more than a fraction of training: evenly, and on an alarm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..eigen.state import check_state
from .budget import Status

PRODUCTS = 2  # of a look
_ALARMED = 4  # likewise after a jump: the vector has turned
_MOST = 8  # products that are saved for, where ``every`` keeps looks further apart than they are paid for
_DEBT = 20  # looks that alarms may overdraw
_DOUBLES = 4.0  # looks of debt, for each of which a jump must be twice as large to be one
_REPAID = 0.5  # of the income, until a debt is paid: the other half goes on looking
_JUMP = 0.3  # of the signal's logarithm, since the last look
_UNUSUAL = 4.0  # or so many times its usual change from step to step, whichever is more
_FORGET_COST, _FORGET_CHANGE = 0.7, 0.9  # weights of the older values in running means
_FORGET_ALARM = 0.98  # likewise during an alarm: a catapult must not pass for what is usual
_VERSION = 1  # of a saved state: raise it when a field changes its name or its meaning
_KEPT = (
    "operators", "purse", "debt", "unit", "started", "signal", "seen", "usual", "rings"
)  # fmt: skip


@dataclass
class Pace:
    """Saves a fraction of the steps' own time for looks at a fixed probe, and overdraws it for alarms.

    A look is the probe's primal sweeps and two products, or as many as have been saved for. It is taken as soon as it
    is paid: evenly in time. An alarm is a jump of the signal (the norm of the step's gradient) since the last look, by
    30% or four times what it usually changes in a step, doubled for every four looks of debt. Then a look of four
    products is taken at once, on credit of at most twenty looks. Until that is paid back half of the income goes on
    paying for even ones, so that neither a second catapult nor the time after it goes unseen.

    Args:
        fraction: of a step's own time, on average, not counting the first step's solve.
        operators: how many are solved at each look.
    """

    fraction: float
    operators: int = 1
    purse: float = 0.0  # seconds
    debt: float = 0.0  # seconds, of alarms
    unit: float = 0.0  # seconds of a product of every operator, or of the primal sweeps, which cost about as much
    started: bool = False
    signal: float = math.nan  # logarithm at the last step
    seen: float = math.nan  # at the last look
    usual: float = 0.0  # size of its change in a step
    rings: bool = False

    def start(self, matvec_seconds: float, form_seconds: float) -> None:
        """Take the cost of a matvec of every operator, timed when nothing is done for the first time."""
        del form_seconds  # a form costs the same primal sweeps, and says less
        self.unit, self.started = matvec_seconds, True

    def hear(self, norm: float) -> None:
        """Take the norm of a step's gradient, before ``choose``; NaN or zero says nothing."""
        signal = math.log(norm) if 0 < norm < math.inf else math.nan
        change = abs(signal - self.signal)
        # The steps up to a catapult must not use the credit up before the fall.
        thrift = 2 ** (self.debt / (_DOUBLES * self._cost(PRODUCTS))) if self.debt else 1.0
        jump, least = abs(signal - self.seen), max(_JUMP, _UNUSUAL * self.usual)
        self.rings = jump > thrift * least
        if math.isfinite(change):
            self.usual += (1 - (_FORGET_ALARM if jump > least else _FORGET_CHANGE)) * (min(change, _JUMP) - self.usual)
        if math.isfinite(signal):
            self.signal = signal
            self.seen = signal if math.isnan(self.seen) else self.seen

    def choose(self, own_seconds: float) -> Status:
        """Say what to do at a step that takes so many seconds without tracking."""
        if not self.started:
            return "measured"
        income = self.fraction * own_seconds
        repaid = min(self.debt, _REPAID * income)
        self.debt -= repaid
        self.purse = min(self.purse + income - repaid, self._cost(_MOST))
        if self.purse >= self._cost(PRODUCTS):
            self.rings = False
            return "measured"
        if self.rings and self.debt < _DEBT * self._cost(PRODUCTS):
            return "measured"
        self.rings = False
        return "carried"

    def _cost(self, products: int) -> float:
        return self.unit * (products + 1)

    @property
    def matvecs(self) -> int:
        """How many matvecs a look may have, of each operator."""
        if self.rings or not self.unit:
            return _ALARMED
        return max(PRODUCTS, int(self.purse / self.unit) - 1)

    def spent(self, seconds: float, matvecs: int) -> None:
        """Pay for a look of so many matvecs of all operators, and learn what one costs."""
        self.charge(seconds)
        self.seen = self.signal
        self.unit += (1 - _FORGET_COST) * (seconds / (matvecs / self.operators + 1) - self.unit)

    def charge(self, seconds: float) -> None:
        """Pay for what gave no value."""
        if self.rings:
            self.debt += seconds
        else:
            self.purse -= seconds
        self.rings = False

    def state_dict(self) -> dict[str, Any]:
        """Return plain Python values."""
        return {"version": _VERSION, **{name: getattr(self, name) for name in _KEPT}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict()``'s result.

        Raises:
            ValueError: a field is missing or unknown, or the state is of another version.
        """
        check_state("Pace", state, _KEPT, _VERSION)
        for name in _KEPT:
            setattr(self, name, state[name])
