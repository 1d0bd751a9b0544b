"""What solvers claim about random operators: bounds hold, at every scale of the dtype, and every solve ends."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from matrices import F64, Dense, Solver, prescribed, with_top
from random_operators import SOLVERS, Case, bounded_above, cases, judge, refused, solve
from torch import Tensor

from sharpkern.eigen import WarmLanczos, certify, lanczos, lobpcg, power_iteration
from sharpkern.eigen.basis import Basis
from sharpkern.eigen.common import norms_of, unit_rows

COLD = [lanczos, lobpcg, power_iteration]


@settings(max_examples=300, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(cases(largest=40, most=25))
def test_error_bounds_hold_for_random_operators_and_starts(case: Case) -> None:
    """The short form of scripts/bounds_campaign.py."""
    op, truth, start = case.build()
    for name in SOLVERS:
        if name == "lobpcg" and case.n < 3:
            continue
        if refused(name, case):
            with pytest.raises(ValueError, match="rows must be finite and not zero"):
                solve(name, case, op, start)
            continue
        result = solve(name, case, op, start)
        assert judge(result, truth).covered, name
        assert bool((result.gap_estimates <= result.error_bounds).all()), name
    assert bounded_above(case, op, truth)


def scaled(exponent: int, dtype: torch.dtype) -> Dense:
    return Dense((2.0**exponent * prescribed(with_top(3.0, 2.5, -4.0, n=40))).to(dtype))


@pytest.mark.parametrize("solver", COLD)
@pytest.mark.parametrize(("dtype", "exponents"), [(torch.float32, (-100, 100)), (F64, (-900, -600, 600, 900))], ids=str)
def test_results_scale_as_the_operator_does(
    solver: Solver, dtype: torch.dtype, exponents: tuple[int, ...], seed: int
) -> None:
    """Powers of two do not round, so that only an under- or overflow within the solver could make a difference."""
    for exponent in exponents:
        torch.manual_seed(seed)
        want = solver(scaled(0, dtype), 2, tol=1e-2, max_matvecs=400)
        torch.manual_seed(seed)
        got = solver(scaled(exponent, dtype), 2, tol=1e-2, max_matvecs=400)
        assert got.converged
        assert got.matvecs == want.matvecs
        for name in ("eigenvalues", "residual_norms", "error_bounds", "gap_estimates"):
            assert torch.allclose(getattr(got, name), 2.0**exponent * getattr(want, name), rtol=1e-5, atol=0), name
        cosines = (got.eigenvectors * want.eigenvectors).double().sum(1).abs()  # LAPACK leaves the signs open
        assert cosines.tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-41, 1e-38, 1e-30, 1e-22, 1e30])
def test_a_tracked_float32_operator_of_any_size_ends_its_solves(size: float, k: int) -> None:
    A = (prescribed(with_top(3.0, 2.5, n=30)) * size).float()
    truth, solver = torch.linalg.eigvalsh(A.double()).flip(0), WarmLanczos(k, tol=0.01)
    for _ in range(3):
        result = solver.step(Dense(A))
        assert result.eigenvectors.isfinite().all()
        assert judge(result, truth).covered
        if size in (0.0, 1e-30, 1e-22, 1e30):
            assert torch.allclose(result.eigenvalues, truth[:k], rtol=0.01, atol=0)


@pytest.mark.parametrize("k", [1, 2])
def test_a_tracked_loss_that_converges_to_nothing_ends_its_solves(k: int) -> None:
    """Cross-entropy on separable data: the Hessian falls to zero, by way of subnormal numbers."""
    A, solver = prescribed(with_top(3.0, 2.0, 1.0, n=30)), WarmLanczos(k, tol=0.01)
    for power in [*range(0, 50, 2), 400]:
        result = solver.step(Dense((A * 10.0**-power).float()))
        assert result.eigenvectors.isfinite().all()
    assert result.eigenvalues.tolist() == [0.0] * k


def test_the_certificate_of_a_tiny_space_can_be_tracked() -> None:
    for n in (1, 2, 3, 4):
        A = prescribed(torch.randn(n, dtype=F64))
        top, solver = float(torch.linalg.eigvalsh(A)[-1]), WarmLanczos(tol=0.01)
        for _ in range(3):
            certificate = certify(Dense(A))
            assert top <= certificate.upper <= top + 1e-11
            value = float(solver.step(Dense(A), certificate.vector[None]).eigenvalues[0])
            assert value == pytest.approx(top, rel=1e-10)


@pytest.mark.parametrize("solver", COLD)
def test_a_start_that_is_a_null_vector_has_the_bound_of_the_operator_s_rounding(solver: Solver) -> None:
    """Its own product is zero but for rounding, and tells nothing of the norm that rounding is relative to."""
    a = torch.rand(5, 1, dtype=F64)
    op = Dense(a @ a.t())
    truth, Q = torch.linalg.eigh(op.A)
    result = solver(op, 1, tol=0.1, v0=Q[:, 1])
    assert float(result.error_bounds[0]) >= 1e-16
    assert judge(result, truth.flip(0)).covered


def test_a_start_at_a_lower_eigenvector_is_looked_beside_and_by_power_iteration_left() -> None:
    op = Dense(prescribed(with_top(3.0, 2.0, n=40)))
    lower = torch.linalg.eigh(op.A).eigenvectors[:, -2]
    assert [solver(op, 1, tol=1e-3, v0=lower).matvecs for solver in (lanczos, lobpcg)] == [2, 2]
    result = power_iteration(op, 1, tol=1e-3, v0=lower, max_matvecs=400)
    assert float(result.eigenvalues[0]) == pytest.approx(3.0, rel=1e-3)


def test_norms_and_unit_rows_are_right_from_the_smallest_to_the_largest_number() -> None:
    for dtype in (torch.float32, F64):
        finfo, n = torch.finfo(dtype), 7
        op = Dense(torch.zeros(n, n, dtype=dtype))
        row = torch.randn(n, dtype=F64)
        row /= row.abs().max()
        for size in (finfo.smallest_normal * 1e-3, finfo.smallest_normal, 1e-30, 1.0, 1e30, finfo.max / 4):
            rows = (row * size).to(dtype)[None]
            exact = math.hypot(*rows[0].tolist())  # scaled by itself
            assert float(norms_of(op, rows)[0]) == pytest.approx(exact, rel=4 * finfo.eps, abs=0)
            unit = unit_rows(op, rows)
            assert unit.dtype == dtype
            assert math.hypot(*unit[0].tolist()) == pytest.approx(1.0, rel=4 * finfo.eps)
            assert unit[0].tolist() == pytest.approx([x / exact for x in rows[0].tolist()], rel=4 * finfo.eps)
        assert float(norms_of(op, torch.zeros(1, n, dtype=dtype))[0]) == 0.0
        assert not unit_rows(op, torch.zeros(1, n, dtype=dtype)).any()


def test_a_basis_without_a_direction_left_says_so_instead_of_trying_for_ever() -> None:
    op = Dense(torch.eye(6, dtype=F64))
    basis = Basis(op, 4, torch.Generator().manual_seed(0))
    basis.extend(torch.randn(2, 6, dtype=F64))
    basis.Q[0] = math.nan  # as after a fault in a kernel
    with pytest.raises(torch.linalg.LinAlgError, match="no direction beside 2 vectors of length 6 in 20 tries"):
        basis.extend(torch.randn(1, 6, dtype=F64))


def test_a_float64_residual_whose_square_underflows_is_no_convergence() -> None:
    op = Dense(1e-200 * prescribed(with_top(3.0, 2.5, n=40)))
    result = lanczos(op, 1, tol=1e-6, max_matvecs=3)
    assert not result.converged
    V = result.eigenvectors
    true: Tensor = (V @ op.A - result.eigenvalues[:, None] * V) * 1e200
    assert float(result.residual_norms[0]) == pytest.approx(1e-200 * float(true.norm()), rel=1e-6)
