"""What the callbacks share: a step's micro-batches, a tracker beside the trainer's own steps, a file of JSON lines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..curvature.chunked import MicroBatches
from ..curvature.losses import NonFiniteLossError
from ..curvature.parameters import gradients_of
from ..rop.sandbox import RandomState, random_state
from ..tracking.record import Record
from ..tracking.tracker import SharpnessTracker
from ..train.metrics import MetricsFile

_ALIKE = 0.99  # cosine of two gradients of one loss; 16-bit autocast alone leaves more than 0.999
# Field of the record -> name under which loggers get it.
_LOGGED = {
    "sharpness": "sharpness",
    "preconditioned_sharpness": "preconditioned_sharpness",
    "ratio": "sharpness_ratio",
    "batch_sharpness": "batch_sharpness",
    "update_curvature": "update_curvature",
}


class Observer:
    """Measures chosen steps of somebody else's training loop.

    Args:
        tracker: of the loop's model, loss and optimizer.
        path: of the JSON lines; a row per observed step, with the record's fields.
        every: observe steps 1, 1 + every, ...
        done: steps that were taken before; rows of later ones are cut from the file.

    Raises:
        ValueError: every is below 1.
    """

    def __init__(self, tracker: SharpnessTracker, path: Path, *, every: int, done: int) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}.")
        self.tracker, self.every = tracker, every
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rows = MetricsFile(path, keep=done)
        self._batches: list[Any] = []
        self._weights: list[float] = []
        self._states: list[RandomState] = []
        self._compared = False

    def wants(self, step: int) -> bool:
        """Whether to observe a step; 1 is the first."""
        return (step - 1) % self.every == 0

    def add(self, batch: Any, weight: float) -> None:
        """Note a micro-batch just before the loop's forward pass on it.

        Args:
            batch: as the tracker takes it; kept until the step is observed.
            weight: what the loop multiplies its loss with.
        """
        self._batches.append(batch)
        self._weights.append(weight)
        self._states.append(random_state())  # the same dropout masks, then

    def observe(self, step: int, gradients: dict[Tensor, Tensor] | None = None) -> dict[str, float]:
        """Measure the step that the optimizer is about to take on the micro-batches noted, and forget them.

        Args:
            step: 1 for the first; written into the row.
            gradients: that the optimizer will step with; None for ``p.grad``.

        Returns:
            What to log, by name; empty if the loss is not finite, which the row says.

        Raises:
            ValueError: the loop's gradients are not those of the tracker's loss.
        """
        # Forgotten even if measuring fails, so that no later step counts them again.
        parts = MicroBatches(self._batches, self._weights, random_states=self._states)
        self.forget()
        try:
            record = self.tracker.observe(parts, gradients)
        except NonFiniteLossError:  # the trainer has its own way with these
            self._rows.write({"step": step, "loss": None, "diverged": True})
            return {}
        self._compare()
        self._rows.write({**record.row(), "step": step})
        return _logged(record)

    def forget(self) -> None:
        """Drop the micro-batches noted."""
        self._batches, self._weights, self._states = [], [], []

    def _compare(self) -> None:
        """Compare the loop's gradient with that of the tracker's loss, once: a trainer may minimise something else."""
        if self._compared:
            return
        self._compared = True
        assert self.tracker.hessian is not None
        pairs = [(g, p.grad.to(g.dtype)) for p, g in gradients_of(self.tracker.hessian).items() if p.grad is not None]
        mine, theirs = (torch.cat([pair[i].flatten().double() for pair in pairs]) for i in (0, 1))
        cosine = float(torch.nn.functional.cosine_similarity(mine, theirs, dim=0))
        # Negated, so that NaN is refused too. Gradients of zero have no direction.
        if mine.any() and theirs.any() and not cosine > _ALIKE:
            raise ValueError(
                f"the trainer's gradient is not that of the loss given (cosine {cosine:.3f}): it minimises something "
                "else, or draws other dropout masks. Pass the loss that it minimises as loss_fn=."
            )

    def close(self) -> None:
        """Close the file."""
        self._rows.close()


def _logged(record: Record) -> dict[str, float]:
    values = {name: getattr(record, field) for field, name in _LOGGED.items()}
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
