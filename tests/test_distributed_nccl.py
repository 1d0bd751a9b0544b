"""DDP and ``fully_shard`` over NCCL: on two GPUs where there are two, else on one, whose calls are the same.

The truth is the dense float64 matrix of the whole batch, and DDP's own backward pass.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import dense_hessian, double, loss_and_gradient, mlp
from problems import relative as error
from ranks import results
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sharpkern as sk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_devices(rank: int, world: int) -> dict[str, Any]:
    """Both kinds of wrapped models on this process's device; on the CPU for the sake of the code alone."""
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    problem = double(mlp())
    rows = len(problem.batch[0]) // world * world
    problem = problem._replace(batch=tuple(t[:rows] for t in problem.batch))
    dense, (loss, gradient) = dense_hessian(problem), loss_and_gradient(problem)
    top = float(torch.linalg.eigvalsh(dense)[-1])
    mine = tuple(t[rank * rows // world : (rank + 1) * rows // world].to(device) for t in problem.batch)
    V = torch.randn(len(dense), 3, dtype=torch.float64)

    ddp = DistributedDataParallel(problem.model.to(device))
    A = sk.hessian_of(ddp, problem.loss_fn, mine)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    record = sk.SharpnessTracker(ddp, problem.loss_fn, optimizer, tol=1e-6).step(mine)
    stepped = torch.cat([p.grad.flatten() for p in ddp.parameters()])
    ddp.zero_grad()
    problem.loss_fn(ddp(mine[0]), mine[1]).backward()
    own = torch.cat([p.grad.flatten() for p in ddp.parameters()])
    errors = {
        "loss": abs(float(A.loss) - float(loss)),
        "gradient": error(A.gradient.cpu(), gradient.detach()),
        "product": error((A @ V.to(device)).cpu(), dense @ V),
        "form": error(A.quadratic_form(V.to(device)).cpu(), (V * (dense @ V)).sum(0)),
        "DDP's gradient": error(stepped, own),
        "tracker": abs(record.sharpness / top - 1),
    }
    mesh = torch.distributed.device_mesh.init_device_mesh(device.type, (world,))
    sharded = problem.model
    sharded.zero_grad()
    fully_shard(sharded, mesh=mesh)
    optimizer = torch.optim.Adam(sharded.parameters(), lr=0.01)
    errors["sharded"] = abs(sk.sharpness(sharded, problem.loss_fn, mine, tol=1e-7).value / top - 1)
    tracker = sk.SharpnessTracker(sharded, problem.loss_fn, optimizer, tol=1e-6)
    errors["sharded tracker"] = abs(tracker.step(mine).sharpness / top - 1)
    return errors


def test_both_kinds_of_wrapped_models_over_nccl(seed: int) -> None:
    world = min(2, torch.cuda.device_count())
    for errors in results(on_devices, world, seed, "nccl"):
        for name in ("loss", "gradient", "product", "form", "DDP's gradient"):
            assert errors[name] <= 1e-11, (name, errors)
        for name in ("tracker", "sharded", "sharded tracker"):
            assert errors[name] <= 1e-6, (name, errors)
