"""Processes that fail, die, come late, or do something else: an error on every process, within the time limit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import on_ranks, results
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sharpkern as sk

LIMIT = 40.0
ce = nn.functional.cross_entropy


def outcome(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def net(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)).double()


def data(features: int = 3, rows: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, features, dtype=torch.float64), torch.randint(0, 2, (rows,))


def disagreements(rank: int, world: int) -> dict[str, list[Any]]:
    """Let rank 1 do something else in each of these; every rank tells what it saw, and after how long."""
    odd = rank == 1
    model, batch = net(), data()

    def own(loss: Any = ce, batch: Any = batch, model: nn.Module = model, **options: Any) -> Any:
        return sk.DataParallelHessian(model, loss, batch, time_limit=LIMIT, verify=False, **options)

    def failing(z: Tensor, y: Tensor) -> Tensor:
        if odd:
            raise KeyError("a bug in the loss")
        return ce(z, y)

    def infinite(z: Tensor, y: Tensor) -> Tensor:
        return ce(z, y) / (0.0 if odd else 1.0)

    A, V = own(), torch.randn(2, 22 + 4, dtype=torch.float64)
    wrong = data(features=5) if odd else batch
    other = [torch.randn_like(batch[0])[:, :, None].expand(-1, -1, 2), batch[1]] if odd else batch

    def mean_of_first(z: Tensor, y: Tensor) -> Tensor:
        return ce(z, y)

    cases: dict[str, Callable[[], Any]] = {
        "wrong width": lambda: own(batch=wrong),
        "other shape": lambda: own(lambda z, y: z.square().mean(), tuple(other), model=_First(model)),
        "other parameters": lambda: own(model=net(5 if odd else 4)),
        "other values": lambda: own(model=_scaled(net(), 3.0 if odd else 1.0)),
        "error in the loss": lambda: own(failing),
        "infinite loss": lambda: own(infinite),
        "other vector": lambda: A.matvec(V[int(odd)]),
        "other number of vectors": lambda: A.matmat(torch.ones(26, 1 + odd, dtype=torch.float64)),
        "other call": lambda: A.quadratic_form(V[0]) if odd else A.matvec(V[0]),
        "refresh": lambda: A.refresh() if odd else A.gradient,
        "a NaN here": lambda: A.matvec(V[0] * (float("nan") if odd else 1.0)),
        "a NaN everywhere": lambda: A.matvec(V[0] * float("nan")),
        "wrong vector": lambda: A.matvec(V[0].float() if odd else V[0]),
    }
    told = {}
    for name, call in cases.items():
        start = time.monotonic()
        told[name] = [outcome(call), time.monotonic() - start]
        if name == "wrong vector" and odd:  # it raised before the others were told; so it must come, or they wait
            outcome(lambda: A.refresh())
    told["still works"] = [outcome(lambda: own().matvec(V[0])), 0.0]
    return told


class _First(nn.Module):
    """Looks at the first two dimensions only, so that batches of other shapes give a loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x if x.ndim == 2 else x[:, :, 0])


def _scaled(model: nn.Module, factor: float) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)
    return model


def test_a_rank_that_disagrees_is_an_error_everywhere(seed: int) -> None:
    told = results(disagreements, 2, seed)
    on_both = {
        "wrong width": ("rank 1 failed at 'setup'", "mat1 and mat2"),
        "other shape": ("batch's shape", "batch's shape"),
        "other parameters": ("0.weight [4, 3]", "0.weight [5, 3]"),
        "other values": ("the sum of all parameters", "the sum of all parameters"),
        "error in the loss": ("rank 1 failed at 'setup': KeyError", "a bug in the loss"),
        "infinite loss": ("NonFiniteLossError: the loss is inf", "NonFiniteLossError: the loss is inf"),
        "other vector": ("the sum of the vectors", "the sum of the vectors"),
        "other number of vectors": ("the number of vectors is 1, 2", "the number of vectors is 1, 2"),
        "other call": ("rank 1 is at 'quadratic form'", "rank 0 is at 'product'"),
        "refresh": ("rank 1 is at 'refresh'", "rank 0 is at 'gradient'"),
        "a NaN here": ("the sum of the vectors is", "the sum of the vectors is"),
        "a NaN everywhere": ("no error", "no error"),
        "wrong vector": ("rank 1 is at 'refresh'", "v must be torch.float64"),
    }
    for name, texts in on_both.items():
        for rank, text in enumerate(texts):
            message, seconds = told[rank][name]
            assert text in message, (name, rank, message)
            assert seconds < LIMIT, (name, rank, seconds)
    assert [t["still works"][0] for t in told] == ["no error"] * 2


def dies(rank: int, world: int) -> Any:
    model = nn.parallel.DistributedDataParallel(net())
    tracker = sk.SharpnessTracker(model, ce, torch.optim.SGD(model.parameters(), lr=0.1))
    tracker.step(data())
    if rank == 1:
        os._exit(1)
    start = time.monotonic()
    return outcome(lambda: tracker.step(data())), time.monotonic() - start


def is_late(rank: int, world: int) -> Any:
    A = sk.DataParallelHessian(net(), ce, data(), time_limit=4.0, verify=False)
    start = time.monotonic()
    if rank == 1:
        time.sleep(9.0)
    return outcome(lambda: A.matvec(torch.ones(26, dtype=torch.float64))), time.monotonic() - start


def fails_between_gathers(rank: int, world: int) -> Any:
    model = net()
    for m in (model[0], model[2], model):
        fully_shard(m, mesh=init_device_mesh("cpu", (world,)))

    def loss(z: Tensor, y: Tensor) -> Tensor:
        if rank == 1:
            raise KeyError("a bug in the loss")
        return ce(z, y)

    start, batch = time.monotonic(), data()
    failed = outcome(lambda: sk.ShardedHessian(model, loss, batch, time_limit=LIMIT))
    took = time.monotonic() - start
    A = sk.ShardedHessian(model, ce, batch, time_limit=LIMIT)  # a new one works
    again = outcome(lambda: A.matvec(torch.ones(A.n, dtype=torch.float64)))
    routed = Routed(rank)
    for m in (*routed.experts, routed):
        fully_shard(m, mesh=init_device_mesh("cpu", (world,)))
    return failed, took, again, outcome(lambda: sk.ShardedHessian(routed, ce, batch, time_limit=LIMIT))


class Routed(nn.Module):
    """Two layers of one shape, of which each process uses the other one first, as a router may do."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.experts, self.rank = nn.ModuleList(nn.Linear(3, 3).double() for _ in range(2)), rank

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[1 - self.rank](self.experts[self.rank](x))


def test_a_rank_that_dies_is_an_error_on_the_others(seed: int) -> None:
    told = on_ranks(dies, 4, seed)
    assert told[1] == {}
    for rank in (0, 2, 3):
        message, seconds = told[rank]["result"]
        assert "DistributedError" in message and "a rank has died" in message
        assert seconds < 60


def test_a_rank_that_is_late_is_an_error_everywhere(seed: int) -> None:
    for message, seconds in results(is_late, 2, seed):
        assert "did not come within 4 seconds" in message, message
        assert seconds < 30


@pytest.mark.slow
def test_a_rank_that_fails_or_strays_between_gathers_is_an_error_everywhere(seed: int) -> None:
    first, second = results(fails_between_gathers, 2, seed)
    assert "a bug in the loss" in first[0], first
    assert "a bug in the loss" in second[0], second
    assert max(first[1], second[1]) < LIMIT / 2, "nobody waited for the time limit"
    assert first[2] == second[2] == "no error"
    # Shapes fit, so this would go through, with another layer's weights.
    assert "order in which weights were used" in first[3] and first[3] == second[3]


def test_without_processes_it_says_what_to_call() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        sk.DataParallelHessian(net(), ce, data())
