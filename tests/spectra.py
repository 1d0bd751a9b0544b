"""What the tests of the spectrum share: matrices as operators, and a model with a spectrum as after some training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from problems import Problem, dense_hessian, randomise
from torch import Tensor, nn

F64 = torch.float64


class Matrix:
    """A matrix as an operator that counts its products."""

    def __init__(self, A: Tensor) -> None:
        self.A, self.n, self.dtype, self.device = A, len(A), A.dtype, A.device
        self.products = 0

    def matmat(self, V: Tensor) -> Tensor:
        self.products += V.shape[1]
        return self.A @ V


class Diagonal(Matrix):
    """A diagonal matrix, for sizes that no dense one has."""

    def matmat(self, V: Tensor) -> Tensor:
        self.products += V.shape[1]
        return self.A[:, None] * V


def outliers_and_bulk(n: int) -> Tensor:
    """A random symmetric float64 matrix with a few large eigenvalues of both signs, as a Hessian has."""
    values = torch.cat([torch.tensor([20.0, 10.0, 5.0, -3.0], dtype=F64), 0.1 * torch.randn(n - 4, dtype=F64)])
    Q = torch.linalg.qr(torch.randn(n, n, dtype=F64))[0]
    A = Q * values @ Q.t()
    return (A + A.t()) / 2


def trained() -> tuple[Problem, Tensor]:
    """A network of 841 float64 parameters after thirty steps of Adam, with its Hessian by double backward."""
    model = randomise(nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 24), nn.GELU(), nn.Linear(24, 3)))
    problem = Problem(model.double(), F.cross_entropy, (torch.randn(64, 12, dtype=F64), torch.randint(0, 3, (64,))))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        problem.loss_fn(model(problem.batch[0]), problem.batch[1]).backward()
        optimizer.step()
    model.zero_grad()
    A = dense_hessian(problem)
    return problem, (A + A.t()) / 2
