"""The basis of a Krylov solve, turned in place at a restart."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpkern.eigen.basis import _TURNED_BYTES, Basis


def test_a_restart_turns_every_range_of_columns(seed: int) -> None:
    class Coupled:
        n, dtype, device = 70_001, torch.float64, torch.device("cpu")
        d = torch.rand(n, dtype=torch.float64)
        u = torch.randn(n, dtype=torch.float64) / n**0.5

        def matmat(self, V: Tensor) -> Tensor:
            return self.d[:, None] * V + 3 * self.u[:, None] * (self.u @ V)

    op = Coupled()
    basis = Basis(op, 8, torch.Generator().manual_seed(seed))
    basis.extend(torch.randn(7, op.n, dtype=op.dtype))
    assert 7 * op.n * 8 > 3 * _TURNED_BYTES
    theta, Y = basis.ritz()
    basis.restart(Y[:, :3])
    Q, W = basis.Q[:3], basis.W[:3]
    assert basis.size == 3
    assert torch.allclose(Q @ Q.t(), torch.eye(3).double(), atol=1e-12)
    assert torch.allclose(W, op.matmat(Q.t()).t(), atol=1e-12)
    assert torch.allclose(basis.T[:3, :3], theta[:3].diag(), atol=1e-12)
