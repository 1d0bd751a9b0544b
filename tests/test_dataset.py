"""DatasetHessian against the dense Hessian of all examples at once."""

from __future__ import annotations

import pytest
import torch
from problems import Problem, dense_hessian, double, mlp
from problems import relative as error
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sharpkern as sk


def half_sum(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return 0.5 * (output - target).square().sum()


def test_uneven_batches_give_the_hessian_of_the_mean() -> None:
    problem = double(mlp())
    x, y = problem.batch
    loader = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True)
    assert len(x) % 5
    A = sk.DatasetHessian(problem.model, problem.loss_fn, loader)
    dense = dense_hessian(problem)
    V = torch.randn(A.n, 3, dtype=torch.float64)
    assert error(A @ V, dense @ V) <= 1e-10
    assert error(A.matvec(V[:, 0]), dense @ V[:, 0]) <= 1e-10
    assert error(A.quadratic_form(V), (V * (dense @ V)).sum(0)) <= 1e-10
    with torch.no_grad():
        next(problem.model.parameters()).add_(0.1)
    assert error(A @ V, dense_hessian(problem) @ V) <= 1e-10
    result = sk.lanczos(A, tol=1e-6)
    assert error(result.eigenvalues, torch.linalg.eigvalsh(dense_hessian(problem))[-1:]) <= 1e-6


def test_sums_are_not_weighted() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(7, 3).double(), torch.randn(7, 2).double()
    A = sk.DatasetHessian(model, half_sum, [(x[:2], y[:2]), (x[2:], y[2:])], reduction="sum")
    V = torch.randn(A.n, 2, dtype=torch.float64)
    assert error(A @ V, dense_hessian(Problem(model, half_sum, (x, y))) @ V) <= 1e-10


def test_loaders_without_batches_are_refused() -> None:
    model, loss_fn, batch = mlp()
    with pytest.raises(ValueError, match="gives no batch"):
        sk.DatasetHessian(model, loss_fn, [])
    once = sk.DatasetHessian(model, loss_fn, iter([batch]))
    with pytest.raises(ValueError, match="not a generator"):
        once @ torch.randn(once.n)
    with pytest.raises(ValueError, match="'mean' or 'sum', got 'none'"):
        sk.DatasetHessian(model, loss_fn, [batch], reduction="none")


def test_dropout_is_the_same_in_every_product_and_takes_no_random_numbers() -> None:
    x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    A = sk.DatasetHessian(model, nn.MSELoss(), DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True))
    before = torch.get_rng_state()
    dense = A @ torch.eye(A.n, dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), before)
    assert error(A @ torch.eye(A.n, dtype=torch.float64), dense) <= 1e-12
    assert error(dense, dense.t()) <= 1e-10
