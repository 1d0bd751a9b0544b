"""The trace against dense matrices: value, standard error, and what n, probes and rank may be."""

from __future__ import annotations

import pytest
import torch
from problems import mlp, operator
from spectra import F64, Matrix, outliers_and_bulk, trained
from torch import nn

import sharpkern as sk
from sharpkern.spectrum.probes import span, without


def seeds(count: int) -> list[torch.Generator]:
    start = int(torch.randint(0, 2**31, ()))
    return [torch.Generator().manual_seed(start + i) for i in range(count)]


def test_trace_of_a_model_is_within_2_percent_of_its_dense_hessian() -> None:
    problem, A = trained()
    estimate = sk.trace(operator(problem), matvecs=480)
    assert not estimate.exact
    assert estimate.matvecs == 480
    assert abs(estimate.value / float(A.trace()) - 1) <= 0.02


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_the_standard_error_is_that_of_the_estimate_and_the_mean_is_the_trace(dtype: torch.dtype) -> None:
    A = outliers_and_bulk(90)
    estimates = [sk.trace(Matrix(A.to(dtype)), 60, generator) for generator in seeds(150)]
    errors = torch.tensor([e.value for e in estimates], dtype=F64) - A.trace()
    claimed = torch.tensor([e.standard_error for e in estimates], dtype=F64)
    # Mean and spread of 150 estimates: five of their own standard deviations.
    assert abs(float(errors.mean())) <= 5 * float(errors.std()) / 150**0.5
    assert 0.7 <= float(errors.std() / claimed.square().mean().sqrt()) <= 1.3


def test_a_subspace_makes_it_far_better_than_signs_alone() -> None:
    A = outliers_and_bulk(200)
    errors = [sk.trace(Matrix(A), 60, generator).value - float(A.trace()) for generator in seeds(30)]
    # Signs alone have the variance 2 (|A|^2 - |diag A|^2) / m for m products.
    alone = (2 * (A.square().sum() - A.diagonal().square().sum()) / 60).sqrt()
    assert float(torch.tensor(errors).std()) <= 0.2 * float(alone)


def test_probes_are_repeatable_and_follow_the_generator() -> None:
    op = Matrix(outliers_and_bulk(80))
    same = [sk.trace(op, 30, torch.Generator().manual_seed(3)).value for _ in range(2)]
    assert same[0] == same[1] != sk.trace(op, 30, torch.Generator().manual_seed(4)).value
    assert sk.trace(op, 30).value == sk.trace(op, 30).value


@pytest.mark.parametrize("n", [1, 2, 17, 40])
def test_few_parameters_are_summed_exactly(n: int) -> None:
    A = torch.randn(n, n, dtype=F64)
    op = Matrix(A + A.t())
    estimate = sk.trace(op, 40)
    assert estimate.exact
    assert estimate.method == f"exact: all {n} unit vectors"
    assert estimate.standard_error == 0
    assert estimate.matvecs == op.products == n
    assert estimate.value == pytest.approx(2 * float(A.trace()), rel=1e-12, abs=1e-12)


def test_an_operator_of_low_rank_and_a_zero_operator_are_exact_up_to_rounding() -> None:
    B = torch.randn(5, 120, dtype=F64)
    op = Matrix(B.t() @ B)
    estimate = sk.trace(op, 60)
    assert estimate.value == pytest.approx(float(B.square().sum()), rel=1e-10)
    assert estimate.standard_error <= 1e-10 * estimate.value
    assert estimate.method == "Hutch++: 5 vectors and 35 probes"  # the rank that was found
    assert op.products == estimate.matvecs == 60
    zero = sk.trace(Matrix(torch.zeros(50, 50)), 30)
    assert (zero.value, zero.standard_error) == (0.0, 0.0)


def test_forms_take_the_place_of_products_where_the_operator_has_them() -> None:
    H = operator(trained()[0])
    H.products = 0
    sk.trace(H, 96)
    assert H.products == 32  # the other 64 are quadratic forms, at half the cost


def test_trace_follows_parameters_that_were_left_out_and_preconditioning() -> None:
    problem, A = trained()
    model = problem.model
    H = sk.HessianOperator(*problem, params=["0.bias", "4.bias"])
    sizes = [p.numel() for p in model.parameters()]
    last = sum(sizes[:-1])
    want = A.diagonal()[sizes[0] : sizes[0] + 20].sum() + A.diagonal()[last:].sum()
    assert sk.trace(H).value == pytest.approx(float(want), rel=1e-9)


def test_bad_arguments_and_products_are_refused() -> None:
    op = Matrix(outliers_and_bulk(50))
    with pytest.raises(ValueError, match="at least 6, got 5"):
        sk.trace(op, 5)
    for n in (50, 5):
        A = torch.eye(n, dtype=F64)
        A[2, 2] = float("nan")
        with pytest.raises(RuntimeError, match="not finite"):
            sk.trace(Matrix(A), 30)
    problem = mlp()
    H = operator(problem)
    nn.init.zeros_(problem.model[0].weight)
    with pytest.raises(RuntimeError, match="refresh"):
        sk.trace(H)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_span_of_nearly_dependent_rows_is_orthonormal(dtype: torch.dtype) -> None:
    lengths = torch.logspace(0, -14, 12, dtype=F64)
    rows = (torch.linalg.qr(torch.randn(12, 12, dtype=F64))[0] * lengths @ torch.randn(12, 70, dtype=F64)).to(dtype)
    Q = span(rows)
    eps = torch.finfo(dtype).eps
    assert 4 <= len(Q) < 12  # directions below rounding are left out
    assert float((Q.double() @ Q.double().t() - torch.eye(len(Q))).abs().max()) <= 20 * eps
    left = without(rows, Q).double().norm(dim=1)
    assert float(left.max()) <= 1e-4 * float(rows.norm())
