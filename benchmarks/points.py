"""Where a model stands when it is measured: at its start, after some training, at the edge of stability."""

from __future__ import annotations

from typing import NamedTuple

import torch
from workloads import WORKLOADS, Workload

import sharpkern as sk

POINTS = ("init", "trained", "edge")
EDGE = (0.9, 1.1)  # sharpness over threshold that counts as at the edge
_PIECE, _MOST = 10, 300  # steps between two looks, and in all


class Standing(NamedTuple):
    """A workload, the learning rate of gradient descent there, and its sharpness over the threshold ``2 / lr``."""

    work: Workload
    lr: float
    of_threshold: float


def at(name: str, point: str, steps: int = 50) -> Standing:
    """Build a workload and bring it there by full-batch gradient descent.

    "init": as built, with a quarter of the largest stable learning rate. "trained": ``steps`` steps with that. "edge":
    from there on with a learning rate whose threshold is 4/3 of the sharpness reached, so that the sharpness rises
    past the threshold and swings about it: at least ``steps`` steps, and until it is within 10% of the threshold.
    """
    torch.manual_seed(0)
    work = WORKLOADS[name]()
    sharpness = _sharpness(work)
    lr = 0.5 / sharpness
    if point != "init":
        _descend(work, lr, steps)
        sharpness = _sharpness(work)
    if point == "edge":
        lr = 1.5 / sharpness
        _descend(work, lr, steps)
        for _ in range(steps, _MOST, _PIECE):
            sharpness = _sharpness(work)
            if EDGE[0] <= sharpness * lr / 2 <= EDGE[1]:
                break
            _descend(work, lr, _PIECE)
    return Standing(work, lr, sharpness * lr / 2)


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
