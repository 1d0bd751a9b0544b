"""Solvers against float64 matrices of prescribed spectra."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sharpkern.eigen import EigenResult, lanczos, lobpcg, power_iteration
from sharpkern.eigen.basis import _TURNED_BYTES, Basis

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


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("name", SPECTRA)
def test_lanczos_finds_the_largest_algebraic_eigenvalues(name: str, k: int) -> None:
    op = Dense(prescribed(SPECTRA[name]()))
    result = lanczos(op, k, tol=1e-7, max_matvecs=1000)
    check(result, op.A, k, 1e-7)
    assert result.matvecs == op.products


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", [name for name in SPECTRA if name != "wide"])  # its lower end is lost in rounding
def test_both_ends_of_the_spectrum(name: str, k: int) -> None:
    op = Dense(prescribed(SPECTRA[name]()))
    truth = torch.linalg.eigvalsh(op.A).flip(0)
    slack = 1e-12 * truth.abs().max()
    for which, wanted in (("smallest", truth[-k:]), ("both", torch.cat([truth[:k], truth[-k:]]))):
        result = lanczos(op, k, tol=1e-7, max_matvecs=1000, which=which)
        assert result.converged
        theta, V = result.eigenvalues, result.eigenvectors
        assert bool(((theta - wanted).abs() <= 1e-7 * wanted.abs() + slack).all()), (which, theta, wanted)
        residuals = torch.linalg.vector_norm(V @ op.A - theta[:, None] * V, dim=1)
        assert bool(((residuals - result.residual_norms).abs() <= slack).all())


@pytest.mark.parametrize("which", ["largest", "smallest", "both"])
def test_error_estimates_hold_and_are_sharper_across_a_gap(which: str) -> None:
    op = Dense(prescribed(torch.cat([torch.tensor([3.0, 2.0, -2.0, -3.0], dtype=F64), bulk(60)])))
    values, vectors = torch.linalg.eigh(op.A)
    near = vectors[:, [0, 1, -2, -1]].T + 0.01 * torch.randn(4, 64, dtype=F64)  # the neighbours are in the basis
    result = lanczos(op, 1, tol=0.05, which=which, v0=near)
    errors = (result.eigenvalues[:, None] - values).abs().min(1).values
    assert result.converged
    assert bool((errors <= result.error_estimates).all())
    assert bool((result.error_estimates <= 0.3 * result.error_bounds).all())


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("name", ["separated", "clustered", "double top", "larger negative end", "low rank"])
def test_lobpcg_finds_the_largest_algebraic_eigenvalues(name: str, k: int) -> None:
    op = Dense(prescribed(SPECTRA[name]()))
    result = lobpcg(op, k, tol=1e-6, max_matvecs=5000)
    check(result, op.A, k, 1e-6)
    assert result.matvecs == op.products


def test_lobpcg_refuses_blocks_that_do_not_fit() -> None:
    op = Dense(prescribed(bulk(8)))
    with pytest.raises(ValueError, match="3k <= n = 8, got k = 3"):
        lobpcg(op, 3)
    with pytest.raises(ValueError, match="at most k = 1 rows, got 2"):
        lobpcg(op, 1, v0=torch.randn(2, 8, dtype=F64))


def test_a_random_start_seldom_stops_below_the_top_of_a_cluster() -> None:
    values = torch.cat([torch.tensor([7.29, 7.08, 6.59, 6.07, 5.61], dtype=F64), 2.5 * torch.rand(2000, dtype=F64)])
    op = Dense(torch.diag(values))
    found = [lanczos(op, tol=1e-3, generator=torch.Generator().manual_seed(s)).eigenvalues[0] for s in range(60)]
    assert sum(bool(f < 7.28) for f in found) <= 1


def test_unknown_end_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'lowest', k = 1"):
        lanczos(Dense(prescribed(bulk(8))), 1, which="lowest")
    with pytest.raises(ValueError, match="2k <= n = 8"):
        lanczos(Dense(prescribed(bulk(8))), 5, which="both")


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("name", ["separated", "double top", "triple top", "larger negative end", "low rank"])
def test_power_iteration_finds_the_largest_algebraic_eigenvalues(name: str, k: int) -> None:
    op = Dense(prescribed(SPECTRA[name]()))
    result = power_iteration(op, k, tol=1e-4, max_matvecs=30_000)
    check(result, op.A, k, 1e-4)
    assert result.matvecs == op.products


@pytest.mark.parametrize("solver", [lanczos, power_iteration])
@pytest.mark.parametrize("name", ["negative definite", "ends of equal size"])
def test_the_top_is_found_where_magnitudes_mislead(solver: Solver, name: str) -> None:
    op = Dense(prescribed(SPECTRA[name]()))
    check(solver(op, 1, tol=1e-3, max_matvecs=30_000), op.A, 1, 1e-3)


def test_a_start_on_a_negative_eigenvector_ten_times_larger_is_left() -> None:
    op = Dense(prescribed(with_top(1.0, 0.6, -10.0)))
    bottom = torch.linalg.eigh(op.A).eigenvectors[:, 0]
    check(power_iteration(op, 1, tol=1e-4, v0=bottom, max_matvecs=5000), op.A, 1, 1e-4)
    start = torch.stack([bottom, torch.randn(67, dtype=F64)])
    check(lanczos(op, 1, tol=1e-4, v0=start), op.A, 1, 1e-4)


def test_power_iteration_finds_the_least_negative_eigenvalue() -> None:
    values = torch.cat([torch.tensor([-1.0, -3.0], dtype=F64), -1.5 - torch.rand(40, dtype=F64)])
    op = Dense(prescribed(values))
    check(power_iteration(op, 1, tol=1e-4, max_matvecs=5000), op.A, 1, 1e-4)


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


@pytest.mark.parametrize("max_matvecs", [3, 9, 30, 90])
@pytest.mark.parametrize("k", [1, 2])
def test_power_iteration_never_calls_a_larger_negative_eigenvalue_converged(max_matvecs: int, k: int) -> None:
    op = Dense(prescribed(with_top(1.0, 0.6, -10.0)))
    result = power_iteration(op, k, tol=1e-2, max_matvecs=max_matvecs)
    assert op.products == result.matvecs <= max_matvecs
    assert not result.converged or float(result.eigenvalues[-1]) > 0.5


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


def test_an_invariant_start_is_left_through_random_vectors() -> None:
    values = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.5], dtype=F64)
    op = Dense(torch.diag(values))
    start = torch.zeros(6, dtype=F64)
    start[[2, 3]] = 1.0  # spans an invariant plane
    result = lanczos(op, 1, tol=1e-10, v0=torch.stack([start, start]))
    check(result, op.A, 1, 1e-10)


@settings(max_examples=40, deadline=None, database=None)
@given(
    values=st.lists(st.floats(-100, 100).map(lambda x: round(x, 9)), min_size=1, max_size=14),
    k=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_lanczos_agrees_with_a_dense_solver_on_any_spectrum(values: list[float], k: int, seed: int) -> None:
    torch.manual_seed(seed)
    k = min(k, len(values))
    op = Dense(prescribed(torch.tensor(values, dtype=F64)))
    check(lanczos(op, k, tol=1e-9, generator=torch.Generator().manual_seed(seed)), op.A, k, 1e-9)


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


def test_matvecs_run_out_with_a_reason() -> None:
    op = Dense(prescribed(SPECTRA["flat"]()))
    for solver in (lanczos, power_iteration):
        op.products = 0
        result = solver(op, 2, tol=1e-12, max_matvecs=11)
        assert not result.converged
        assert op.products == result.matvecs <= 11
        assert "stopped at max_matvecs=11" in result.reason
        assert "tol was 1.0e-12" in result.reason


@pytest.mark.parametrize("max_basis", [5, 8, 13])
def test_restarts_bound_the_memory_and_keep_the_answer(max_basis: int) -> None:
    op = Dense(prescribed(torch.linspace(-1, 1, 83, dtype=F64) ** 3))
    widest = 0

    class Watched(Dense):
        def matmat(self, V: Tensor) -> Tensor:
            nonlocal widest
            widest = max(widest, V.shape[1])
            return super().matmat(V)

    result = lanczos(Watched(op.A), 2, tol=1e-8, max_matvecs=2000, max_basis=max_basis)
    check(result, op.A, 2, 1e-8)
    assert widest == 2
    assert result.matvecs > 2 * max_basis


def test_many_restarts_in_single_precision_keep_the_residual_honest() -> None:
    A = prescribed(torch.linspace(0, 1, 301, dtype=F64) ** 2).float()
    result = lanczos(Dense(A), 1, tol=1e-4, max_matvecs=2000, max_basis=6)
    check_residual = torch.linalg.vector_norm(
        A.double() @ result.eigenvectors[0].double() - result.eigenvalues * result.eigenvectors[0].double()
    )
    assert result.matvecs > 30
    assert float((check_residual - result.residual_norms).abs()) <= 2e-5
    assert float((1 - result.eigenvectors.double().norm()).abs()) <= 1e-5


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


def test_every_row_of_a_warm_block_is_used() -> None:
    A = prescribed(with_top(5.0, 4.9, 3.5, n=80))
    vectors = torch.linalg.eigh(A).eigenvectors.t()
    start = torch.stack([vectors[3], 1e4 * vectors[-1], 1e-3 * vectors[9]])  # the top one is not the first
    result = lanczos(Dense(A), 1, v0=start)
    check(result, A, 1, 1e-3)
    assert result.matvecs == 3
    assert lanczos(Dense(A), 1, v0=vectors[-1]).matvecs == 1


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


def test_lanczos_spends_about_what_arpack_spends() -> None:
    for name in ("separated", "clustered", "larger negative end", "flat"):
        op = Dense(prescribed(SPECTRA[name]()))
        mine = lanczos(op, 1, tol=1e-6).matvecs
        view = scipy.sparse.linalg.LinearOperator(
            op.A.shape,
            matvec=lambda x, op=op: op.matmat(torch.as_tensor(x)[:, None])[:, 0].numpy(),
            dtype=float,
        )
        op.products = 0
        start = np.random.default_rng(0).standard_normal(op.n)
        scipy.sparse.linalg.eigsh(view, 1, which="LA", tol=1e-6, v0=start)
        assert mine <= 1.3 * op.products + 5


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
