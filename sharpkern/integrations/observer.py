"""What the callbacks share: a step's micro-batches, a tracker beside the trainer's own steps, a file of JSON lines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature.chunked import MicroBatches
from ..curvature.losses import NonFiniteLossError
from ..curvature.parameters import gradients_of
from ..curvature.wrappers import kind_of
from ..rop.sandbox import RandomState, random_state
from ..tracking.record import Record
from ..tracking.tracker import SharpnessTracker
from ..train.metrics import MetricsFile, Row

_ALIKE = 0.99  # cosine of two gradients of one loss; 16-bit autocast alone leaves more than 0.999
_AS_LONG = 0.1  # by how much their lengths may differ; what a forgotten factor makes is mostly 2 or more
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
        path: of the JSON lines; a row per observed step, with the record's fields. None writes none: of several
            processes, all of which measure, the first one writes.
        every: observe steps 1, 1 + every, ...
        done: steps that were taken before; rows of later ones are cut from the file.

    Raises:
        ValueError: every is below 1.
    """

    def __init__(self, tracker: SharpnessTracker, path: Path | None, *, every: int, done: int) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}.")
        self.tracker, self.every = tracker, every
        self._rows: MetricsFile | None = None
        if path is not None:
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

    def observe(
        self, step: int, gradients: dict[Tensor, Tensor] | None = None, *, clipped_to: float = math.inf
    ) -> dict[str, float]:
        """Measure the step that the optimizer is about to take on the micro-batches noted, and forget them.

        Of several processes every one must call it at the same step; each gets the same values.

        Args:
            step: 1 for the first; written into the row.
            gradients: that the optimizer will step with; None for ``p.grad``.
            clipped_to: the length to which the gradients ``p.grad`` have been cut together if they were longer.

        Returns:
            What to log, by name; empty if the loss is not finite, which the row says.

        Raises:
            ValueError: the loop's gradients are not those of the tracker's loss, or a multiple of them.
            DistributedError: a process failed, is missing, or does something else than the others.
        """
        # Forgotten even if measuring fails, so that no later step counts them again.
        parts = MicroBatches(self._batches, self._weights, random_states=self._states)
        self.forget()
        try:
            record = self.tracker.observe(parts, gradients)
        except NonFiniteLossError:  # the trainer has its own way with these
            self._write({"step": step, "loss": None, "diverged": True})
            return {}
        self._compare(clipped_to)
        self._write({**record.row(), "step": step})
        return _logged(record)

    def _write(self, row: Row) -> None:
        if self._rows is not None:
            self._rows.write(row)

    def forget(self) -> None:
        """Drop the micro-batches noted."""
        self._batches, self._weights, self._states = [], [], []

    def _compare(self, clipped_to: float) -> None:
        """Compare the loop's gradient with that of the tracker's loss, once: a trainer may minimise something else.

        Both are the same on every process, so that all raise or none.
        """
        if self._compared:
            return
        self._compared = True
        assert self.tracker.hessian is not None
        pairs = [(g, p.grad.to(g.dtype)) for p, g in gradients_of(self.tracker.hessian).items() if p.grad is not None]
        mine, theirs = (torch.cat([pair[i].flatten().double() for pair in pairs]) for i in (0, 1))
        if not mine.any() or not theirs.any():  # gradients of zero have no direction
            return
        cosine = float(torch.nn.functional.cosine_similarity(mine, theirs, dim=0))
        # Negated, so that NaN is refused too.
        if not cosine > _ALIKE:
            raise ValueError(
                f"the trainer's gradient is not that of the loss given (cosine {cosine:.3f}): it minimises something "
                "else, or draws other dropout masks. Pass the loss that it minimises as loss_fn=."
            )
        # A multiple of the loss has the same direction, and a multiple of the sharpness.
        ratio = float(theirs.norm() / mine.norm())
        whole = [p.grad for p in self.tracker.model.parameters() if p.grad is not None]
        cut = float(torch.nn.utils.get_total_norm(whole)) > 0.99 * clipped_to  # then it may have been of any length
        if ratio > 1 + _AS_LONG or (ratio < 1 - _AS_LONG and not cut):
            raise ValueError(
                f"the trainer's gradient is {ratio:.4g} times that of the loss given: it minimises a multiple of it. "
                "Pass the loss that it minimises as loss_fn=, scaled as the trainer scales it."
            )

    def close(self) -> None:
        """Close the file."""
        if self._rows is not None:
            self._rows.close()


def data_parallel(model: Any) -> nn.Module:
    """Check that a trainer of several processes has wrapped its model in ``DistributedDataParallel``, and return it.

    Raises:
        ValueError: it is spread in another way, or not at all; every process sees this by itself, so all raise.
    """
    try:
        kind: str = kind_of(model)
    except ValueError as error:  # what that suggests instead is for operators
        kind = str(error)
    if kind != "ddp":
        raise ValueError(
            "with several processes SharpnessCallback needs a model in DistributedDataParallel, got "
            f"{type(model).__name__} ({kind}): train without FSDP, DeepSpeed and tensor parallelism, or measure saved "
            "weights on one process."
        )
    wrapped: nn.Module = model
    return wrapped


def _logged(record: Record) -> dict[str, float]:
    values = {name: getattr(record, field) for field, name in _LOGGED.items()}
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
