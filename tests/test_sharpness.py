"""Sharpness in one call, against dense matrices."""

from __future__ import annotations

import torch
from problems import dense_hessian, double, loss_and_gradient, mlp
from problems import relative as error

import sharpkern as sk


def test_one_call_sharpness_and_preconditioned_sharpness() -> None:
    problem = double(mlp())
    dense = dense_hessian(problem)
    top = float(torch.linalg.eigvalsh(dense)[-1])
    r = sk.sharpness(*problem, tol=1e-6)
    assert r.converged and abs(r.value - top) <= 1e-9 * top + r.error_bound
    assert abs(r.value - top) <= 1e-6 * top
    assert error(dense @ r.vector, r.value * r.vector) <= 1e-4
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=0.01)
    r = sk.preconditioned_sharpness(*problem, optimizer, tol=1e-6)
    g = loss_and_gradient(problem)[1].detach()
    s = (0.1 * (g.abs() + 1e-8)) ** -0.5  # at t = 1, v / (1 - b2) is the squared gradient
    top = float(torch.linalg.eigvalsh(s[:, None] * dense * s)[-1])
    assert abs(r.value - top) <= 1e-5 * top
    assert not optimizer.state
    low = sk.sharpness(*problem, max_matvecs=2, tol=1e-9)
    assert not low.converged and low.matvecs == 2 and "max_matvecs" in low.reason
