"""LOBPCG against float64 matrices of prescribed spectra."""

from __future__ import annotations

import pytest
import torch
from matrices import F64, SPECTRA, Dense, bulk, check, prescribed

from sharpkern.eigen import lobpcg


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
