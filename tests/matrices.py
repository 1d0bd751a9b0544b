"""Float64 matrices of prescribed spectra, and every claim of a converged result about one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sharpkern.eigen import EigenResult

F64 = torch.float64


Solver = Callable[..., EigenResult]


class Dense:
    """A matrix as an operator that counts its products."""

    def __init__(self, A: Tensor) -> None:
        self.A, self.n, self.dtype, self.device = A, len(A), A.dtype, A.device
        self.products = 0

    def matmat(self, V: Tensor) -> Tensor:
        self.products += V.shape[1]
        return self.A @ V


def prescribed(eigenvalues: Tensor) -> Tensor:
    """A random symmetric float64 matrix with the given eigenvalues."""
    Q = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=F64))[0]
    A = Q * eigenvalues.double() @ Q.t()
    return (A + A.t()) / 2


def bulk(n: int, scale: float = 0.3) -> Tensor:
    return scale * (2 * torch.rand(n, dtype=F64) - 1)


def with_top(*top: float, n: int = 67) -> Tensor:
    return torch.cat([torch.tensor(top, dtype=F64), bulk(n - len(top))])


SPECTRA: dict[str, Callable[[], Tensor]] = {
    "separated": lambda: with_top(3.0, 2.5, 2.0, 1.5),
    "clustered": lambda: with_top(1.0, 0.97, 0.95, 0.93),
    "flat": lambda: torch.linspace(0.02, 1, 53, dtype=F64),
    "double top": lambda: with_top(1.7, 1.7, 1.2, 0.8),
    "triple top": lambda: with_top(1.7, 1.7, 1.7, 0.8),
    "larger negative end": lambda: with_top(1.0, 0.8, 0.7, -10.0, -7.0),
    "ends of equal size": lambda: with_top(1.0, 0.8, 0.6, -1.0),
    "negative definite": lambda: with_top(2.0, 1.6, 1.3) - 2.2,
    "low rank": lambda: torch.cat([torch.tensor([4.0, 3.0, 2.0], dtype=F64), torch.zeros(50, dtype=F64)]),
    "wide": lambda: torch.logspace(-6, 6, 61, dtype=F64),
}


def check(result: EigenResult, A: Tensor, k: int, tol: float) -> None:
    """Every claim of a converged result."""
    A, V = A.double(), result.eigenvectors.double()
    truth = torch.linalg.eigvalsh(A).flip(0)
    eps = torch.finfo(result.eigenvectors.dtype).eps
    size, slack = truth.abs().max(), 30 * eps * truth.abs().max()
    theta = result.eigenvalues
    assert result.converged
    assert result.reason.startswith("converged")
    assert theta.dtype == result.residual_norms.dtype == result.error_bounds.dtype == F64
    assert theta.shape == (k,)
    assert V.shape == (k, len(A))
    assert bool((theta.diff() <= 0).all())
    assert bool(((theta - truth[:k]).abs() <= tol * theta.abs() + slack).all()), (theta, truth[:k])
    assert bool((V @ V.t() - torch.eye(k)).abs().max() <= 300 * eps)  # drifts with restarts
    actual = torch.linalg.vector_norm(V @ A - theta[:, None] * V, dim=1)
    assert bool(((actual - result.residual_norms).abs() <= slack).all())
    assert bool((result.residual_norms <= tol * theta.abs() + 10 * eps * size).all())
    nearest = (theta[:, None] - truth).abs().min(1).values
    assert bool((nearest <= result.error_bounds + (0 if eps < 1e-10 else slack)).all())
    assert bool((result.error_bounds >= result.residual_norms).all())
