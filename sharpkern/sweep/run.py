"""One cell of a sweep: a run in its own folder, whose last file is ``result.json``."""

from __future__ import annotations

import fcntl
import json
import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from ..train.config import TrainConfig, from_toml, read_toml
from ..train.metrics import read, replace_file
from .collect import DECLARED, RESULT, result_of, result_row
from .grid import Cell

# Whatever imports torch is imported inside functions: a spawned process imports this module before ``_prepare`` has
# limited its threads.
if TYPE_CHECKING:
    from ..train.build import ReferenceTask
    from ..train.data import Dataset
    from ..train.loop import Run

ERROR = "error.txt"
_LAST: dict[tuple[Any, ...], Run] = {}  # this process's last run, for the next cell that can use its program
_BATCHES = 10  # the initial sharpness of a mini-batch run is the mean over so many batches


@dataclass(frozen=True)
class CellEnd:
    """How a cell ended.

    Attributes:
        name: of the cell.
        status: "trained", "failed" and "diverged" are results; "error" is a cell without one.
        message: one line for an error.
    """

    name: str
    status: str
    message: str = ""


def run_cell(cell: Cell) -> CellEnd:
    """Train a cell to its end, or go on where it was interrupted; a finished cell is left as it is."""
    with locked(cell):
        try:
            result = result_of(cell) or train(cell, begin(cell))
        except Exception as error:  # a result or an error of this one cell, whatever it is: the others go on
            return report_error(cell, error)
    return CellEnd(cell.name, result["status"])


@contextmanager
def locked(cell: Cell) -> Iterator[None]:
    """Make the cell's folder, and lock it: a second caller waits for the first, or until the first's process dies."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    with (cell.folder / "lock").open("w") as lock:
        # The kernel's own lock: it ends with its process, however that dies, where a file of the same purpose would
        # stay.
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def report_error(cell: Cell, error: Exception) -> CellEnd:
    """Leave an error's traceback in the cell's folder as ``error.txt``, and return an end of status "error"."""
    # The error may be that the folder is gone, or the disk full.
    with suppress(OSError):
        (cell.folder / ERROR).write_text("".join(traceback.format_exception(error)))
    return CellEnd(cell.name, "error", (str(error) or type(error).__name__).splitlines()[0])


def begin(cell: Cell) -> Run:
    """Make a cell's run, or load where it was interrupted."""
    from ..train.build import what_is_exported
    from ..train.loop import Run

    folder = cell.folder
    # That of an earlier attempt.
    (folder / ERROR).unlink(missing_ok=True)
    replace_file(folder / DECLARED, cell.declared().encode())
    started = folder / "config.toml"
    if started.is_file():
        # Its learning rates are absolute already; the folder may have been moved since.
        text = read_toml(started)
        config = replace(from_toml(text, str(started)), out=folder)
    else:
        config = _in_units(cell)
    shared = what_is_exported(config)
    run = Run(config, resume=started.is_file(), like=_LAST.get(shared))
    # One run at most, for each holds a model, its data and its recordings.
    _LAST.clear()
    _LAST[shared] = run
    return run


def reference_task(run: Run) -> ReferenceTask:
    """Return a cell's task, which is never a user's own: ``read_sweep`` refuses those."""
    from ..train.build import ReferenceTask

    assert isinstance(run.task, ReferenceTask)
    return run.task


def train(cell: Cell, run: Run) -> dict[str, Any]:
    """Train a run to its end, and return the cell's result, which is written too.

    Args:
        cell: whose folder the run is in.
        run: of ``begin``. A loss that is not finite ends it, and is a result.
    """
    from ..curvature.losses import NonFiniteLossError

    try:
        for _ in run.steps():
            pass
    except NonFiniteLossError:  # the last row says so
        pass
    return finish(cell, run)


def finish(cell: Cell, run: Run) -> dict[str, Any]:
    """Write the result of a run that has all its rows, and return it.

    Args:
        cell: whose folder the run is in.
        run: only its configuration and data are used: the figures come from metrics.jsonl.

    Returns:
        See ``collect.result_row``, and ``critical_lr``, ``forward_passes``, ``T_reach``, ``T_save``.

    Cost: a search for the critical learning rate: one gradient and some forward passes.
    """
    rows, data = read(cell.folder / "metrics.jsonl"), reference_task(run).data
    result = result_row(rows, run.config, data.classes) | _critical(run.config, data)
    # The result before the checkpoint goes: a kill between the two leaves a file too many, not a run to be repeated.
    replace_file(cell.folder / RESULT, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    if not cell.keep_checkpoint:
        (cell.folder / "checkpoint.pt").unlink(missing_ok=True)
    return result


def _in_units(cell: Cell) -> TrainConfig:
    """Turn learning rates in units of 1 / initial sharpness into learning rates."""
    c = cell.config
    if cell.lr_unit == "1":
        return c
    # Only what the initial sharpness depends on, so that all optimizers and schedules of a network share one solve.
    start = TrainConfig(c.model, c.data, loss=c.loss, batch_size=c.batch_size, seed=c.seed, threads=c.threads)
    mean = _initial_sharpness(start)
    if mean <= 0:
        raise ValueError(f"the initial sharpness is {mean:.4g}: learning rates cannot be in units of its inverse.")
    o = c.optimizer
    return replace(c, optimizer=replace(o, lr=o.lr / mean, lr_init=o.lr_init / mean))


@cache
def _initial_sharpness(config: TrainConfig) -> float:
    """Return a network's mean sharpness over its first batches: found once a process, for all cells that share it."""
    from torch import Generator

    from ..curvature.operators import HessianOperator
    from ..eigen import lanczos
    from ..train.data import load

    model, loss_fn, batches = _start(config, load(config.data), 1 if config.batch_size is None else _BATCHES)
    hessian = HessianOperator(model, loss_fn, batches[0])  # one export for all batches
    values = []
    for batch in batches:
        hessian.refresh(batch)
        # A unit of learning rates must not hang on chance: a fixed start, and a tolerance far below the steps of a
        # grid.
        found = lanczos(hessian, tol=1e-3, max_matvecs=200, generator=Generator().manual_seed(0))
        values.append(float(found.eigenvalues[0]))
    return sum(values) / len(values)


def _critical(config: TrainConfig, data: Dataset) -> dict[str, Any]:
    """Find the critical learning rate at initialisation, and what warmup would gain by starting there."""
    from ..optimizers.rules import rule_of
    from ..train.build import build_optimizer
    from ..warmup.critical import critical_learning_rate
    from ..warmup.formulas import steps_saved, steps_to_target

    # Built anew: the run's own model is trained by now.
    model, loss_fn, (batch,) = _start(config, data, 1)
    o = config.optimizer
    optimizer = build_optimizer(config, model)
    # Where the search starts only changes how often it doubles or halves: the first rate of a warmup from zero will do.
    found = critical_learning_rate(
        model, loss_fn, batch, optimizer, start=o.lr / o.warmup_steps, rise=rule_of(optimizer).rise
    )
    if not 0 < found.lower <= found.value < math.inf:  # no bracket was found
        return dict.fromkeys(("critical_lr", "forward_passes", "T_reach", "T_save"))
    return {
        "critical_lr": found.value,
        "forward_passes": found.forward_passes,
        "T_reach": steps_to_target(o.warmup_steps, found.value, o.lr, power=o.power),
        "T_save": steps_saved(o.warmup_steps, found.value, o.lr, forward_passes=found.forward_passes),
    }


def _start(config: TrainConfig, data: Dataset, count: int) -> tuple[Any, Any, list[Any]]:
    """Return the run's model as it starts, its loss function, and its first batches."""
    import torch

    from ..train.build import batch_at, build_model
    from ..train.losses import build_loss, loss_targets

    torch.set_num_threads(config.threads or 1)
    targets = loss_targets(config, data.train_targets, data)
    batches = [batch_at(step, config, data.train_inputs, targets) for step in range(1, count + 1)]
    return build_model(config, data), build_loss(config), batches
