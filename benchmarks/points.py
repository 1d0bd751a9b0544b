"""Where a model stands when it is measured: at its start, after some training, at the edge of stability."""

from __future__ import annotations

import torch
from workloads import WORKLOADS, Workload

import sharpkern as sk

POINTS = ("init", "trained", "edge")


def at(name: str, point: str, steps: int = 50) -> Workload:
    """Build a workload and bring it there by full-batch gradient descent.

    "trained": ``steps`` steps at a quarter of the largest stable learning rate of the start. "edge": that, then twice
    as many at a learning rate whose threshold is 4/3 of the sharpness reached.
    """
    torch.manual_seed(0)
    work = WORKLOADS[name]()
    if point != "init":
        _descend(work, 0.5 / _sharpness(work), steps)
    if point == "edge":
        _descend(work, 1.5 / _sharpness(work), 2 * steps)
    return work


def _sharpness(work: Workload) -> float:
    return sk.sharpness(*work, tol=0.03).value


def _descend(work: Workload, lr: float, steps: int) -> None:
    x, y = work.batch
    optimizer = torch.optim.SGD(work.model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        work.loss_fn(work.model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
