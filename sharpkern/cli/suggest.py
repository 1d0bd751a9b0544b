"""``sharpkern suggest``: which warmup a model needs."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from ..train.config import TrainConfig
from .exits import OK
from .options import PROBLEM, TASK_HELP, with_run_options
from .progress import progress

DESCRIPTION = f"""Measure a model with its loss, data and optimizer, try short runs on copies, and recommend
initial and target learning rate and warmup length.

A full batch makes every step of 7 to 20 short runs cost a full pass: use --data.limit or --batch-size
for a first look.
Other options of sharpkern train are taken and not used, so that one command line serves for both.

{TASK_HELP} Short runs go through the batches in their order."""
_OPTIMIZER = tuple(f"optimizer.{name}" for name in ("name", "momentum", "beta1", "beta2", "eps"))


@with_run_options(*PROBLEM, *_OPTIMIZER)
def run(
    config: TrainConfig,
    *,
    lr_target: Annotated[
        float | None, Option(help="the target that you want (default: the one that learnt most)")
    ] = None,
    probe_steps: Annotated[int, Option(help="longest warmup tried")] = 64,
) -> int:
    """Measure and recommend; return the exit code."""
    from ..train.build import build_optimizer, build_task
    from ..train.moments import draw_second_moment
    from ..warmup.suggest import suggest_warmup
    from ..warmup.trials import most_runs

    task = build_task(config)
    # One epoch, as a list: short runs go through it again and again, each from its start.
    batches = [task.batch(step) for step in range(1, task.per_epoch + 1)]
    optimizer = build_optimizer(config, task.model)
    # RI-Adam's v_0 is drawn once, so that all short runs begin from one state.
    draw_second_moment(task.model, task.loss_fn, batches[0], optimizer)
    with progress(most_runs(probe_steps), "run", at_most="at most ") as advance:
        found = suggest_warmup(
            task.model, task.loss_fn, batches, optimizer, lr_target=lr_target, probe_steps=probe_steps, on_run=advance
        )
    print(found)
    print(
        f"To train so: the same options with --optimizer.lr {found.lr_target:.4g} --optimizer.lr-init "
        f"{found.lr_init:.4g} --optimizer.warmup-steps {found.warmup_steps}"
    )
    return OK
