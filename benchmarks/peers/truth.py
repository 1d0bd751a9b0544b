"""The truth in float64, by double backward and SciPy, without sharpkern."""

from __future__ import annotations

import copy
from typing import Any

import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor
from workloads import Workload

from .autograd_kept import PEER as Kept
from .common import Operator


def double(work: Workload) -> Workload:
    """Copy in float64."""
    batch = tuple(t.double() if t.is_floating_point() else t for t in work.batch)
    return Workload(copy.deepcopy(work.model).double(), work.loss_fn, batch)


def products(work: Workload, V: Tensor) -> Tensor:
    """``HV`` of ``[n, k]``."""
    peer = Kept(double(work))
    peer.prepare()
    return Operator(peer).matmat(V.double())


def top(work: Workload, k: int = 1, scale: Tensor | None = None, tol: float = 1e-6) -> list[float]:
    """Return the k largest algebraic eigenvalues, descending, of H or of ``S H S``.

    ``tol`` is ARPACK's; the error of the eigenvalue is of second order in it.
    """
    start = torch.randn(_size(work), dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    values = _arpack(work, scale, start, k=k, tol=tol, ncv=max(20, 2 * k + 1))[0]
    return sorted((float(v) for v in values), reverse=True)


class Follower:
    """The largest eigenvalue from step to step: starts in what it found last, to which noise is added.

    Without the noise an eigenvector that has become the second one would hold it for ever.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None

    def top(self, work: Workload, scale: Tensor | None = None) -> float:
        """Return it, to about 1e-8."""
        noise = torch.randn(_size(work), dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        start = noise if self._last is None else self._last + 0.1 * noise / noise.norm()
        values, vectors = _arpack(work, scale, start, k=1, tol=1e-4, ncv=12)
        self._last = torch.from_numpy(vectors[:, 0])
        return float(values[0])


def _size(work: Workload) -> int:
    return sum(p.numel() for p in work.model.parameters())


def _arpack(work: Workload, scale: Tensor | None, start: Tensor, **settings: Any) -> Any:
    peer = Kept(double(work))
    peer.prepare()
    op = Operator(peer, None if scale is None else scale.double())
    linear = LinearOperator((op.n, op.n), lambda v: op.matmat(torch.as_tensor(v).reshape(-1, 1))[:, 0].numpy())
    return eigsh(linear, which="LA", v0=start.numpy(), **settings)
