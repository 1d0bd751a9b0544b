"""Lanczos with restarts: both ends, restarts, estimates, what it spends."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import F64, SPECTRA, Dense, bulk, check, prescribed, with_top
from torch import Tensor

from sharpkern.eigen import lanczos


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
def test_gap_estimates_hold_and_are_sharper_across_a_gap(which: str) -> None:
    op = Dense(prescribed(torch.cat([torch.tensor([3.0, 2.0, -2.0, -3.0], dtype=F64), bulk(60)])))
    values, vectors = torch.linalg.eigh(op.A)
    near = vectors[:, [0, 1, -2, -1]].T + 0.01 * torch.randn(4, 64, dtype=F64)  # the neighbours are in the basis
    result = lanczos(op, 1, tol=0.05, which=which, v0=near)
    errors = (result.eigenvalues[:, None] - values).abs().min(1).values
    assert result.converged
    assert bool((errors <= result.gap_estimates).all())
    assert bool((result.gap_estimates <= 0.3 * result.error_bounds).all())


def test_a_random_start_seldom_stops_below_the_top_of_a_cluster() -> None:
    values = torch.cat([torch.tensor([7.29, 7.08, 6.59, 6.07, 5.61], dtype=F64), 2.5 * torch.rand(2000, dtype=F64)])
    op = Dense(torch.diag(values))
    found = [lanczos(op, tol=1e-3, generator=torch.Generator().manual_seed(s)).eigenvalues[0] for s in range(60)]
    assert sum(bool(f < 7.28) for f in found) <= 1


def test_a_random_start_is_held_to_a_tenth_of_the_tolerance() -> None:
    op = Dense(prescribed(with_top(3.0, 2.9, 2.0)))
    for seed in range(20):  # the last step overshoots the goal by a random factor, seldom by ten
        result = lanczos(op, tol=0.1, generator=torch.Generator().manual_seed(seed))
        assert float(result.residual_norms[0]) <= 0.01 * float(result.eigenvalues[0]) * (1 + 1e-9)
    loose = lanczos(op, tol=0.1, v0=torch.randn(67, dtype=F64))
    assert loose.matvecs < lanczos(op, tol=0.1).matvecs


def test_a_restart_keeps_enough_to_lose_little_of_what_an_unlimited_basis_gains() -> None:
    """With half of the basis kept, a tenth more products; with an eighth, four tenths."""
    op = Dense(prescribed(torch.linspace(0, 1, 300, dtype=F64)))

    def spent(max_basis: int) -> int:
        generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
        return sum(
            lanczos(op, tol=1e-6, max_matvecs=5000, max_basis=max_basis, generator=g).matvecs for g in generators
        )

    assert spent(16) <= 1.25 * spent(300)


def test_a_random_start_that_ran_out_of_products_within_the_tolerance_has_converged() -> None:
    op, between = Dense(prescribed(with_top(3.0, 2.9, 2.0))), 0
    for most in range(2, 40):
        result = lanczos(op, tol=0.1, max_matvecs=most)
        v, theta = result.eigenvectors[0], result.eigenvalues[0]
        size = float((op.A @ v - theta * v).norm() / theta)
        assert result.converged == (size <= 0.1)
        between += 0.01 < size <= 0.1
    assert between > 0


def test_a_basis_that_was_given_only_the_wanted_shows_no_gap() -> None:
    op = Dense(prescribed(bulk(30)))
    result = lanczos(op, 2, tol=1e-6, v0=torch.randn(2, 30, dtype=F64), max_matvecs=2)
    assert torch.equal(result.gap_estimates, result.error_bounds)
    assert bool((result.gap_estimates > 1e-3).all())


def test_a_basis_of_the_whole_space_has_gap_estimates_of_rounding_size() -> None:
    result = lanczos(Dense(prescribed(torch.randn(40, dtype=F64))), 40, tol=0.9, max_matvecs=40)
    assert bool((result.gap_estimates <= 1e-12).all())
    # No eigenvalue is left that could lie in between: the residuals play no part.
    assert bool((result.gap_estimates == result.gap_estimates[0]).all())
    assert bool((result.gap_estimates < result.error_bounds).any())


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


def test_every_row_of_a_warm_block_is_used() -> None:
    A = prescribed(with_top(5.0, 4.9, 3.5, n=80))
    vectors = torch.linalg.eigh(A).eigenvectors.t()
    start = torch.stack([vectors[3], 1e4 * vectors[-1], 1e-3 * vectors[9]])  # the top one is not the first
    result = lanczos(Dense(A), 1, v0=start)
    check(result, A, 1, 1e-3)
    assert result.matvecs == 3
    assert lanczos(Dense(A), 1, v0=vectors[-1]).matvecs == 2  # its own, and a look at a random vector


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


def test_unknown_end_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'lowest', k = 1"):
        lanczos(Dense(prescribed(bulk(8))), 1, which="lowest")
    with pytest.raises(ValueError, match="2k <= n = 8"):
        lanczos(Dense(prescribed(bulk(8))), 5, which="both")
