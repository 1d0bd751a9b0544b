"""The density against all eigenvalues of dense matrices: shares, moments, broadening, degenerate operators."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import operator
from spectra import F64, Diagonal, Matrix, outliers_and_bulk, trained
from torch import Tensor

import sharpkern as sk
from sharpkern.spectrum import density as module


def broadened(eigenvalues: Tensor, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Density and share of eigenvalues, each a Gaussian, by torch's own distribution."""
    normal = torch.distributions.Normal(eigenvalues, sigma)
    return normal.log_prob(x[:, None]).exp().mean(1), normal.cdf(x[:, None]).mean(1)


def test_density_of_a_model_is_within_2_percent_of_its_dense_hessian() -> None:
    problem, A = trained()
    eigenvalues = torch.linalg.eigvalsh(A)
    found = sk.spectral_density(operator(problem), probes=16, steps=52)
    assert not found.exact
    assert found.matvecs == 16 * 52 < found.n
    x = found.grid(2000)
    density, share = broadened(eigenvalues, x, found.width)
    assert float((found.cumulative(x).value - share).abs().max()) <= 0.02
    step = float(x[1] - x[0])
    assert float(found.density(x).value.sum()) * step == pytest.approx(1, abs=1e-3)
    # What a histogram of twenty bins would show, as shares of all eigenvalues.
    edges = torch.linspace(float(x[0]), float(x[-1]), 21, dtype=F64)
    bins = broadened(eigenvalues, edges, found.width)[1].diff()
    assert float((found.cumulative(edges).value.diff() - bins).abs().max()) <= 0.02
    assert float((found.density(x).value - density).abs().sum()) * step <= 0.05
    assert float(found.nodes.max()) == pytest.approx(float(eigenvalues[-1]), rel=1e-6)
    assert float(found.nodes.min()) == pytest.approx(float(eigenvalues[0]), rel=0.02)


def test_moments_are_exact_but_for_the_probes_and_their_standard_errors_hold() -> None:
    A = outliers_and_bulk(400)
    eigenvalues = torch.linalg.eigvalsh(A)
    start = int(torch.randint(0, 2**31, ()))
    for function in (torch.square, torch.abs, lambda x: x, torch.ones_like):
        found = [
            sk.spectral_density(Matrix(A), 6, 12, torch.Generator().manual_seed(start + i)).trace_of(function)
            for i in range(60)
        ]
        errors = torch.tensor([e.value for e in found], dtype=F64) - function(eigenvalues).sum()
        claimed = torch.tensor([e.standard_error for e in found], dtype=F64).square().mean().sqrt()
        size = float(function(eigenvalues).abs().sum())
        assert abs(float(errors.mean())) <= 5 * float(claimed) / 60**0.5 + 1e-3 * size
        if float(claimed) > 1e-10 * size:  # the number of eigenvalues needs no luck
            assert 0.6 <= float(errors.std() / claimed) <= 1.5


def test_each_probe_is_the_gauss_quadrature_of_its_vector() -> None:
    A = outliers_and_bulk(300)
    found = sk.spectral_density(Matrix(A), 4, 9, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    for i in range(4):
        v = torch.randn(300, dtype=F64, generator=generator)
        v = v / v.norm()
        mine = found.probe == i
        for power in range(18):  # nine nodes integrate all polynomials of a degree below 18
            want = v @ torch.linalg.matrix_power(A, power) @ v
            got = (4 * found.weights[mine] * found.nodes[mine] ** power).sum()
            assert float(got) == pytest.approx(float(want), rel=1e-9)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_many_steps_keep_nodes_apart_and_in_the_spectrum(dtype: torch.dtype) -> None:
    values = torch.cat([torch.tensor([3.0, 2.0, -1.0]), 0.2 * torch.rand(2997)]).to(dtype)
    found = sk.spectral_density(Diagonal(values), 3, 80)
    tops = [found.nodes[found.probe == i].topk(3).values for i in range(3)]
    for top in tops:  # without reorthogonalisation there would be copies of the outliers
        assert top[:2].tolist() == pytest.approx([3.0, 2.0], rel=1e-4)
        assert float(top[2]) < 0.21
    assert float(found.nodes.min()) == pytest.approx(-1, rel=1e-4)
    x = torch.linspace(0, 0.2, 50, dtype=F64)
    share = (values.double() <= x[:, None]).double().mean(1)
    # Without broadening a share is sure up to the largest weight of a node.
    step = 3 * float(found.weights.max())
    assert float((found.cumulative(x, sigma=0).value - share).abs().max()) <= step + 0.02


@pytest.mark.parametrize(("dtype", "shift", "rounding"), [(F64, 1e7, 1e-7), (torch.float32, 100.0, 1e-3)])
def test_a_spectrum_far_from_zero_keeps_its_bases_orthogonal(dtype: torch.dtype, shift: float, rounding: float) -> None:
    # A product is then nearly its vector: once projected, most of its digits are gone.
    values = torch.cat([torch.tensor([3.0, 2.0, -1.0], dtype=F64), 0.2 * torch.rand(2997, dtype=F64)])
    found = sk.spectral_density(Diagonal((values + shift).to(dtype)), 2, 80)
    for i in range(2):
        nodes = found.nodes[found.probe == i] - shift
        assert nodes[-2:].tolist() == pytest.approx([2.0, 3.0], abs=rounding)
        assert float(nodes[-3]) < 0.2 + rounding
        assert float(nodes[0]) == pytest.approx(-1, abs=rounding)
        assert float(nodes[1]) > -rounding


def test_standard_errors_of_shares_are_those_of_the_probes() -> None:
    A = outliers_and_bulk(300)
    x = torch.linspace(-0.2, 0.2, 5, dtype=F64)
    start = int(torch.randint(0, 2**31, ()))
    found = [
        sk.spectral_density(Matrix(A), 8, 30, torch.Generator().manual_seed(start + i)).cumulative(x, sigma=0.1)
        for i in range(60)
    ]
    spread = torch.stack([e.value for e in found]).std(0)
    claimed = torch.stack([e.standard_error for e in found]).square().mean(0).sqrt()
    assert float((spread / claimed).min()) >= 0.6
    assert float((spread / claimed).max()) <= 1.6


def test_few_parameters_give_all_eigenvalues() -> None:
    A = outliers_and_bulk(60)
    op = Matrix(A)
    found = sk.spectral_density(op, 2, 30)
    eigenvalues = torch.linalg.eigvalsh(A)
    assert found.exact
    assert found.matvecs == op.products == 60
    assert float((found.nodes - eigenvalues).abs().max()) <= 1e-12 * 20
    x = found.grid(100)
    density, share = broadened(eigenvalues, x, found.width)
    estimate = found.density(x)
    assert float((estimate.value - density).abs().max()) <= 1e-10 * float(density.max())
    assert not estimate.standard_error.any()
    assert float((found.cumulative(x).value - share).abs().max()) <= 1e-10
    assert float((found.cumulative(eigenvalues[:1] + 1e-9, sigma=0).value - 1 / 60).abs()) <= 1e-12
    assert found.trace_of(torch.square).value == pytest.approx(float(eigenvalues.square().sum()), rel=1e-12)


@pytest.mark.parametrize("value", [0.0, 2.5, -1.0])
def test_a_multiple_of_the_identity_is_one_node(value: float) -> None:
    for n in (1, 5, 3000):
        found = sk.spectral_density(Diagonal(torch.full((n,), value)), 3, 4)
        assert float((found.nodes - value).abs().max()) <= 1e-6
        assert float(found.weights.sum()) == pytest.approx(1)
        assert float(found.density(torch.tensor([value])).value) == pytest.approx(
            1 / (found.width * math.sqrt(2 * math.pi)), rel=1e-6
        )
        assert found.matvecs == (n if found.exact else 3)  # an invariant subspace ends a probe


def test_two_eigenvalues_end_every_probe_after_two_steps() -> None:
    values = torch.cat([torch.ones(2500, dtype=F64), torch.zeros(500, dtype=F64)])
    found = sk.spectral_density(Diagonal(values), 5, 20)
    assert len(found.nodes) == found.matvecs == 10
    # The weight at one is a share of |v|^2: a beta distribution of variance 2 (5/6) (1/6) / (n + 2), over five probes.
    deviation = (2 * 5 / 36 / 3002 / 5) ** 0.5
    assert found.trace_of(lambda x: x).value == pytest.approx(2500, abs=5 * 3000 * deviation)


def test_a_probe_that_ends_early_leaves_the_others_going(monkeypatch: pytest.MonkeyPatch) -> None:
    A = outliers_and_bulk(200)
    values, vectors = torch.linalg.eigh(A)
    random_rows, drawn = module.random_rows, []

    def second_is_an_eigenvector(*arguments: object) -> Tensor:
        drawn.append(random_rows(*arguments))
        return vectors[:, -1][None] if len(drawn) == 2 else drawn[-1]

    monkeypatch.setattr(module, "random_rows", second_is_an_eigenvector)
    found = sk.spectral_density(Matrix(A), 3, 10)
    assert found.nodes[found.probe == 1].tolist() == pytest.approx([float(values[-1])], rel=1e-12)
    monkeypatch.undo()
    alone = sk.spectral_density(Matrix(A), 3, 10)
    for i in (0, 2):
        assert torch.allclose(found.nodes[found.probe == i], alone.nodes[alone.probe == i], rtol=1e-9, atol=1e-12)


def test_groups_of_probes_give_the_same_as_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    op = Matrix(outliers_and_bulk(200))
    together = sk.spectral_density(op, 5, 8)
    monkeypatch.setattr(module, "_BASIS_BYTES", 2 * 8 * 200 * 8)
    apart = sk.spectral_density(op, 5, 8)
    assert torch.allclose(together.nodes, apart.nodes, rtol=1e-9, atol=1e-12)
    assert torch.allclose(together.weights, apart.weights, rtol=1e-6, atol=1e-12)
    assert torch.equal(together.probe, apart.probe)
    monkeypatch.setattr(module, "_BASIS_BYTES", 1)
    assert torch.allclose(sk.spectral_density(op, 5, 8).nodes, together.nodes, rtol=1e-9, atol=1e-12)


def test_one_probe_knows_no_standard_error() -> None:
    found = sk.spectral_density(Matrix(outliers_and_bulk(200)), 1, 10)
    assert found.trace_of(torch.square).standard_error == math.inf
    assert bool(found.cumulative(found.grid(5)).standard_error.isinf().all())


def test_bad_arguments_and_products_are_refused() -> None:
    op = Matrix(outliers_and_bulk(200))
    for arguments in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            sk.spectral_density(op, *arguments)
    found = sk.spectral_density(op, 2, 5)
    with pytest.raises(ValueError, match="sigma must be positive, got 0"):
        found.density(found.nodes, sigma=0)
    with pytest.raises(ValueError, match="sigma must be 0 or positive, got -1"):
        found.cumulative(found.nodes, sigma=-1)
    for n in (200, 5):
        A = torch.eye(n, dtype=F64)
        A[3, 3] = float("nan")
        with pytest.raises(RuntimeError, match="not finite"):
            sk.spectral_density(Matrix(A), 2, 5)


def test_plot_draws_the_density_into_a_figure_or_given_axes(tmp_path: Path) -> None:
    found = sk.spectral_density(Matrix(outliers_and_bulk(300)), 4, 20)
    figure = found.plot()
    axes = figure.axes[0]
    x, y = axes.lines[0].get_data()
    want = found.density(torch.from_numpy(np.asarray(x, dtype=float))).value
    assert float((torch.from_numpy(np.asarray(y)) - want).abs().max()) <= 1e-3 * float(want.max())
    assert axes.get_yscale() == "log"
    assert found.plot(axes) is figure
    assert len(axes.lines) == 2
    figure.savefig(tmp_path / "density.png")
    assert (tmp_path / "density.png").stat().st_size > 1000
