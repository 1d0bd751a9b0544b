"""The truth in float64, by double backward and SciPy, without sharpkern."""

from __future__ import annotations

import copy

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
    peer = Kept(double(work))
    peer.prepare()
    op = Operator(peer, None if scale is None else scale.double())
    linear = LinearOperator((op.n, op.n), lambda v: op.matmat(torch.as_tensor(v).reshape(-1, 1))[:, 0].numpy())
    v0 = torch.randn(op.n, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).numpy()
    values = eigsh(linear, k, which="LA", tol=tol, v0=v0, ncv=max(20, 2 * k + 1), return_eigenvectors=False)
    return sorted((float(v) for v in values), reverse=True)
