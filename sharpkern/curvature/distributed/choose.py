"""The Hessian of a model's loss, whatever the model is wrapped in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..operators import HessianOperator
from ..wrappers import kind_of
from .replicated import TIME_LIMIT, DataParallelHessian, Weighting
from .sharded import ShardedHessian

AnyHessian = HessianOperator | DataParallelHessian | ShardedHessian


def hessian_of(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batch: Any,
    *,
    params: Mapping[str, Tensor] | Iterable[str] | Iterable[Tensor] | None = None,
    update_buffers: bool = False,
    verify: bool = True,
    recompute: bool = False,
    weighting: Weighting = "examples",
    time_limit: float = TIME_LIMIT,
) -> AnyHessian:
    """Return the Hessian of the loss over the batches of all processes that train a model together.

    Args:
        model: a plain module (``HessianOperator``), ``DistributedDataParallel`` (``DataParallelHessian``), or one under
            ``fully_shard`` (``ShardedHessian``).
        loss_fn: ``(output, targets) -> scalar``, averaged over the examples.
        batch: this process's part of the batch.
        params: which parameters; None for all with ``requires_grad``, and for a sharded model.
        update_buffers: let the forward pass change the model's buffers.
        verify: compare programs with the eager model; see ``HessianOperator``. Sharded models have no program.
        recompute: keep less of the forward pass; see ``HessianOperator``. Not for a sharded model.
        weighting: how unequal parts of a batch are weighed; see ``DataParallelHessian``.
        time_limit: seconds that a process may come later than the others; beyond, all raise.

    Raises:
        ValueError: as the operator; a kind of parallelism that is not supported, on every process; params or recompute
            with a sharded model.
        NonFiniteLossError: the loss is NaN or infinite.
        DistributedError: a process failed, is missing, or disagrees.

    >>> import torch
    >>> type(hessian_of(nn.Linear(3, 1), nn.MSELoss(), (torch.randn(4, 3), torch.randn(4, 1)))).__name__
    'HessianOperator'
    """
    kind = kind_of(model)
    # Also in a process group: a plain model may be trained by each process for itself, as in a sweep.
    if kind == "plain":
        return HessianOperator(
            model, loss_fn, batch, params=params, update_buffers=update_buffers, verify=verify, recompute=recompute
        )
    options: dict[str, Any] = {"update_buffers": update_buffers, "weighting": weighting, "time_limit": time_limit}
    if kind == "ddp":
        return DataParallelHessian(model, loss_fn, batch, params=params, verify=verify, recompute=recompute, **options)
    if params is not None or recompute:
        raise ValueError("params= and recompute= are not for a model under fully_shard: leave them out.")
    # No verify: there is no program that could differ from the eager model.
    return ShardedHessian(model, loss_fn, batch, **options)
