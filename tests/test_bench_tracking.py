"""Every contender of the tracking benchmark runs, and finds the top eigenvalue of a matrix that drifts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from matrices import Dense, prescribed, with_top

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

bench_tracking = pytest.importorskip("bench_tracking")
tracking_runs = pytest.importorskip("tracking_runs")


@pytest.mark.parametrize("name", bench_tracking.CONTENDERS)
def test_every_contender_follows_a_drifting_matrix(name: str) -> None:
    A, change = prescribed(with_top(3.0, 2.0, 1.0)), prescribed(with_top(0.1, -0.1))
    solve = bench_tracking.CONTENDERS[name](0.01)
    allowed = 0.1 if name == "PyHessian's rule" else 0.01  # it stops where the quotient changes little
    for step in range(12):
        now = A + 0.1 * step * change
        operator, hint = Dense(now), torch.randn(1, len(A), dtype=A.dtype)
        truth = torch.linalg.eigvalsh(now).flip(0)[:2]
        value, bound, products = solve(tracking_runs.Moment(step, operator, {}, hint, truth))
        assert value == pytest.approx(float(truth[0]), rel=allowed)
        assert bound >= 0
        assert products == operator.products
