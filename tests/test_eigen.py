"""What all solvers have in common, against float64 matrices of prescribed spectra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import F64, SPECTRA, Dense, Solver, check, prescribed, with_top
from torch import Tensor

from sharpkern.eigen import lanczos, power_iteration


@pytest.mark.parametrize("solver", [lanczos, power_iteration])
@pytest.mark.parametrize("name", ["negative definite", "ends of equal size"])
def test_the_top_is_found_where_magnitudes_mislead(solver: Solver, name: str) -> None:
    op = Dense(prescribed(SPECTRA[name]()))
    check(solver(op, 1, tol=1e-3, max_matvecs=30_000), op.A, 1, 1e-3)


@pytest.mark.parametrize("solver", [lanczos, power_iteration])
def test_the_tolerance_is_relative_for_negative_eigenvalues_too(solver: Solver) -> None:
    op = Dense(prescribed(torch.cat([torch.tensor([-1.0], dtype=F64), -2.0 - torch.rand(70, dtype=F64)])))
    loose, tight = (solver(op, 1, tol=tol, max_matvecs=5000) for tol in (1e-2, 1e-9))
    check(loose, op.A, 1, 1e-2)
    check(tight, op.A, 1, 1e-9)
    assert loose.matvecs < tight.matvecs


@pytest.mark.parametrize("solver", [lanczos, power_iteration])
def test_a_short_start_is_filled_up_with_random_vectors(solver: Solver) -> None:
    op = Dense(prescribed(SPECTRA["triple top"]()))
    check(solver(op, 3, tol=1e-4, v0=torch.randn(67, dtype=F64), max_matvecs=5000), op.A, 3, 1e-4)


def test_nearly_dependent_starts_are_orthonormalised_fully() -> None:
    op = Dense(prescribed(with_top(3.0, 2.5, 2.0)))
    x, y, z = torch.randn(3, 67, dtype=F64)
    for solver, tol in ((lanczos, 1e-8), (power_iteration, 1e-4)):
        check(solver(op, 3, tol, torch.stack([x, x + 1e-9 * y, x - 1e-9 * z]), 5000), op.A, 3, tol)


@pytest.mark.parametrize("solver", [lanczos, power_iteration])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_single_precision_reaches_a_moderate_tolerance(solver: Solver, dtype: torch.dtype) -> None:
    A = prescribed(with_top(30.0, 20.0, -15.0, n=203)).to(dtype)
    result = solver(Dense(A), 2, tol=1e-4, max_matvecs=3000)
    assert result.eigenvectors.dtype == dtype
    check(result, A, 2, 1e-4)


@pytest.mark.parametrize("solver", [lanczos, power_iteration])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_all_eigenvalues_of_a_small_matrix(solver: Solver, n: int) -> None:
    op = Dense(prescribed(torch.randn(n, dtype=F64)))
    result = solver(op, n, tol=1e-8)
    check(result, op.A, n, 1e-8)
    assert result.matvecs <= 2 * n


@pytest.mark.parametrize("solver", [lanczos, power_iteration])
@pytest.mark.parametrize("k", [1, 4])
def test_zero_matrix_has_zero_eigenvalues(solver: Solver, k: int) -> None:
    result = solver(Dense(torch.zeros(9, 9, dtype=F64)), k)
    assert result.converged
    assert result.eigenvalues.tolist() == result.residual_norms.tolist() == [0.0] * k


@pytest.mark.parametrize("solver", [lanczos, power_iteration])
def test_multiple_of_the_identity_has_one_eigenvalue_k_times(solver: Solver) -> None:
    op = Dense(-2.5 * torch.eye(30, dtype=F64))
    check(solver(op, 4), op.A, 4, 1e-3)


@settings(max_examples=25, deadline=None, database=None)
@given(seed=st.integers(0, 2**31), n=st.integers(50, 90), max_matvecs=st.integers(1, 60))
def test_an_unfinished_result_still_holds_its_bound(seed: int, n: int, max_matvecs: int) -> None:
    torch.manual_seed(seed)
    op = Dense(prescribed(torch.randn(n, dtype=F64)))
    truth = torch.linalg.eigvalsh(op.A)
    for solver in (lanczos, power_iteration):
        result = solver(op, 1, tol=1e-12, max_matvecs=max_matvecs)
        assert result.matvecs <= max_matvecs
        theta, bound = float(result.eigenvalues[0]), float(result.error_bounds[0])
        assert theta <= float(truth[-1]) + 1e-12
        assert float((truth - theta).abs().min()) <= bound


def test_warm_start_spends_fewer_products() -> None:
    for _ in range(3):
        A = prescribed(with_top(5.0, 4.0, 3.5, n=150))
        E = torch.randn(150, 150, dtype=F64) * 2e-3
        cold = lanczos(Dense(A), 2, tol=1e-3)
        moved = Dense(A + E + E.t())
        warm = lanczos(moved, 2, tol=1e-3, v0=cold.eigenvectors)
        check(warm, moved.A, 2, 1e-3)
        assert warm.matvecs <= 0.8 * lanczos(moved, 2, tol=1e-3).matvecs
        block = power_iteration(moved, 2, tol=1e-3, v0=cold.eigenvectors, max_matvecs=2000)
        assert block.matvecs < power_iteration(moved, 2, tol=1e-3, max_matvecs=2000).matvecs


def test_strided_and_differentiable_starts_are_accepted() -> None:
    A = prescribed(with_top(5.0, 4.0, n=40))
    start = torch.randn(40, 2, dtype=F64, requires_grad=True).t()
    for solver in (lanczos, power_iteration):
        result = solver(Dense(A.clone().requires_grad_()), 2, v0=start)
        check(result, A, 2, 1e-3)
        assert not result.eigenvectors.requires_grad


def test_results_are_reproducible_and_follow_the_generator() -> None:
    op = Dense(prescribed(SPECTRA["clustered"]()))
    for solver in (lanczos, power_iteration):
        first, again = (solver(op, 2, max_matvecs=20) for _ in range(2))
        assert torch.equal(first.eigenvectors, again.eigenvectors)
        a, b = (solver(op, 2, max_matvecs=20, generator=torch.Generator().manual_seed(5)) for _ in range(2))
        assert torch.equal(a.eigenvectors, b.eigenvectors)
        assert not torch.equal(a.eigenvectors, first.eigenvectors)


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    lanczos(Dense(prescribed_fixed()), 2)
    power_iteration(Dense(prescribed_fixed()), 2)
    assert torch.equal(before, torch.get_rng_state())


def prescribed_fixed() -> Tensor:
    return torch.diag(torch.arange(1.0, 13.0, dtype=F64))


def test_a_start_on_a_negative_eigenvector_ten_times_larger_is_left() -> None:
    op = Dense(prescribed(with_top(1.0, 0.6, -10.0)))
    bottom = torch.linalg.eigh(op.A).eigenvectors[:, 0]
    check(power_iteration(op, 1, tol=1e-4, v0=bottom, max_matvecs=5000), op.A, 1, 1e-4)
    start = torch.stack([bottom, torch.randn(67, dtype=F64)])
    check(lanczos(op, 1, tol=1e-4, v0=start), op.A, 1, 1e-4)


def test_matvecs_run_out_with_a_reason() -> None:
    op = Dense(prescribed(SPECTRA["flat"]()))
    for solver in (lanczos, power_iteration):
        op.products = 0
        result = solver(op, 2, tol=1e-12, max_matvecs=11)
        assert not result.converged
        assert op.products == result.matvecs <= 11
        assert "stopped at max_matvecs=11" in result.reason
        assert "tol was 1.0e-12" in result.reason
