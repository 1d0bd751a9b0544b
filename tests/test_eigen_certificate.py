"""The probabilistic bound against spectra whose top is known, hard ones among them."""

from __future__ import annotations

import math

import pytest
import torch
from matrices import F64, Dense, prescribed

from sharpkern.eigen import certify


class Diagonal:
    def __init__(self, values: torch.Tensor) -> None:
        self.values, self.n, self.dtype, self.device = values, len(values), F64, torch.device("cpu")

    def matmat(self, V: torch.Tensor) -> torch.Tensor:
        return self.values[:, None] * V


SPECTRA = {
    "uniform": lambda n: torch.rand(n, dtype=F64) - 0.5,
    "one above": lambda n: torch.cat([torch.ones(1, dtype=F64), torch.rand(n - 1, dtype=F64) - 0.5]),
    "dense top": lambda n: 1 - torch.linspace(0, 1, n, dtype=F64) ** 2,
}


@pytest.mark.parametrize("name", SPECTRA)
def test_bound_holds_and_means_something(name: str) -> None:
    values = SPECTRA[name](5000)
    width = float(values.max() - values.min())
    for _ in range(20):  # each fails with probability 0.01 at most, in truth far less
        c = certify(Diagonal(values), matvecs=40, failure=0.01)
        assert c.value <= float(values.max()) + 1e-12 <= c.upper + 2e-12
        assert c.upper - c.value <= 0.06 * width
        assert c.matvecs == 40


def test_bound_follows_the_theorem() -> None:
    values = torch.rand(5000, dtype=F64)
    c = certify(Diagonal(values), matvecs=30, failure=0.02, generator=torch.Generator().manual_seed(1))
    eps = (math.log(1.648 * math.sqrt(5000) / 0.01) / 59) ** 2
    half = (c.upper - c.value) * (1 - 2 * eps) / eps  # the width of the Ritz values
    assert 0.9 <= half <= float(values.max() - values.min())
    assert 1.648 * math.sqrt(5000) * math.exp(-math.sqrt(eps) * 59) == pytest.approx(0.01)


def ritz_ends(A: torch.Tensor, start: torch.Tensor, steps: int) -> tuple[float, float]:
    """The ends of Rayleigh-Ritz over the Krylov space, its basis made by Householder."""
    vectors = start[:, None] / start.norm()
    for _ in range(steps - 1):
        vectors = torch.linalg.qr(torch.cat([vectors, (A @ vectors[:, -1])[:, None]], 1))[0]
    theta = torch.linalg.eigvalsh(vectors.t() @ A @ vectors)
    return float(theta[-1]), float(theta[0])


@pytest.mark.parametrize(("steps", "failure"), [(24, 0.3), (30, 0.01)])
def test_the_bound_is_the_theorem_s_to_the_last_digits(steps: int, failure: float) -> None:
    A = prescribed(torch.rand(60, dtype=F64) - 0.3)
    start = torch.randn(1, 60, dtype=F64, generator=torch.Generator().manual_seed(3))[0]
    top, bottom = ritz_ends(A, start, steps)
    c = certify(Dense(A), steps, failure, generator=torch.Generator().manual_seed(3))
    # 1.648 sqrt(n) exp(-sqrt(eps) (2m - 1)) = failure / 2 at each end
    eps = (math.log(1.648 * math.sqrt(60) / (failure / 2)) / (2 * steps - 1)) ** 2
    assert c.value == pytest.approx(top, rel=1e-10)
    assert c.upper == pytest.approx(top + eps * (top - bottom) / (1 - 2 * eps), rel=1e-10)
    assert c.failure == failure


def test_the_start_is_a_fresh_one_at_every_call() -> None:
    op = Diagonal(torch.rand(500, dtype=F64))
    assert certify(op, 3).value != certify(op, 3).value


def test_rounding_of_the_products_is_within_the_bound() -> None:
    for _ in range(10):
        A = prescribed(torch.randn(5, dtype=F64))
        top = float(torch.linalg.eigvalsh(A)[-1])
        assert top <= certify(Dense(A)).upper <= top + 1e-11


def test_whole_space_is_exact_and_few_products_say_nothing() -> None:
    A = prescribed(torch.randn(12, dtype=F64))
    exact = certify(Dense(A), matvecs=40)
    assert exact.matvecs == 12
    assert exact.upper == pytest.approx(float(torch.linalg.eigvalsh(A)[-1]))
    v = exact.vector
    assert float((A @ v - exact.value * v).norm()) <= 1e-10
    assert certify(Diagonal(torch.rand(5000, dtype=F64)), matvecs=5).upper == math.inf


def test_wrong_arguments_are_refused() -> None:
    for options in ({"matvecs": 1}, {"failure": 0.0}, {"failure": 1.0}):
        with pytest.raises(ValueError, match="need at least 2 matvecs and failure within"):
            certify(Dense(prescribed(torch.randn(12, dtype=F64))), **options)
