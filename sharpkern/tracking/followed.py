"""One tracked operator: its solver, and what was last seen of its eigenvalues."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..eigen import EigenResult, WarmBlockLanczos, WarmLanczos
from ..eigen.common import NonFiniteProductError, gram, lengths_of
from ..eigen.state import check_state
from ..kernels.precision import tf32_products
from .popups import PopUps

_FIRST_SPEED = 0.05  # relative change of the sharpness per step, until it has been seen to change
_FORGET_SPEED = 0.7  # weight of the older looks in the running mean of the speed, per look
_TINY = torch.finfo(torch.float64).tiny
_ROUNDING_EVERY = 32  # solves
_VERSION = 2  # of a saved state: raise it when a field changes its name or its meaning
# What a later step depends on, besides the solver's own state; tf32 is the tracker's option.
_KEPT = (
    "value", "seen", "speed", "error_bound", "rounding", "solves", "shortfall", "eigenvalues", "overlaps", "vectors"
)  # fmt: skip


@dataclass
class Followed:
    """One tracked operator: its solver, and what was last seen."""

    solver: WarmLanczos | WarmBlockLanczos
    tf32: bool = False
    popups: PopUps = field(default_factory=PopUps, repr=False)
    value: float = 0.0
    seen: int = 0  # step of the value
    speed: float = _FIRST_SPEED
    error_bound: float = 0.0  # of the last solve
    rounding: float = 0.0  # of its products by TF32, relative to the value
    solves: int = 0
    shortfall: float = 0.0  # of the last solve's start, relative to the value it found
    eigenvalues: tuple[float, ...] = ()
    overlaps: tuple[float, ...] | None = None
    vectors: Tensor | None = field(default=None, repr=False)  # [k, n]

    def solve(
        self, operator: Any, step: int, extra: Tensor | None, at_most: int | None, hint: Tensor | None = None
    ) -> EigenResult:
        """Solve at a step, see ``WarmLanczos.step``, and keep what was found."""
        with tf32_products(on=self.tf32 and self.solves > 0):  # the first one asks for more than tol
            result = self.solver.step(operator, extra, at_most, hint)
        self.solves += 1
        if self.vectors is not None:
            cosines = gram(operator, result.eigenvectors, self.vectors)
            self.overlaps = tuple(torch.linalg.vector_norm(cosines, dim=1).clamp(max=1.0).tolist())
        self.eigenvalues = tuple(result.eigenvalues.tolist())
        self.vectors, self.error_bound = result.eigenvectors, float(result.error_bounds[0])
        self.shortfall = 1 - self.solver.start_value / self.eigenvalues[0] if self.eigenvalues[0] else 0.0
        self._see(self.eigenvalues[0], step)
        return result

    def measure_rounding(self, operator: Any) -> int:
        """Compare both precisions on the Ritz vector, at times; return the matvecs spent."""
        if not self.tf32 or (self.solves - 1) % _ROUNDING_EVERY:
            return 0
        assert self.vectors is not None
        exact = operator.matvec(self.vectors[0])
        with tf32_products():
            rounded = operator.matvec(self.vectors[0])
        self.rounding = float(lengths_of(operator, (rounded - exact)[None])[0]) / max(abs(self.value), _TINY)
        return 2

    def bound(self, operator: Any, step: int) -> None:
        """Take the Rayleigh quotient of the last vector; it misses what the vector has turned since.

        Raises:
            NonFiniteProductError: it is not finite.
        """
        assert self.vectors is not None
        with tf32_products(on=self.tf32):
            value = float(operator.quadratic_form(self.vectors[0]))
        if not math.isfinite(value):  # it would spoil the mean of the speed for good
            raise NonFiniteProductError(f"the quadratic form of the last vector is {value}.")
        self._see(value, step)

    def _see(self, value: float, step: int) -> None:
        if self.value:  # relative changes of a value of zero mean nothing, and there is none before the first
            speed = abs(value / self.value - 1) / max(1, step - self.seen)
            self.speed = _FORGET_SPEED * self.speed + (1 - _FORGET_SPEED) * speed
        self.value, self.seen = value, step

    def drift(self, step: int) -> float:
        """Estimate the relative change since the value was seen."""
        return self.speed * (step - self.seen)

    @property
    def turned(self) -> float:
        """The relative change of the Rayleigh quotient since the solve."""
        return abs(self.value / self.eigenvalues[0] - 1) if self.eigenvalues[0] else 0.0

    def doubt(self, step: int) -> float:
        """Return the solve's error bound, its rounding, and what may have changed since."""
        rounding = self.rounding * abs(self.value)
        return self.error_bound + rounding + abs(self.value - self.eigenvalues[0]) + self.drift(step) * abs(self.value)

    def state_dict(self) -> dict[str, Any]:
        """Return what continues identically: tensors and plain Python only."""
        kept = {name: getattr(self, name) for name in _KEPT}
        return {"version": _VERSION, **kept, "inv_sqrt": self.popups.inv_sqrt, "solver": self.solver.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict()``'s result.

        Raises:
            ValueError: a field is missing or unknown, here or in the solver's state, or a version is another one.
        """
        check_state("a tracked operator", state, (*_KEPT, "inv_sqrt", "solver"), _VERSION)
        self.popups.inv_sqrt = state["inv_sqrt"]
        self.solver.load_state_dict(state["solver"])
        for name in _KEPT:
            setattr(self, name, state[name])
