"""Where cells run. An executor gets a function and groups of cells, and yields the outcomes of each as it ends."""

from __future__ import annotations

import contextlib
import itertools
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
from .grid import Sweep
from .groups import Group, groups, run_group
from .run import CellEnd

Executor = Callable[[Callable[[Group], list[CellEnd]], Sequence[Group]], Iterator[list[CellEnd]]]


def local(processes: int | None = None) -> Executor:
    """Return an executor for this machine.

    Args:
        processes: at most so many at once; by default as many as there are cores for their torch threads.

    Raises:
        RuntimeError: while it runs: a process died, perhaps for want of memory.
    """

    def run(function: Callable[[Group], list[CellEnd]], todo: Sequence[Group]) -> Iterator[list[CellEnd]]:
        # A process gets its number of threads once, before it knows its cells: that of the largest.
        threads = max(cell.config.threads or 1 for group in todo for cell in group)
        workers = processes or processes_for(threads)
        # Spawned and not forked: a fork inherits torch's threads as dead ones, and comes too late for OMP_NUM_THREADS.
        with ProcessPoolExecutor(
            min(workers, len(todo)), multiprocessing.get_context("spawn"), _prepare, (threads,)
        ) as pool:
            try:
                for future in as_completed([pool.submit(function, group) for group in todo]):
                    yield future.result()
            except BrokenProcessPool:
                raise RuntimeError(
                    "a process died, perhaps for want of memory: try fewer --processes; what is done is kept."
                ) from None
            except BaseException:  # Ctrl-C: the cells' folders keep what is done
                # Running cells are not waited for: their folders have checkpoints, and a second call goes on from
                # those.
                pool.shutdown(wait=False, cancel_futures=True)
                for child in multiprocessing.active_children():
                    child.terminate()
                raise

    return run


def processes_for(threads: int) -> int:
    """Return for how many processes of so many threads this machine has cores."""
    # The cores that this process may use, which in a container are fewer than the machine's.
    return max(1, len(os.sched_getaffinity(0)) // threads)


def _prepare(threads: int) -> None:
    """Set up a process before it imports torch: few threads, no Ctrl-C of its own, no life after its parent's."""
    # Read by OpenMP once, when torch loads it.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # A terminal sends Ctrl-C to all processes of the group. The parent alone decides, and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A parent that was killed cannot end its children, which would train on beside a second call.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(ImportError):  # torch imports tqdm, whose own lock outlives a process that is terminated
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        # ``sys.exit`` would end this thread only.
        os._exit(1)


def submitit(logs: Path, **parameters: Any) -> Executor:
    """Return an executor for a Slurm cluster, one job a group, by way of submitit.

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

    def run(function: Callable[[Group], list[CellEnd]], todo: Sequence[Group]) -> Iterator[list[CellEnd]]:
        # One array job: a scheduler takes it as a whole, where a job a cell would flood its queue.
        jobs = dict(zip(executor.map_array(function, todo), todo, strict=True))
        for job in engine.helpers.as_completed(list(jobs), poll_frequency=1):
            try:
                yield job.result()
            except Exception as error:  # the job was killed, or ran out of time or memory
                message = f"job {job.job_id}: {str(error).splitlines()[0]}"
                yield [CellEnd(cell.name, "error", message) for cell in jobs[job]]

    return run


def run_sweep(sweep: Sweep, executor: Executor, *, at_once: int = 1) -> Iterator[CellEnd]:
    """Run the cells that have no result yet; yield an outcome for each, then write ``table.csv``.

    Args:
        sweep: of ``read_sweep``.
        executor: where.
        at_once: how many processes there are to share what could be one stack (see ``groups``).

    Raises:
        ValueError: a cell's folder belongs to another sweep; nothing is run then.
        RuntimeError: a process died; what is done is kept.
    """
    # All of them before the first is run: a cell of other settings is refused while nothing has changed yet.
    todo = [cell for cell in sweep.cells if result_of(cell) is None]
    sweep.folder.mkdir(parents=True, exist_ok=True)
    replace_file(sweep.folder / "sweep.toml", sweep.text.encode())
    if todo:
        yield from itertools.chain.from_iterable(executor(run_group, groups(todo, at_once)))
    # Also when nothing was left to do: the file may declare fewer cells than the table of the last call.
    write_table(sweep.folder / "table.csv", table(sweep))
