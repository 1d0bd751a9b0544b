"""LOBPCG against float64 matrices of prescribed spectra."""

from __future__ import annotations

import pytest
import torch
from matrices import F64, SPECTRA, Dense, bulk, check, prescribed

from sharpkern.eigen import lanczos, lobpcg
from sharpkern.eigen.basis import Basis


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


def test_lobpcg_spends_far_fewer_products_than_steepest_ascent() -> None:
    """The part of X that the last step added is what makes it a conjugate method."""
    op = Dense(prescribed(torch.linspace(0, 1, 60, dtype=F64) ** 2))
    top = float(torch.linalg.eigvalsh(op.A)[-1])
    results = [lobpcg(op, 1, tol=1e-5, max_matvecs=2000, generator=g(i)) for i in range(5)]
    assert all(float(r.eigenvalues[0]) == pytest.approx(top, rel=1e-5) for r in results)
    # Of five starts each, for one of them may be lucky.
    assert sum(r.matvecs for r in results) <= 0.5 * sum(ascent_products(op.A) for _ in range(5))


def ascent_products(A: torch.Tensor) -> int:
    """Count the products of steepest ascent from a random start to a relative residual of 1e-5."""
    x, products = torch.randn(len(A), dtype=F64), 0
    while True:
        products += 1
        x = x / x.norm()
        theta = x @ A @ x
        r = A @ x - theta * x
        if float(r.norm()) <= 1e-5 * float(theta):
            return products
        plane = torch.linalg.qr(torch.stack([x, r], 1))[0]
        x = plane @ torch.linalg.eigh(plane.t() @ A @ plane).eigenvectors[:, -1]


def test_lobpcg_spends_no_more_than_three_times_lanczos() -> None:
    op = Dense(prescribed(torch.linspace(0, 1, 60, dtype=F64) ** 2))
    spent = [lobpcg(op, 1, tol=1e-5, max_matvecs=2000, generator=g(i)).matvecs for i in range(5)]
    krylov = [lanczos(op, 1, tol=1e-4, max_matvecs=2000, generator=g(i)).matvecs for i in range(5)]  # to a tenth of it
    assert sum(spent) <= 1.6 * sum(krylov)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_what_is_kept_spans_the_last_block_and_the_one_before(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Knyazev's three terms: the conjugate directions are what leads back from the new block to the old one."""
    missing, restart = [], Basis.restart

    def recorded(basis: Basis, Y: torch.Tensor) -> None:
        before = basis.Q[:k].clone()
        restart(basis, Y)
        kept = basis.Q[: basis.size]
        if basis.size > k:
            missing.append(float((before - before @ kept.T @ kept).norm()))

    monkeypatch.setattr(Basis, "restart", recorded)
    lobpcg(Dense(prescribed(torch.linspace(0, 1, 60, dtype=F64))), k, tol=1e-4, max_matvecs=1000)
    assert len(missing) > 5
    assert max(missing) <= 1e-6


def g(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_lobpcg_stops_within_its_products_and_counts_them() -> None:
    op = Dense(prescribed(SPECTRA["flat"]()))
    for most in (2, 3, 11, 12):
        op.products = 0
        result = lobpcg(op, 2, tol=1e-12, max_matvecs=most)
        assert most - 1 <= op.products == result.matvecs <= most
        assert not result.converged
