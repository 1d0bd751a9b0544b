"""A table that is sorted once gives the programs that torch's own ``run_decompositions`` gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import exported_program

from sharpkern.rop.decomposition_table import DecompositionTable

aten = torch.ops.aten


class Composites(nn.Module):
    """Composite ops that the table names, that it does not name, and that are made while others are taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(F.gelu(self.linear(x)))
        y = y + F.scaled_dot_product_attention(y, y, y) + x.expand(2, -1, -1).reshape(2, 5, 6)
        return F.cross_entropy(y.flatten(0, 1), torch.zeros(10, dtype=torch.long)) + F.huber_loss(y, x).tanh()


def calls(exported: Any) -> list[tuple[str, tuple[int, ...]]]:
    return [(str(n.target), tuple(n.meta["val"].shape)) for n in exported.graph.nodes if n.op == "call_function"]


@pytest.fixture
def entries() -> dict[Any, Any]:
    whole = {aten.linear.default, aten.layer_norm.default}
    return {op: f for op, f in torch.export.default_decompositions().items() if op not in whole}


def test_the_program_is_that_of_torch(entries: dict[Any, Any]) -> None:
    entries[aten.gelu.default] = lambda x, approximate="none": x * torch.erf(x)  # noqa: ARG005
    exported = torch.export.export(Composites(), (torch.randn(2, 5, 6),))
    want = calls(exported.run_decompositions(dict(entries)))
    table = DecompositionTable(entries)
    for _ in range(2):
        assert calls(table.apply(exported)) == want
    assert {"aten.linear.default", "aten.layer_norm.default", "aten.erf.default"} <= {name for name, _ in want}


def test_an_op_that_has_no_entry_stays_whole(entries: dict[Any, Any]) -> None:
    exported = torch.export.export(Composites(), (torch.randn(2, 5, 6),))
    attention = aten.scaled_dot_product_attention.default
    del entries[attention]
    assert str(attention) in {name for name, _ in calls(DecompositionTable(entries).apply(exported))}


def test_torchs_sorting_is_found_and_put_back(entries: dict[Any, Any]) -> None:
    """Without it programs are the same, and an export of a small model takes twice as long."""
    original = exported_program._split_decomp_table_to_cia_and_python_decomp
    table = DecompositionTable(entries)
    table.apply(torch.export.export(nn.Linear(2, 2), (torch.randn(3, 2),)))
    assert exported_program._split_decomp_table_to_cia_and_python_decomp is original
    composite, _ = original(dict(entries))
    assert len(table._sorted[0]) < len(composite) / 4
