"""``sharpkern audit``: can the products be trusted for this model?"""

from __future__ import annotations

from ..train.config import TrainConfig
from .exits import FAILED, OK
from .options import PROBLEM, TASK_HELP, with_run_options

DESCRIPTION = f"""Check the Hessian-vector products of a model against independent truths.

The first batch is used; of a full batch of the reference data its first 64 examples.
Other options of sharpkern train are taken and not used, so that one command line serves for both.

{TASK_HELP} The first batch is checked, whole."""
_EXAMPLES = 64  # of a full batch: the truths cost ten gradients in float64


@with_run_options(*PROBLEM)
def run(config: TrainConfig) -> int:
    """Check; return the exit code."""
    from ..curvature.audit import audit
    from ..train.build import build_task

    task = build_task(config)
    batch = task.batch(1)
    if config.task is None and config.batch_size is None:
        # Only of the reference data: nothing is known of the form of a user's batch, nor which tensors have a row an
        # example.
        batch = tuple(t[:_EXAMPLES] for t in batch)
    found = audit(task.model, task.loss_fn, batch)
    print("\n".join(found.lines))
    # An audit without a truth fails too: a script that asks whether products can be trusted must not hear yes.
    return OK if found.ok else FAILED
