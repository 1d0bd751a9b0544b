"""``sharpkern train``: a run, its progress, its summary and its plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from ..train.config import TrainConfig
from .exits import DIVERGED, INTERRUPTED, OK, complain
from .options import EVERYTHING, TASK_HELP, with_run_options
from .progress import with_progress

if TYPE_CHECKING:
    from ..train.metrics import Row

DESCRIPTION = f"""Train a model and track its sharpness at every step.

The run folder gets config.toml, metrics.jsonl (one row a step), checkpoint.pt, summary.txt and sharpness.png; run.lock
in it names the process that trains.

Options are named as in config.toml: --optimizer.lr is lr in its table [optimizer].

{TASK_HELP} Step t trains on batch number t, again from the first after the last. Accuracies are not measured."""


@with_run_options(*EVERYTHING)
def run(
    config: TrainConfig,
    *,
    resume: Annotated[Path | None, Option(help="go on with the run in this folder; takes no other option")] = None,
) -> int:
    """Train; return the exit code."""
    from ..curvature.losses import NonFiniteLossError
    from ..train.loop import Run

    trained = Run(config, resume=resume is not None)
    print(f"data: {trained.task.note}; run folder: {config.out}")
    code = OK
    try:
        for _ in with_progress(trained.steps(), trained.done, config.steps, "step", _state):
            pass
    except NonFiniteLossError as error:
        code = complain(f"{error} The run folder keeps what was done.", DIVERGED)
    except KeyboardInterrupt:
        code = complain("interrupted; the run folder keeps what was done, --resume continues.", INTERRUPTED)
    # Also after a divergence or Ctrl-C: what was done has a summary and a plot.
    finally:
        _conclude(config)
    return code


def _state(row: Row) -> str:
    """Say where a run stands, for its progress display."""
    parts = [f"loss {row['loss']:.4g}"]
    if row["status"] == "untracked":
        parts.append(f"batch sharpness x lr {(row['batch_sharpness'] or 0.0) * row['lr']:.3g}")
    else:
        parts.append(f"sharpness x lr {row['sharpness'] * row['lr']:.3g}")
    if row["preconditioned_sharpness"] is not None:
        parts.append(f"preconditioned x lr {row['preconditioned_sharpness'] * row['lr']:.3g}")
    return ", ".join(parts)


def _conclude(config: TrainConfig) -> None:
    """Write and print the summary; draw the plot."""
    from ..train.metrics import read

    rows = read(config.out / "metrics.jsonl")
    finite = [row for row in rows if row.get("loss") is not None]
    # After a divergence at the first step there is nothing to plot, and a sentence would repeat the error.
    if not finite:
        return
    from ..train.plots import plot_run
    from ..train.summary import catapults_of, summary_lines

    # Of all rows, as the last one may be the divergence; the plot takes those with numbers.
    lines = summary_lines(rows)
    (config.out / "summary.txt").write_text("\n".join(lines) + "\n")
    tracked = [row for row in finite if row["sharpness"] is not None]
    plot_run(
        finite, config.optimizer, catapults_of(tracked), config.out / "sharpness.png", _title(config),
        minibatch=config.batch_size is not None,
    )  # fmt: skip
    print("\n".join(lines))
    print(f"plot: {config.out / 'sharpness.png'}")


def _title(config: TrainConfig) -> str:
    batch = "full batch" if config.batch_size is None else f"batch {config.batch_size}"
    what = config.task or f"{config.model.kind.upper()}, {config.data.name}"
    how = [config.optimizer.name, *([] if config.task else [batch]), f"warmup {config.optimizer.warmup_steps} steps"]
    return ", ".join([what, *how])
