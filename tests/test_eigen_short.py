"""Short solves: what a handful of products makes of a matrix, against dense Rayleigh-Ritz and dense eigenvalues."""

from __future__ import annotations

import pytest
import torch
from matrices import F64, Dense, prescribed, with_top
from test_eigen_warm import turning

from sharpkern.eigen import ShortLanczos, WarmLanczos


def started(A: torch.Tensor, tol: float = 1e-6) -> ShortLanczos:
    solver = ShortLanczos(tol=tol)
    solver.step(Dense(A))
    return solver


@pytest.mark.parametrize("products", [1, 2, 4, 6])
def test_a_solve_is_rayleigh_ritz_on_the_krylov_space_of_its_start(products: int) -> None:
    A, B = turning(2, 0.3)
    solver = started(A)
    x = solver.state_dict()["block"][0]
    op = Dense(B)
    result = solver.step(op, at_most=products)
    assert op.products == result.matvecs == products
    krylov = torch.linalg.qr(torch.stack([torch.linalg.matrix_power(B, i) @ x for i in range(products)], 1))[0]
    theta, U = torch.linalg.eigh(krylov.T @ B @ krylov)
    v = krylov @ U[:, -1]
    assert float(result.eigenvalues[0]) == pytest.approx(float(theta[-1]), rel=1e-9)
    assert abs(float(result.eigenvectors[0] @ v)) == pytest.approx(1, abs=1e-7)
    assert solver.start_value == pytest.approx(float(x @ B @ x), rel=1e-9)
    residual = float(torch.linalg.vector_norm(B @ v - theta[-1] * v))
    assert float(result.residual_norms[0]) == pytest.approx(residual, rel=1e-5)
    assert not result.converged and f"max_matvecs={products}" in result.reason
    after = solver.state_dict()["block"][0]
    assert abs(float(after @ (B @ v))) == pytest.approx(float(torch.linalg.vector_norm(B @ v)), rel=1e-7)


def test_float32_solves_lose_no_more_than_rounding() -> None:
    A, B = (M.float() for M in turning(2, 0.1))
    solver = started(A, tol=1e-4)
    x = solver.state_dict()["block"][0].double()
    result = solver.step(Dense(B), at_most=3)
    krylov = torch.linalg.qr(torch.stack([x, B.double() @ x, B.double() @ (B.double() @ x)], 1))[0]
    best = float(torch.linalg.eigvalsh(krylov.T @ B.double() @ krylov)[-1])
    assert float(result.eigenvalues[0]) <= best * (1 + 1e-6)
    assert float(result.eigenvalues[0]) == pytest.approx(best, rel=1e-5)
    assert result.eigenvectors.dtype == torch.float32
    assert float(torch.linalg.vector_norm(result.eigenvectors)) == pytest.approx(1, abs=1e-5)


def test_it_stops_at_tol_and_its_interval_holds_an_eigenvalue() -> None:
    solver = ShortLanczos(tol=0.02)
    for t, A in enumerate(turning(40)):
        result = solver.step(Dense(A), at_most=6 if t else None)
        values = torch.linalg.eigvalsh(A)
        assert float((values - result.eigenvalues[0]).abs().min()) <= float(result.error_bounds[0])
        assert float(result.eigenvalues[0]) <= float(values[-1]) * (1 + 1e-9)
        assert result.converged == bool(result.residual_norms[0] <= 0.02 * result.eigenvalues[0])
        assert result.converged or result.matvecs == 6
    A = next(turning(1))
    solver = started(A)
    assert solver.step(Dense(A), at_most=6).matvecs <= 2  # nothing has moved


def test_a_vector_that_overtakes_is_found_within_eight_solves() -> None:
    Q = torch.linalg.qr(torch.randn(80, 80, dtype=F64))[0]

    def matrix(second: float) -> torch.Tensor:
        values = torch.cat([torch.tensor([2.0, second], dtype=F64), 0.5 * torch.linspace(-1, 1, 78, dtype=F64)])
        return Q @ (values[:, None] * Q.T)

    solver = started(matrix(1.7))
    found = [float(solver.step(Dense(matrix(3.0)), at_most=2).eigenvalues[0]) for _ in range(8)]
    assert found[-1] == pytest.approx(3.0, rel=1e-3), found


def test_the_callers_vectors_are_multiplied_and_those_within_the_span_are_not_used() -> None:
    A = prescribed(with_top(3.0, 2.0, 1.0, n=60))
    top = torch.linalg.eigh(A)[1][:, -1]
    solver = started(A)
    state = solver.state_dict()
    state["block"] = torch.linalg.eigh(A)[1][:, -2][None].contiguous()
    solver.load_state_dict(state)
    x = state["block"][0]
    result = solver.step(Dense(A), torch.stack([x, 7 * top, torch.zeros(60, dtype=F64)]), at_most=2)
    assert float(result.eigenvalues[0]) == pytest.approx(3.0, rel=1e-9) and result.matvecs == 4


def test_the_first_solve_and_long_ones_are_those_of_warm_lanczos() -> None:
    matrices = list(turning(3))
    short, warm = ShortLanczos(tol=0.01), WarmLanczos(tol=0.01)
    warm._predicts = False
    for A, most in zip(matrices, (None, 20, None), strict=True):
        a, b = short.step(Dense(A), at_most=most), warm.step(Dense(A), at_most=most)
        assert a.matvecs == b.matvecs and torch.equal(a.eigenvalues, b.eigenvalues)


def test_a_resumed_solver_continues_identically() -> None:
    solver = ShortLanczos(tol=1e-3)
    matrices = list(turning(30))
    for t, A in enumerate(matrices[:12]):
        solver.step(Dense(A), at_most=2 if t else None)
    other = ShortLanczos(tol=1e-3)
    other.load_state_dict(solver.state_dict())
    for t, A in enumerate(matrices[12:]):
        most = None if t == 9 else 3
        a, b = solver.step(Dense(A), at_most=most), other.step(Dense(A), at_most=most)
        assert torch.equal(a.eigenvalues, b.eigenvalues) and torch.equal(a.eigenvectors, b.eigenvectors)


def test_negative_spectra_keep_their_sign() -> None:
    A = prescribed(-1 - torch.linspace(0, 3, 50, dtype=F64))
    solver = started(A, tol=1e-3)
    for _ in range(5):
        result = solver.step(Dense(A), at_most=3)
    assert float(result.eigenvalues[0]) == pytest.approx(-1.0, rel=1e-3)
