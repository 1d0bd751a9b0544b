"""The training loop: a tracked step, an update, a row of metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator

from torch import nn

from ..curvature.losses import NonFiniteLossError
from ..optimizers.norms import dead_units, optimizer_norms
from ..tracking.record import Record
from ..tracking.tracker import SharpnessTracker
from . import checkpoint
from .build import (
    Task,
    build_optimizer,
    build_schedule,
    build_task,
    build_tracker,
    evaluated_at,
)
from .config import TrainConfig, to_toml
from .lock import FolderLock
from .metrics import MetricsFile, Row, replace_file
from .moments import draw_second_moment, initial_preconditioned_sharpness


class Run:
    """A run in its folder: config.toml, metrics.jsonl, checkpoint.pt; and ``run.lock``, for one process at a time.

    A row of metrics.jsonl holds the fields of the step's ``Record``; what tells a failing Adam, ``m_norm``, ``v_norm``
    and ``theta_norm`` after the update and the share of ``dead_units`` (see ``optimizer_norms``, ``dead_units``); at
    step 1 of an adaptive optimizer ``initial_adam`` and ``initial_gi_adam`` (see ``initial_preconditioned_sharpness``);
    where it was evaluated accuracies and test loss; and ``seconds``.

    Args:
        config: what to train.
        resume: continue from the folder's checkpoint.
        like: a run that takes no more steps, of the same model, data, loss and batch size, whatever its seed. Its data,
            model and exported program are used again, which saves most of a short run's start; this run is the same
            with it and without.

    Raises:
        ValueError: the folder holds another run already, or is in use by another process; the configuration or its task
            is invalid, ``like`` differs, or the folder's files are damaged.
        FileNotFoundError: nothing to resume, or missing data.
        OSError: the folder cannot be written.
    """

    def __init__(self, config: TrainConfig, *, resume: bool = False, like: Run | None = None) -> None:
        config.validate()
        self.config: TrainConfig = config
        self.folder = config.out
        if not resume:
            self._check_new()
        self.task: Task = build_task(config, like=None if like is None else like.task)
        self.model: nn.Module = self.task.model
        self.optimizer = build_optimizer(config, self.model)
        # Before the schedule: a critical start is measured along the first update, of which v_0 is a part. Where the
        # run is resumed, ``_load`` replaces what was drawn, and the random state.
        draw_second_moment(self.model, self.task.loss_fn, self.task.batch(1), self.optimizer)
        self.schedule = build_schedule(config, self.task, self.optimizer)
        self.tracker: SharpnessTracker = build_tracker(config, self.task, self.optimizer)
        if like is not None and like.tracker.hessian is not None:
            # Its program reads this run's parameters, as both runs have one model; the first step refreshes it.
            self.tracker.hessian = like.tracker.hessian
        self.done = 0
        # Only now: a configuration whose task cannot be built leaves no folder behind.
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.folder)
        try:
            if resume:
                self._load()
            else:
                self._check_new()  # again: another process may have begun meanwhile, and even have ended
                self._save_config()
                self._save()
            self.metrics = MetricsFile(self.folder / "metrics.jsonl", keep=self.done)
        except BaseException:
            self._lock.release()
            raise

    def steps(self) -> Iterator[Row]:
        """Train to the end; yield each step's row after it is written.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite; the last row says so.
            OSError: as ``update``.
        """
        try:
            while self.done < self.config.steps:
                yield self.step()
        finally:
            self.close()

    def close(self) -> None:
        """Close the run's files, and let other processes use its folder."""
        self.metrics.close()
        self._lock.release()

    def step(self) -> Row:
        """Take the next step, write its row, and return it.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite; the row says so.
        """
        start = time.perf_counter()
        return self.update(*self.measure(), start)

    def measure(self) -> tuple[Record, Row]:
        """Compute the next step's gradients, and what its row holds of the parameters before the update.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite; a row says so.
        """
        step = self.done + 1
        batch, loss_fn, starts = self.task.batch(step), self.task.loss_fn, Row()
        try:
            if step == 1:
                # Before the tracker's step, which changes batch-norm statistics.
                starts = initial_preconditioned_sharpness(self.model, loss_fn, batch, self.optimizer)
            record = self.tracker.step(batch)
        except NonFiniteLossError:
            self.diverge()
            raise
        figures = _dead_units(self.model) | starts
        if evaluated_at(step, self.config):
            figures |= self.task.evaluate()
        return record, figures

    def update(self, record: Record, figures: Row, start: float) -> Row:
        """Update the parameters with the gradients in ``p.grad``, write the step's row, and return it.

        Args:
            record, figures: of ``measure``.
            start: of the step, by ``time.perf_counter``.

        Raises:
            OSError: the disk is full: rows and checkpoint are those of earlier steps, whole. Or the folder was removed:
                it has been written again, with everything up to this step.
        """
        self.optimizer.step()
        norms = optimizer_norms(self.optimizer)  # moments with this step's gradient in them; its norm is in the record
        figures = figures | {f"{name}_norm": value for name, value in norms.items() if name != "g"}
        # Row before checkpoint. A resumed run can cut rows that its checkpoint does not know, and cannot make up
        # missing ones.
        try:
            row = self.count(record, figures, time.perf_counter() - start)
            if self.metrics.removed:
                self._save_config()
                self._save()
                raise OSError(
                    f"{self.folder} was removed during the run: it is there again, with the {self.done} steps that "
                    f"were done; --resume {self.folder} continues."
                )
            if self.done % self.config.checkpoint_every == 0 or self.done == self.config.steps:
                self._save()
        except OSError as error:
            if error.errno is None:
                raise
            raise OSError(
                f"{self.folder}: {error.strerror} at step {record.step}; earlier rows and the last checkpoint are "
                f"whole: --resume {self.folder} continues from there."
            ) from error
        return row

    def count(self, record: Record, figures: Row, seconds: float) -> Row:
        """Write the row of a step that was taken, here or in a stack, and advance the schedule.

        Args:
            record: of the step.
            figures: what the row holds besides.
            seconds: that the step took.
        """
        self.schedule.step()
        self.done = record.step
        row = record.row() | figures | {"seconds": seconds}
        self.metrics.write(row)
        return row

    def diverge(self) -> None:
        """Write the row of a step whose loss is not finite."""
        self.metrics.write({"step": self.done + 1, "loss": None, "diverged": True})

    def _check_new(self) -> None:
        if (self.folder / "metrics.jsonl").exists():
            raise ValueError(
                f"{self.folder} holds a run already: choose another --out, or continue with --resume {self.folder}."
            )

    def _save_config(self) -> None:
        # First of a folder's files: one that has it is a run that can be resumed, if only from its start.
        replace_file(self.folder / "config.toml", to_toml(self.config).encode())

    def _save(self) -> None:
        checkpoint.save(
            self.folder / "checkpoint.pt",
            {
                "step": self.done,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "tracker": self.tracker.state_dict(),
            },
        )

    def _load(self) -> None:
        rows = self.folder / "metrics.jsonl"
        if not (self.folder / "checkpoint.pt").exists() and not (rows.exists() and rows.stat().st_size):
            self._save()  # killed before the first checkpoint: nothing is done yet
            return
        path = self.folder / "checkpoint.pt"
        state = checkpoint.load(path)
        try:
            self.done = state["step"]
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.tracker.load_state_dict(state["tracker"])
        # A whole file, but of another model, or of none: each part has its own errors.
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(":.")
            raise ValueError(f"{path}: not a checkpoint of this run ({reason}).") from error


def _dead_units(model: nn.Module) -> Row:
    try:
        return {"dead_units": dead_units(model)}
    except RuntimeError:  # a user's own model may have no unit with a weight
        return {}
