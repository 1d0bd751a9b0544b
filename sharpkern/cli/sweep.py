"""``sharpkern sweep``: train a grid of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from .exits import FAILED, INTERRUPTED, OK, complain
from .progress import with_progress

DESCRIPTION = "Train every cell of a grid; a second call goes on."


def run(
    file: Annotated[Path, Argument(help="a run's configuration with a table [sweep.grid]")],
    out: Annotated[
        Path | None, Option(help="the sweep's folder (default: the file's own, or runs/ and its name)")
    ] = None,
    processes: Annotated[
        int | None, Option(help="at once, on this machine (default: as many as there are cores)")
    ] = None,
    executor: Annotated[Literal["local", "submitit"], Option(help="where the cells run")] = "local",
    submitit: Annotated[
        list[str] | None,
        Option(metavar="KEY=VALUE", help="of submitit, as in slurm_partition=cpu, timeout_min=60; may be repeated"),
    ] = None,
    only_list: Annotated[bool, Option("--list", help="name the cells, and train none")] = False,
) -> int:
    """Train the cells that have no result yet; return the exit code."""
    if processes is not None and processes < 1:
        raise ValueError(f"--processes must be at least 1, got {processes}.")
    from ..sweep import executors
    from ..sweep.collect import result_of, table
    from ..sweep.grid import read_sweep

    sweep = read_sweep(file, out)
    # Before --list, so that a folder of other settings is refused then too.
    done = sum(result_of(cell) is not None for cell in sweep.cells)
    if only_list:
        print("\n".join(cell.name for cell in sweep.cells))
        return OK
    if executor == "submitit":
        parameters = dict(_pair(item) for item in submitit or [])
        # How many jobs run at once is the cluster's affair, so stacks are not divided for it.
        run_cells, at_once = executors.submitit(sweep.folder / "jobs", **parameters), 1
    else:
        threads = max(cell.config.threads or 1 for cell in sweep.cells)
        at_once = processes or executors.processes_for(threads)
        run_cells = executors.local(at_once)
    print(f"{len(sweep.cells)} cells, {done} of them done; folder: {sweep.folder}")
    ends = with_progress(executors.run_sweep(sweep, run_cells, at_once=at_once), done, len(sweep.cells), "cell")
    try:
        # This is what runs the sweep: ``run_sweep`` is a generator.
        errors = [end for end in ends if end.status == "error"]
    # ``main`` would speak of --resume, which a sweep has not.
    except KeyboardInterrupt:
        return complain("interrupted; the same command goes on from here.", INTERRUPTED)
    # Of the whole table: cells that were done before count as well.
    statuses = [row["status"] for row in table(sweep)]
    counts = ", ".join(f"{statuses.count(name)} {name}" for name in dict.fromkeys(statuses))
    print(f"{counts}; table: {sweep.folder / 'table.csv'}; next: sharpkern report {sweep.folder}")
    if errors:
        return complain(
            f"{len(errors)} cells have no result, the first is {errors[0].name}: {errors[0].message} "
            f"(error.txt in its folder tells more; a second call tries again)", FAILED,
        )  # fmt: skip
    return OK


def _pair(text: str) -> tuple[str, Any]:
    """``timeout_min=60`` becomes ``("timeout_min", 60)``."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--submitit needs KEY=VALUE, got {text!r}.")
    # submitit checks types: ``timeout_min`` must be a number, not the text of one.
    return name, int(value) if value.isdecimal() else value
