"""Arguments and operators that a solver cannot use are refused, with their values."""

from __future__ import annotations

import pytest
import torch
from matrices import F64, SPECTRA, Dense, Solver, prescribed
from torch import Tensor

from sharpkern.eigen import lanczos, power_iteration
from sharpkern.eigen.common import rounding_level
from sharpkern.eigen.stopping import allowed_norms, reason_of


@pytest.mark.parametrize("solver", [lanczos, power_iteration])
def test_a_product_that_is_not_finite_is_named(solver: Solver) -> None:
    class Breaking(Dense):
        def matmat(self, V: Tensor) -> Tensor:
            result = super().matmat(V)
            if self.products >= 7:
                result[3, 6 - self.products] = float("nan")  # the seventh column
            return result

    op = Breaking(prescribed(SPECTRA["flat"]()))
    with pytest.raises(RuntimeError, match="product 7 of the operator is not finite"):
        solver(op, 2, tol=1e-10)


@pytest.mark.parametrize("solver", [lanczos, power_iteration])
def test_an_overflow_is_named(solver: Solver) -> None:
    op = Dense(torch.full((30, 30), 3e38))  # its eigenvalue is 30 times as large
    with pytest.raises(
        RuntimeError, match=r"product \d of the operator is not finite: .* above 3.4e\+38, the largest of f"
    ):
        solver(op, 1, v0=torch.ones(1, 30))


def test_an_asymmetric_operator_is_not_called_converged() -> None:
    A = torch.randn(12, 12, dtype=F64)
    result = lanczos(Dense(A), 1, tol=1e-6)
    assert not result.converged
    assert "not symmetric" in result.reason


def test_an_operator_of_the_wrong_shape_is_refused() -> None:
    class Wrong(Dense):
        def matmat(self, V: Tensor) -> Tensor:
            return V[:, :1][:5]

    with pytest.raises(ValueError, match=r"must map \[9, 2\] to the same shape, got \[5, 1\]"):
        lanczos(Wrong(torch.eye(9, dtype=F64)), 2)


@pytest.mark.parametrize("solver", [lanczos, power_iteration])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must lie between 1 and n = 6, got 0"),
        ({"k": 7}, "k must lie between 1 and n = 6, got 7"),
        ({"tol": 0.0}, "tol must be positive, got 0.0"),
        ({"tol": float("nan")}, "tol must be positive, got nan"),
        ({"k": 3, "max_matvecs": 2}, "max_matvecs must be at least k = 3, got 2"),
        ({"v0": torch.ones(5, dtype=F64)}, r"v0 must be \[6\] or \[m, 6\], got \[5\]"),
        ({"v0": torch.ones(1, 1, 6, dtype=F64)}, r"got \[1, 1, 6\]"),
        ({"v0": torch.ones(0, 6, dtype=F64)}, r"got \[0, 6\]"),
        ({"v0": torch.ones(6)}, "v0 must be torch.float64 on cpu, got torch.float32 on cpu"),
        ({"v0": torch.ones(6, dtype=F64, device="meta")}, "got torch.float64 on meta"),
        ({"v0": torch.zeros(6, dtype=F64)}, r"not zero; their lengths are \[0.0\]"),
        ({"v0": torch.full((6,), float("inf"), dtype=F64)}, r"finite .* their lengths are \[inf\]"),
        ({"v0": torch.full((6,), float("nan"), dtype=F64)}, r"finite .* their lengths are \[nan\]"),
    ],
)
def test_bad_arguments_are_refused_with_their_values(solver: Solver, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solver(Dense(torch.eye(6, dtype=F64)), **options)


def test_starts_and_bases_that_do_not_fit_are_refused() -> None:
    op = Dense(torch.eye(6, dtype=F64))
    with pytest.raises(ValueError, match="v0 must have at most k = 2 rows, got 3"):
        power_iteration(op, 2, v0=torch.randn(3, 6, dtype=F64))
    with pytest.raises(ValueError, match="at most max_matvecs = 2 and n = 6 rows, got 3"):
        lanczos(op, 2, v0=torch.randn(3, 6, dtype=F64), max_matvecs=2)
    with pytest.raises(ValueError, match="max_basis must be at least 4, got 3"):
        lanczos(op, 2, max_basis=3)


def test_rounding_of_products_of_subnormal_numbers_is_covered() -> None:
    """Below the normal numbers the error of an element does not shrink with it."""
    for _ in range(20):
        A, q = (1e-42 * torch.randn(50, 50, dtype=torch.float64)).float(), torch.randn(50)
        q /= q.norm()
        exact = A.double() @ q.double()
        error = float(((A @ q).double() - exact).norm())
        assert 0 < error <= rounding_level(Dense(A), float(exact.norm()))


@pytest.mark.parametrize("done", [True, False])
def test_the_reason_tells_of_the_pair_that_is_furthest_from_its_tolerance(done: bool) -> None:
    norms, theta = torch.tensor([0.03, 0.02, 0.01], dtype=F64), torch.tensor([9.0, 0.5, -4.0], dtype=F64)
    told = "residual norm 2.0e-02 at eigenvalue 0.5; tol was 1.0e-01"
    want = f"converged: {told}." if done else f"stopped at max_matvecs=7, {told}: raise max_matvecs or tol."
    assert reason_of(done, norms, theta, 0.1, 7) == want


def test_a_residual_of_rounding_size_is_allowed_whatever_the_eigenvalue() -> None:
    theta = torch.tensor([2.0, 1e-9, 0.0, -5.0], dtype=F64)
    assert allowed_norms(theta, 0.1, 1e-3).tolist() == pytest.approx([0.2, 1e-3, 1e-3, 0.5])


@pytest.mark.parametrize(("which", "k", "least"), [("largest", 1, 3), ("both", 2, 6)])
def test_a_basis_that_is_too_short_for_a_restart_is_refused(which: str, k: int, least: int) -> None:
    op = Dense(prescribed(SPECTRA["flat"]()))
    with pytest.raises(ValueError, match=f"max_basis must be at least {least}, got {least - 1}"):
        lanczos(op, k, which=which, max_basis=least - 1)
