"""What a model is wrapped in, and which kinds of parallelism are understood."""

from __future__ import annotations

import sys
from typing import Any, Literal

from torch import nn

from ..optimizers.parts import is_spread

Kind = Literal["plain", "ddp", "fsdp2"]
_HOW = "sharpkern.hessian_of(model, loss_fn, batch), sharpness() and SharpnessTracker take the wrapped model"


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` has wrapped, or the model itself: its names are the user's own."""
    # Else every name would begin with "_orig_mod.", and the export would meet a compiled function.
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def inside(model: nn.Module) -> nn.Module:
    """Return the module below ``torch.compile`` and ``DistributedDataParallel``, in whatever order; its own names."""
    model = unwrapped(model)
    return unwrapped(model.module) if isinstance(model, nn.parallel.DistributedDataParallel) else model


def kind_of(model: Any) -> Kind:
    """Say how a model is spread over processes.

    Returns:
        "plain" for a model that one process holds, "ddp" for ``DistributedDataParallel``, "fsdp2" for a model with
        modules under ``fully_shard``.

    Raises:
        ValueError: it is spread in a way that would give wrong numbers here: tensor or pipeline parallel, FSDP1, a
            mesh of two dimensions; and what to do. Each process sees this by itself, so all of them raise.
    """
    # By the name of its module, as no import is needed to tell: a stage is no nn.Module.
    if any(c.__module__.startswith("torch.distributed.pipelining") for c in type(model).__mro__):
        raise ValueError(
            f"{type(model).__name__} is a part of a pipeline: no process holds a loss of the whole model. Measure the "
            "model before it is split, or a copy of it on one process."
        )
    model, module = unwrapped(model), inside(model)
    # Anywhere inside: parallelism may be applied to a part of a model only.
    modules = list(module.modules())
    for m in modules:
        if any(c.__module__.startswith("torch.distributed.fsdp.fully_sharded") for c in type(m).__mro__):
            raise ValueError("FSDP1 (FullyShardedDataParallel) is not supported: use fully_shard (FSDP2), or DDP.")
    sharded = any(is_fully_sharded(m) for m in modules)
    _check_placements(module, sharded=sharded)
    if module is not model:
        return "ddp"
    return "fsdp2" if sharded else "plain"


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to this very module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: then nothing can be under it
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def check_one_process(model: nn.Module | None) -> None:
    """Check that a model is not wrapped for several processes: one process's own Hessian is that of its data only.

    Raises:
        ValueError: it is, and what to use instead.
    """
    if model is None:
        return
    kind = kind_of(model)
    if kind == "ddp":
        raise ValueError(
            "this model is wrapped in DistributedDataParallel, and this operator sees the data of one process: "
            f"{_HOW}. For the Hessian of this process's own data pass ddp.module."
        )
    if kind == "fsdp2":
        raise ValueError(
            f"this model's parameters are sharded by fully_shard, and this operator needs them whole: {_HOW}."
        )


def check_uncoupled(module: nn.Module) -> None:
    """Check that the processes' losses are independent, so that the mean of their Hessians is that of the mean loss.

    Raises:
        ValueError: synchronised batch norm would couple them.
    """
    # In eval mode it uses running statistics, which are constants.
    if coupled := [name for name, m in module.named_modules() if isinstance(m, nn.SyncBatchNorm) and m.training]:
        raise ValueError(
            f"synchronised batch norm couples the processes' losses: {coupled[:3]}. Measure in eval mode, or with "
            "plain batch norm, whose statistics are those of each process's batch."
        )


def _check_placements(model: nn.Module, *, sharded: bool) -> None:
    for name, p in model.named_parameters():
        if not is_spread(p):
            continue
        layout: Any = p
        # Gathered weights would be right, but the activations between layers are DTensors or parts as well.
        if not sharded:
            raise ValueError(
                f"parameter {name!r} is a DTensor ({layout.placements}) of a model that is not under fully_shard: "
                "tensor parallelism is not supported, because torch's second derivatives through it are wrong. "
                "Measure a copy of the model on one process, with torch.distributed.checkpoint.state_dict."
            )
        if layout.device_mesh.ndim != 1 or not layout.placements[0].is_shard():
            raise ValueError(
                f"parameter {name!r} has placements {layout.placements} on a mesh of {layout.device_mesh.ndim} "
                "dimensions: only fully_shard over a mesh of one dimension is supported, without tensor parallelism "
                "and without replication (HSDP)."
            )
