"""The diagonal against dense matrices: values, standard errors, degenerate operators."""

from __future__ import annotations

import pytest
import torch
from problems import operator
from spectra import F64, Matrix, outliers_and_bulk, trained

import sharpkern as sk


def seeds(count: int) -> list[torch.Generator]:
    start = int(torch.randint(0, 2**31, ()))
    return [torch.Generator().manual_seed(start + i) for i in range(count)]


def test_diagonal_of_a_model_is_its_hessians_within_the_standard_error() -> None:
    problem, A = trained()
    H = operator(problem)
    estimate = sk.diagonal(H, matvecs=480)
    assert not estimate.exact
    assert estimate.value.shape == (H.n,)
    standard = (estimate.value - A.diagonal()) / estimate.standard_error
    # 841 entries with the same probes: correlated, so that bounds are wide.
    assert abs(float(standard.mean())) <= 0.3
    assert 0.7 <= float(standard.std()) <= 1.4
    assert {name: tuple(t.shape) for name, t in H.unflatten(estimate.value).items()}["0.weight"] == (20, 12)
    assert float((estimate.value - A.diagonal()).norm() / A.diagonal().norm()) <= 0.15
    exact = sk.diagonal(H, matvecs=H.n)
    assert exact.exact
    assert float((exact.value - A.diagonal()).abs().max()) <= 1e-10 * float(A.diagonal().abs().max())


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_the_standard_errors_are_those_of_the_estimates_and_their_mean_is_the_diagonal(dtype: torch.dtype) -> None:
    A = outliers_and_bulk(70)
    estimates = [sk.diagonal(Matrix(A.to(dtype)), 45, generator) for generator in seeds(150)]
    errors = torch.stack([e.value for e in estimates]) - A.diagonal()
    claimed = torch.stack([e.standard_error for e in estimates])
    # 70 means of 150 estimates each: one beyond five standard deviations has a chance of 4e-5.
    assert float((errors.mean(0).abs() / errors.std(0)).max()) <= 5.5 / 150**0.5
    assert 0.85 <= float(errors.square().mean().sqrt() / claimed.square().mean().sqrt()) <= 1.15


def test_a_subspace_makes_it_better_than_bekas_estimator() -> None:
    A = outliers_and_bulk(150)
    errors = [sk.diagonal(Matrix(A), 60, generator).value - A.diagonal() for generator in seeds(20)]
    # Bekas et al.: entry i has the variance sum over j != i of A_ij^2, over the number of products.
    alone = (A.square().sum() - A.diagonal().square().sum()) / 60
    assert float(torch.stack(errors).square().sum(1).mean()) <= 0.2 * float(alone)


@pytest.mark.parametrize("n", [1, 3, 30])
def test_few_parameters_are_read_exactly(n: int) -> None:
    A = torch.randn(n, n, dtype=F64)
    op = Matrix(A + A.t())
    estimate = sk.diagonal(op, 30)
    assert estimate.exact
    assert estimate.matvecs == op.products == n
    assert torch.equal(estimate.value, 2 * A.diagonal())
    assert torch.equal(estimate.standard_error, torch.zeros(n, dtype=F64))


def test_low_rank_and_zero_operators_are_exact_up_to_rounding() -> None:
    B = torch.randn(5, 120, dtype=F64)
    op = Matrix(B.t() @ B)
    estimate = sk.diagonal(op, 60)
    want = B.square().sum(0)
    assert float((estimate.value - want).abs().max()) <= 1e-10 * float(want.max())
    assert float(estimate.standard_error.max()) <= 1e-10 * float(want.max())
    assert op.products == estimate.matvecs == 60
    zero = sk.diagonal(Matrix(torch.zeros(50, 50)), 30)
    assert not zero.value.any()
    assert not zero.standard_error.any()


def test_probes_follow_the_generator() -> None:
    op = Matrix(outliers_and_bulk(80))
    same = [sk.diagonal(op, 30, torch.Generator().manual_seed(3)).value for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], sk.diagonal(op, 30, torch.Generator().manual_seed(4)).value)
    assert torch.equal(sk.diagonal(op, 30).value, sk.diagonal(op, 30).value)


def test_bad_arguments_and_products_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 6, got 0"):
        sk.diagonal(Matrix(torch.eye(3)), 0)
    for n in (50, 5):
        A = torch.eye(n, dtype=F64)
        A[2, 1] = float("inf")
        with pytest.raises(RuntimeError, match="not finite"):
            sk.diagonal(Matrix(A), 30)
