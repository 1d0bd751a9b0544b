"""The engine does no more work than when its counts were last written: FLOPs and calls, no clock."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sharpkern.kernels.cpu import native

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

counts = pytest.importorskip("counts")
regress = pytest.importorskip("regress")


@pytest.mark.skipif(bool(native.forced_backend()), reason="the counts are of the backends chosen by default")
def test_the_engine_does_no_more_work_than_the_committed_counts():
    committed = json.loads((BENCHMARKS / "results" / "counts.json").read_text())
    now = counts.counts()
    if now["machine"] != committed["machine"]:
        pytest.skip(f"counts are of {committed['machine']}, this is {now['machine']}")
    slower, faster, compared = regress.compare(committed, now)
    assert compared == 3 * 3 * len(counts.SMALL)
    assert not slower, "\n".join(slower)
    assert not faster, "less work: run `python benchmarks/counts.py benchmarks/results/counts.json`\n" + "\n".join(
        faster
    )


def test_flops_of_a_linear_network_are_those_of_its_products():
    """Layer a -> b, batch n: a product needs three n x a x b products for each layer's tangents, bar what is constant.

    Forward tangent: dx W' + x dW' (two, one for the first layer). Backward tangent: dg W + g dW (two, none for the
    first layer), dg' x + g' dx (two, one for the first layer). A multiply-add is two operations.
    """
    n, a, b, c = (int(size) for size in torch.randint(2, 9, (4,)))
    model = nn.Sequential(nn.Linear(a, b), nn.Linear(b, c))
    batch = torch.randn(n, a), torch.randn(n, c)
    module = counts.LossModule(model, nn.MSELoss())
    program = counts.Program(counts.export(module, batch), dict(model.named_parameters()), keep_outputs=False)
    program.forward(module, batch)
    program.backward()
    V = torch.randn(1, program.layout.n)
    found = counts.count(lambda: program.hvp(V, torch.empty_like(V)))
    assert found["FLOPs"] == 2 * n * a * b * 2 + 2 * n * b * c * 6
    assert found["ATen calls"] > 0


def test_views_and_allocations_are_no_calls():
    x = torch.ones(3, 4)
    assert counts.count(lambda: torch.empty(2).view(1, 2))["ATen calls"] == 0
    assert counts.count(lambda: x.t() + 1)["ATen calls"] == 1
    assert counts.count(lambda: x.mm(x.t()))["FLOPs"] == 2 * 3 * 4 * 3
