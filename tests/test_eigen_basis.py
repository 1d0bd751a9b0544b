"""The basis of a Krylov solve, turned in place at a restart."""

from __future__ import annotations

import pytest
import torch
from matrices import F64, Dense, prescribed, with_top
from torch import Tensor

from sharpkern.eigen.basis import _TURNED_BYTES, Basis, Workspace


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


def basis_of(op: Dense, rows: Tensor, limit: int = 12) -> Basis:
    basis = Basis(op, limit, torch.Generator().manual_seed(1))
    basis.extend(rows)
    return basis


def test_rows_products_and_their_matrix_belong_together() -> None:
    op = Dense(prescribed(with_top(3.0, 2.0, n=30)))
    basis = basis_of(op, torch.randn(3, 30, dtype=F64))
    basis.extend(torch.randn(2, 30, dtype=F64))
    basis.extend(1e-7 * torch.randn(1, 30, dtype=F64) + basis.Q[:1])  # almost in the span
    Q, W = basis.Q[: basis.size], basis.W[: basis.size]
    assert basis.size == basis.matvecs == op.products == 6
    assert torch.allclose(Q @ Q.t(), torch.eye(6, dtype=F64), atol=1e-14)
    assert torch.allclose(W, Q @ op.A, atol=1e-14)
    assert torch.allclose(basis.T[:6, :6], Q @ op.A @ Q.t(), atol=1e-14)
    theta, Y = basis.ritz()
    assert torch.allclose(theta, torch.linalg.eigvalsh(Q @ op.A @ Q.t()).flip(0), atol=1e-14)
    V = Y.t() @ Q
    R, norms = basis.residuals(theta[:2], Y[:, :2])
    expected = V[:2] @ op.A - theta[:2, None] * V[:2]
    assert torch.allclose(R, expected, atol=1e-14)
    assert torch.allclose(norms, expected.norm(dim=1), rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_a_row_that_differs_from_the_span_by_rounding_only_is_replaced(dtype: torch.dtype) -> None:
    eps, n = torch.finfo(dtype).eps, 50
    op = Dense(torch.eye(n, dtype=dtype))
    first = torch.zeros(1, n, dtype=dtype)
    first[0, 0] = 1.0
    for beside, replaced in ((10 * eps, True), (1e4 * eps, False)):
        row = first.clone()
        row[0, 1] = beside
        basis = basis_of(op, torch.cat([first, row]))
        assert (abs(float(basis.Q[1, 1])) < 0.9) == replaced


def test_gap_estimates_are_those_of_the_nearest_ritz_interval() -> None:
    op = Dense(prescribed(with_top(6.0, 5.0, 3.0, n=30)))
    vectors = torch.linalg.eigh(op.A).eigenvectors.t()
    near = vectors[[-1, -2, -3, 4]] + 0.03 * torch.randn(4, 30, dtype=F64)
    basis = basis_of(op, near)
    theta, Y = basis.ritz()
    norms = basis.residuals(theta, Y)[1].clone()
    result = basis.result(theta, Y, [0, 1], norms[:2], done=True, reason="")
    rounding = 100 * torch.finfo(F64).eps * float(basis.largest)
    for i in (0, 1):
        gap = float(theta[i] - theta[2] - norms[2])  # of the third, which was not asked for
        assert gap > float(norms[i])
        expected = float(norms[i]) ** 2 / gap + rounding
        assert float(result.gap_estimates[i]) == pytest.approx(expected, rel=1e-9)
    added = result.error_bounds - norms[:2]  # of which the subtraction leaves some three digits
    assert torch.allclose(added, torch.full_like(added, rounding), rtol=0.01, atol=0)


def test_a_gap_that_the_neighbour_s_residual_closes_gives_no_estimate() -> None:
    op = Dense(prescribed(torch.linspace(-1, 1, 40, dtype=F64)))
    basis = basis_of(op, torch.randn(3, 40, dtype=F64))
    theta, Y = basis.ritz()
    norms = basis.residuals(theta, Y)[1].clone()
    assert float(theta[0] - theta[1]) - float(norms[1]) < float(norms[0])  # wide residuals of three random vectors
    result = basis.result(theta, Y, [0], norms[:1], done=False, reason="")
    assert torch.equal(result.gap_estimates, result.error_bounds)


def test_both_ends_look_at_the_neighbours_inside() -> None:
    op = Dense(torch.diag(torch.tensor([9.0, 5.0, 1.0, -2.0, -9.0, 0.0, 0.0, 0.0], dtype=F64)))
    rows = torch.eye(8, dtype=F64)[:5] + 0.02 * torch.randn(5, 8, dtype=F64)
    basis = basis_of(op, rows)
    theta, Y = basis.ritz()
    norms = basis.residuals(theta, Y)[1].clone()
    wanted = [0, 4]
    result = basis.result(theta, Y, wanted, norms[wanted], done=True, reason="")
    rounding = 100 * torch.finfo(F64).eps * float(basis.largest)
    for i, at in enumerate(wanted):
        inside = (1, 3)
        gap = min(float((theta[at] - theta[j]).abs() - norms[j]) for j in inside)
        assert float(result.gap_estimates[i]) == pytest.approx(float(norms[at]) ** 2 / gap + rounding, rel=1e-9)


def test_more_rows_than_the_space_has_are_left_out() -> None:
    op = Dense(prescribed(torch.randn(3, dtype=F64)))
    basis = basis_of(op, torch.randn(5, 3, dtype=F64), limit=3)
    assert basis.size == op.products == 3
    assert torch.allclose(basis.ritz()[0], torch.linalg.eigvalsh(op.A).flip(0), atol=1e-13)
    basis = basis_of(op, torch.randn(1, 3, dtype=F64), limit=3)
    basis.extend(torch.randn(4, 3, dtype=F64))  # two more have a place
    assert basis.size == basis.matvecs == 3


def test_the_scale_of_rounding_is_the_largest_product_seen_also_after_a_restart() -> None:
    op = Dense(torch.diag(torch.tensor([1.0, 0.5, 0.2, -100.0, 0.1, 0.0], dtype=F64)))
    basis = basis_of(op, torch.eye(6, dtype=F64)[:4])
    theta, Y = basis.ritz()
    basis.restart(Y[:, :2])  # without the negative end
    theta, Y = basis.ritz()
    assert float(theta.abs().max()) == pytest.approx(1.0)
    assert basis.rounding() == pytest.approx(10 * torch.finfo(F64).eps * 100, rel=1e-9, abs=0)
    # a vector whose product lies across it
    across = basis_of(Dense(torch.tensor([[0.0, 7.0], [7.0, 0.0]], dtype=F64)), torch.eye(2, dtype=F64)[:1])
    across.residuals(*across.ritz())
    assert across.rounding() == pytest.approx(10 * torch.finfo(F64).eps * 7, rel=1e-9, abs=0)


def test_memory_asked_for_again_keeps_what_was_written() -> None:
    memory = Workspace(Dense(torch.eye(4, dtype=F64)))
    block = memory.rows("Q", 2)
    block[:2] = torch.arange(8, dtype=F64).reshape(2, 4)
    grown = memory.rows("Q", 5, keep=2)
    assert len(grown) >= 5
    assert torch.equal(grown[:2], torch.arange(8, dtype=F64).reshape(2, 4))
    assert memory.rows("Q", 3).data_ptr() == grown.data_ptr()
    assert memory.rows("W", 1).data_ptr() != grown.data_ptr()
