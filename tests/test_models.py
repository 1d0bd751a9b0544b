"""A few models of the list that ``make models`` compares, and an error planted in it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import models
from model_list import CASES, Case
from models_page import Row, page_line, summary

from sharpkern.rop.rule import RULES

NAMED = {case.name: case for case in CASES}
ROWS = [
    pytest.param("BERT, classes", "train", "program", marks=pytest.mark.slow),
    ("tied weights", "eval", "program"),
    ("spectral norm", "eval", "program"),
    ("LSTM with dropout", "train", "double backward"),
    ("FFT layer", "train", "double backward"),
    ("autograd.grad in the forward", "train", "double backward"),
    ("straight-through rounding", "train", "double backward"),
    ("gradient reversal", "eval", "double backward"),
]


def compared(case: Case, mode: str) -> Row:
    """Run a comparison without the warnings that it switches off for its process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        return models.compared(case, mode)


@pytest.mark.parametrize(("name", "mode", "engine"), ROWS)
def test_gradient_product_and_verdict_are_right(name: str, mode: str, engine: str) -> None:
    if NAMED[name].group == "Hugging Face":
        pytest.importorskip("transformers")
    row = compared(NAMED[name], mode)
    assert row.end == "right", row
    assert row.engine.startswith(engine)
    assert row.name in page_line(row)


def test_a_wrong_product_is_seen_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = RULES[torch.ops.aten.tanh.default]
    right = rule.backward_tangent
    monkeypatch.setattr(rule, "backward_tangent", lambda *args: tuple(1.001 * r for r in right(*args)))
    row = compared(NAMED["tied weights"], "eval")
    assert row.end == "WRONG" and row.status == "wrong"
    assert "0 are right" in summary([row]) and "1 WRONG" in summary([row])
