"""``sharpkern suggest``: which warmup a model needs."""

from __future__ import annotations

import argparse

from .exits import OK
from .options import PROBLEM, TASK_HELP, add_run_options, read_run_options

DESCRIPTION = f"""Measure a model with its loss, data and optimizer, try short runs on copies, and recommend
initial and target learning rate and warmup length.

A full batch makes every step of 6 to 16 short runs cost a full pass: use --data.limit or --batch-size
for a first look.
Other options of sharpkern train are taken and not used, so that one command line serves for both.

{TASK_HELP}
  Short runs go through the batches in their order."""
_OPTIMIZER = tuple(f"optimizer.{name}" for name in ("name", "momentum", "beta1", "beta2", "eps"))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the command's options."""
    add_run_options(parser, (*PROBLEM, *_OPTIMIZER))
    group = parser.add_argument_group("suggestion")
    group.add_argument(
        "--lr-target", type=float, metavar="RATE", help="the target that you want (default: the one that learnt most)"
    )
    group.add_argument("--probe-steps", type=int, metavar="N", default=64, help="longest warmup tried (default: 64)")


def run(given: argparse.Namespace) -> int:
    """Measure and recommend; return the exit code."""
    config = read_run_options(given)
    from ..train.build import build_optimizer, build_task
    from ..train.moments import draw_second_moment
    from ..warmup.suggest import suggest_warmup

    task = build_task(config)
    # One epoch, as a list: short runs go through it again and again, each from its start.
    batches = [task.batch(step) for step in range(1, task.per_epoch + 1)]
    optimizer = build_optimizer(config, task.model)
    # RI-Adam's v_0 is drawn once, so that all short runs begin from one state.
    draw_second_moment(task.model, task.loss_fn, batches[0], optimizer)
    found = suggest_warmup(
        task.model, task.loss_fn, batches, optimizer, lr_target=given.lr_target, probe_steps=given.probe_steps
    )
    print(found)
    print(
        f"To train so: the same options with --optimizer.lr {found.lr_target:.4g} --optimizer.lr-init "
        f"{found.lr_init:.4g} --optimizer.warmup-steps {found.warmup_steps}"
    )
    return OK
