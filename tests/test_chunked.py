"""ChunkedHessian against the dense Hessian of all micro-batches' weighted loss."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from problems import Problem, dense_hessian, double, loss_and_gradient, mlp
from problems import relative as error
from torch import nn

import sharpkern as sk
from sharpkern.curvature.chunked import ChunkedHessian, MicroBatches
from sharpkern.rop.sandbox import random_state


def dense_sum(problem: Problem, parts: MicroBatches) -> torch.Tensor:
    return sum(w * dense_hessian(problem._replace(batch=b)) for w, b in zip(parts.weights, parts.batches, strict=True))


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_uneven_micro_batches_add_up_to_the_whole_batch(size: int) -> None:
    problem = double(mlp())
    loss, gradient = loss_and_gradient(problem)
    H = ChunkedHessian(problem.model, problem.loss_fn, MicroBatches.split(problem.batch, size))
    dense = dense_hessian(problem)
    V = torch.randn(H.n, 3, dtype=torch.float64)
    assert error(H.loss, loss.detach()) <= 1e-12
    assert error(H.gradient, gradient.detach()) <= 1e-10
    for _ in range(2):  # the second product starts from the micro-batch that the first one ended with
        assert error(H @ V, dense @ V) <= 1e-10
        assert error(H.quadratic_form(V), (V * (dense @ V)).sum(0)) <= 1e-10


def test_weights_are_the_loops_own_and_batches_may_change() -> None:
    problem = double(mlp())
    x, y = problem.batch
    H = ChunkedHessian(problem.model, problem.loss_fn, MicroBatches([problem.batch]))
    parts = MicroBatches([(x[:2], y[:2]), (x[2:], y[2:])], [0.5, 0.5])
    with torch.no_grad():
        next(problem.model.parameters()).add_(0.1)
    H.refresh(parts)
    V = torch.randn(H.n, 2, dtype=torch.float64)
    assert error(H @ V, dense_sum(problem, parts) @ V) <= 1e-10
    with torch.no_grad():
        next(problem.model.parameters()).add_(0.1)
    with pytest.raises(RuntimeError, match="call refresh"):
        H @ V


def test_noise_is_the_same_in_every_product_and_training_draws_as_without() -> None:
    x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    parts = MicroBatches.split((x, y), 2)
    torch.manual_seed(3)
    H = ChunkedHessian(model, nn.MSELoss(), parts)
    after = torch.get_rng_state()
    eye = torch.eye(H.n, dtype=torch.float64)
    dense = H @ eye
    assert torch.equal(torch.get_rng_state(), after)
    assert error(H @ eye, dense) <= 1e-12 and error(dense, dense.t()) <= 1e-10
    # The truth draws its masks in the same order: one forward pass per micro-batch.
    torch.manual_seed(3)
    total = torch.stack([nn.functional.mse_loss(model(a), b) for a, b in parts.batches]).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()), create_graph=True)])
    assert error(H.loss, total.detach()) <= 1e-12
    rows = [torch.autograd.grad(g, list(model.parameters()), retain_graph=True, allow_unused=True) for g in gradient]
    zeros = [torch.zeros_like(p) for p in model.parameters()]
    truth = torch.stack(
        [torch.cat([(z if r is None else r).flatten() for r, z in zip(row, zeros, strict=True)]) for row in rows]
    )
    assert error(dense, truth) <= 1e-10


def test_the_loops_own_noise_is_drawn_again() -> None:
    x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    parts, losses, states = [(x[:2], y[:2]), (x[2:], y[2:])], [], []
    for a, b in parts:
        states.append(random_state())
        losses.append(nn.functional.mse_loss(model(a), b) / 2)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(sum(losses), list(model.parameters()))])
    after = torch.get_rng_state()
    H = ChunkedHessian(model, nn.MSELoss(), MicroBatches(parts, [0.5, 0.5], random_states=states))
    assert torch.equal(torch.get_rng_state(), after)
    H.refresh()
    assert error(H.gradient, gradient) <= 1e-12 and error(H.loss, sum(losses).detach()) <= 1e-12
    with pytest.raises(ValueError, match="one random state for each of 2"):
        MicroBatches(parts, random_states=states[:1])


def test_running_statistics_move_as_in_accumulation() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    twin = copy.deepcopy(model)
    parts = MicroBatches.split((torch.randn(6, 3), torch.randn(6, 2)), 3)
    H = ChunkedHessian(model, nn.MSELoss(), parts, update_buffers=True)
    H.refresh(parts, update_buffers=True)
    H @ torch.randn(H.n)
    for _ in range(2):
        for x, _y in parts.batches:
            twin(x)
    for mine, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_every_solver_takes_it() -> None:
    problem = double(mlp())
    H = ChunkedHessian(problem.model, problem.loss_fn, MicroBatches.split(problem.batch, 4))
    top = torch.linalg.eigvalsh(dense_hessian(problem))[-1:]
    assert error(sk.lanczos(H, tol=1e-6).eigenvalues, top) <= 1e-6


def test_batches_that_cannot_be_cut_or_weighed_are_refused() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"lengths \[4, 3\]"):
        MicroBatches.split((x, x.t()), 2)
    with pytest.raises(ValueError, match="lengths"):
        MicroBatches.split((x[:0], x[:0]), 2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        MicroBatches.split((x, x), 0)
    with pytest.raises(ValueError, match="at least one batch"):
        MicroBatches([])
    with pytest.raises(ValueError, match="one weight for each of 1"):
        MicroBatches([(x, x)], [1.0, 2.0])
    with pytest.raises(ValueError, match="not all zero"):
        MicroBatches([(x, x)], [0.0])
    with pytest.raises(ValueError, match="no tensor with rows"):
        MicroBatches([(1, 2)])


_PEAK = """
import resource, sys, torch
import sharpkern as sk
from sharpkern.curvature.chunked import ChunkedHessian, MicroBatches

rows, size = int(sys.argv[1]), int(sys.argv[2])
layers = [m for _ in range(6) for m in (torch.nn.Linear(256, 256), torch.nn.Tanh())]
model, loss_fn = torch.nn.Sequential(*layers), torch.nn.MSELoss()
warm = torch.randn(8, 256), torch.randn(8, 256)
H = sk.HessianOperator(model, loss_fn, warm)
H @ torch.randn(H.n)
batch = torch.randn(rows, 256), torch.randn(rows, 256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
H = ChunkedHessian(model, loss_fn, MicroBatches.split(batch, size))
v = torch.randn(H.n)
for _ in range(3):
    H @ v
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_is_that_of_one_micro_batch() -> None:
    resource = pytest.importorskip("resource")  # not on Windows
    assert resource

    def peak(rows: int, size: int) -> int:
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _PEAK, str(rows), str(size)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return int(run.stdout)

    whole, chunked, one = peak(16384, 16384), peak(16384, 1024), peak(1024, 1024)
    assert whole > 300_000  # kilobytes: what there is to save
    assert chunked < 0.2 * whole
    assert chunked < 1.5 * one + 20_000
