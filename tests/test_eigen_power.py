"""Power iteration on blocks: the largest algebraic eigenvalue, whatever the other end does."""

from __future__ import annotations

import pytest
import torch
from matrices import F64, SPECTRA, Dense, check, prescribed, with_top

from sharpkern.eigen import power_iteration


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("name", ["separated", "double top", "triple top", "larger negative end", "low rank"])
def test_power_iteration_finds_the_largest_algebraic_eigenvalues(name: str, k: int) -> None:
    op = Dense(prescribed(SPECTRA[name]()))
    result = power_iteration(op, k, tol=1e-4, max_matvecs=30_000)
    check(result, op.A, k, 1e-4)
    assert result.matvecs == op.products


def test_power_iteration_finds_the_least_negative_eigenvalue() -> None:
    values = torch.cat([torch.tensor([-1.0, -3.0], dtype=F64), -1.5 - torch.rand(40, dtype=F64)])
    op = Dense(prescribed(values))
    check(power_iteration(op, 1, tol=1e-4, max_matvecs=5000), op.A, 1, 1e-4)


@pytest.mark.parametrize("max_matvecs", [3, 9, 30, 90])
@pytest.mark.parametrize("k", [1, 2])
def test_power_iteration_never_calls_a_larger_negative_eigenvalue_converged(max_matvecs: int, k: int) -> None:
    op = Dense(prescribed(with_top(1.0, 0.6, -10.0)))
    result = power_iteration(op, k, tol=1e-2, max_matvecs=max_matvecs)
    assert op.products == result.matvecs <= max_matvecs
    assert not result.converged or float(result.eigenvalues[-1]) > 0.5


@pytest.mark.parametrize("k", [1, 2])
def test_a_start_near_a_larger_negative_eigenvector_has_not_converged(k: int) -> None:
    """Its residual is below tol and above rounding; only the shift tells that another eigenvalue is wanted."""
    op = Dense(prescribed(with_top(1.0, 0.6, -10.0)))
    lowest = torch.linalg.eigh(op.A)[1][:, 0]
    start = lowest + 1e-4 * torch.randn(len(lowest), dtype=F64)
    result = power_iteration(op, k, tol=1e-2, v0=start, max_matvecs=5000)
    check(result, op.A, k, 1e-2)
