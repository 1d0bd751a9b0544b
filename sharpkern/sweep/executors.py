"""Where cells run. An executor is a function: it gets a function and cells, and yields outcomes as they come."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from ..train.metrics import replace_file
from .collect import result_of, table, write_table
from .grid import Cell, Sweep
from .run import Outcome, run_cell

Executor = Callable[[Callable[[Cell], Outcome], Sequence[Cell]], Iterator[Outcome]]


def local(processes: int | None = None) -> Executor:
    """Return an executor for this machine.

    Args:
        processes: at most so many at once; by default as many as there are cores for their torch threads.
    """

    def run(function: Callable[[Cell], Outcome], cells: Sequence[Cell]) -> Iterator[Outcome]:
        threads = max(cell.config.threads or 1 for cell in cells)
        workers = processes or max(1, len(os.sched_getaffinity(0)) // threads)
        with ProcessPoolExecutor(
            min(workers, len(cells)), multiprocessing.get_context("spawn"), _prepare, (threads,)
        ) as pool:
            try:
                futures = {pool.submit(function, cell): cell for cell in cells}
                for future in as_completed(futures):
                    yield future.result()
            except BrokenProcessPool:
                raise RuntimeError(
                    "a process died, perhaps for want of memory: try fewer --processes; what is done is kept."
                ) from None
            except BaseException:  # Ctrl-C: the cells' folders keep what is done
                pool.shutdown(wait=False, cancel_futures=True)
                for child in multiprocessing.active_children():
                    child.terminate()
                raise

    return run


def _prepare(threads: int) -> None:
    """Set up a process before it imports torch: few threads, no Ctrl-C of its own, no life after its parent's."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(ImportError):  # torch imports tqdm, whose own lock outlives a process that is terminated
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def submitit(logs: Path, **parameters: Any) -> Executor:
    """Return an executor for a Slurm cluster, one job a cell, by way of submitit.

    Args:
        logs: folder for submitit's files; every machine must see it and the sweep's folder.
        parameters: of ``submitit.AutoExecutor.update_parameters``, as in ``slurm_partition="cpu"``, ``timeout_min=60``;
            ``cluster`` is "slurm", "local" (all cells at once, on this machine) or "debug" (one after the other, in
            this process).

    Raises:
        ValueError: submitit is not installed, or does not know a parameter.
    """
    try:
        import submitit as engine
    except ImportError as error:
        raise ValueError("the submitit executor needs its extra: pip install 'sharpkern[sweep]'.") from error
    executor = engine.AutoExecutor(folder=logs, cluster=parameters.pop("cluster", None))
    try:
        executor.update_parameters(**parameters)
    except (NameError, TypeError) as error:
        raise ValueError(f"submitit: {error}") from error

    def run(function: Callable[[Cell], Outcome], cells: Sequence[Cell]) -> Iterator[Outcome]:
        jobs = dict(zip(executor.map_array(function, cells), cells, strict=True))
        for job in engine.helpers.as_completed(list(jobs), poll_frequency=1):
            try:
                yield job.result()
            except Exception as error:  # the job was killed, or ran out of time or memory
                yield Outcome(jobs[job].name, "error", f"job {job.job_id}: {str(error).splitlines()[0]}")

    return run


def run_sweep(sweep: Sweep, executor: Executor) -> Iterator[Outcome]:
    """Run the cells that have no result yet; yield an outcome for each, then write ``table.csv``.

    Raises:
        ValueError: a cell's folder belongs to another sweep; nothing is run then.
        RuntimeError: a process died; what is done is kept.
    """
    todo = [cell for cell in sweep.cells if result_of(cell) is None]
    sweep.folder.mkdir(parents=True, exist_ok=True)
    replace_file(sweep.folder / "sweep.toml", sweep.text.encode())
    if todo:
        yield from executor(run_cell, todo)
    write_table(sweep.folder / "table.csv", table(sweep))
