"""What a model is wrapped in: parallelism that is not supported is refused on every process, with advice."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from ranks import results
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sharpkern as sk
from sharpkern.curvature.wrappers import kind_of

ce = nn.functional.cross_entropy


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))


def sharded(unit: Callable[[nn.Module], list[nn.Module]], **options: Any) -> nn.Module:
    model = net()
    for m in unit(model):
        fully_shard(m, **options)
    return model


class Aliased(nn.Module):
    """Keeps a module in a plain list, where FSDP's own hooks would stay on it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.also = [self.layer]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.also[0](x)


class Leaky(nn.Module):
    """The second unit uses the first one's weight without being given it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), Reader()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.b.hidden = self.a(x)
        return self.b(x)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.hidden: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.hidden[:, :2]


def refusals(rank: int, world: int) -> dict[str, Any]:
    line = init_device_mesh("cpu", (world,))
    plane = init_device_mesh("cpu", (1, world), mesh_dim_names=("replicate", "shard"))
    batch = torch.randn(6, 4), torch.randint(0, 2, (6,))
    tp = parallelize_module(net(), line, {"0": ColwiseParallel(), "3": RowwiseParallel()})
    ddp = nn.parallel.DistributedDataParallel(net())
    hooked = nn.parallel.DistributedDataParallel(net())
    hooked.register_comm_hook(None, lambda _, bucket: torch.futures.Future())
    fsdp1 = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # its constructor needs an accelerator
    nn.Module.__init__(fsdp1)
    fsdp1._fsdp_wrapped_module = net()
    whole = sharded(lambda m: [m], mesh=line)
    alias, leak = Aliased(), Leaky()
    for m in (alias.layer, alias, leak.a, leak.b, leak):
        fully_shard(m, mesh=line)
    synced = nn.parallel.DistributedDataParallel(net())
    synced.module[1] = nn.SyncBatchNorm(8)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    stage = PipelineStage(net(), rank, world, torch.device("cpu"))

    def tracker(model: nn.Module, **options: Any) -> Any:
        return sk.SharpnessTracker(model, ce, torch.optim.SGD(net().parameters(), lr=0.1), **options)

    start = time.monotonic()
    calls: dict[str, Callable[[], Any]] = {
        "tensor parallel": lambda: sk.sharpness(tp, ce, batch),
        "tensor parallel, tracker": lambda: tracker(tp),
        "tensor parallel, operator": lambda: sk.HessianOperator(tp, ce, batch),
        "pipeline": lambda: sk.sharpness(stage, ce, batch),
        "FSDP1": lambda: sk.sharpness(fsdp1, ce, batch),
        "two dimensions": lambda: sk.sharpness(sharded(lambda m: [m], mesh=plane), ce, batch),
        "precision": lambda: sk.sharpness(sharded(lambda m: [m], mesh=line, mp_policy=policy), ce, batch),
        "a part": lambda: sk.sharpness(sharded(lambda m: [m[0]], mesh=line), ce, batch),
        "synchronised norm": lambda: sk.sharpness(synced, ce, batch),
        "hook": lambda: sk.sharpness(hooked, ce, batch),
        "one process, ddp": lambda: sk.HessianOperator(ddp, ce, batch),
        "one process, fsdp2": lambda: sk.GGNOperator(whole, ce, batch),
        "critical": lambda: sk.critical_learning_rate(ddp, ce, batch, torch.optim.SGD(ddp.parameters(), lr=0.1)),
        "budget": lambda: tracker(ddp, budget=0.2),
        "loader": lambda: tracker(ddp, loader=[batch]),
        "chunk": lambda: tracker(whole, chunk=2),
        "recompute": lambda: sk.hessian_of(whole, ce, batch, recompute=True),
        "parameters": lambda: sk.hessian_of(whole, ce, batch, params=["0.weight"]),
        "directions": lambda: tracker(whole, directions=True),
        "alias": lambda: sk.sharpness(alias, ce, batch),
        "captured": lambda: sk.sharpness(leak, ce, batch),
        "kernel": lambda: sk.kernels.gram(whole[0].weight, whole[0].weight),
    }
    told = {name: message(call) for name, call in calls.items()}
    kinds = [kind_of(m) for m in (net(), ddp, whole, torch.compile(ddp))]
    return {"told": told, "kinds": kinds, "seconds": time.monotonic() - start}


def test_what_is_not_supported_is_refused_on_every_process(seed: int) -> None:
    wanted = {
        "tensor parallel": "tensor parallelism is not supported",
        "tensor parallel, tracker": "tensor parallelism is not supported",
        "tensor parallel, operator": "tensor parallelism is not supported",
        "pipeline": "part of a pipeline",
        "FSDP1": "use fully_shard",
        "two dimensions": "mesh of one dimension",
        "precision": "mixed precision is not supported",
        "a part": "are not sharded: ['1.weight'",
        "synchronised norm": "synchronised batch norm",
        "hook": "communication hook",
        "one process, ddp": "pass ddp.module",
        "one process, fsdp2": "sharded by fully_shard",
        "critical": "wrapped in DistributedDataParallel",
        "budget": "every=",
        "loader": "leave it out",
        "chunk": "leave them out",
        "recompute": "leave them out",
        "parameters": "leave them out",
        "directions": "whole vectors",
        "alias": "attribute 'also'",
        "captured": "not passed to it as an argument",
        "kernel": "to_local()",
    }
    for own in results(refusals, 2, seed):
        assert own["kinds"] == ["plain", "ddp", "fsdp2", "ddp"]
        assert own["seconds"] < 60
        for name, text in wanted.items():
            assert text in own["told"][name], (name, own["told"][name])
            assert own["told"][name].startswith(("ValueError", "TypeError", "DistributedError: rank")), own["told"][
                name
            ]
