"""The speed table of docs/lab/kernels.md is the one that its results give, and bold where a goal is missed."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

kernel_table = pytest.importorskip("kernel_table")


def test_the_page_holds_the_table_of_its_results() -> None:
    page = (ROOT / "docs" / "lab" / "kernels.md").read_text()
    between = page.partition("<!-- measured -->")[2].partition("<!-- end -->")[0]
    assert between.strip() == kernel_table.page(*kernel_table.read()).strip()


def test_every_figure_names_a_run() -> None:
    _, kernels = kernel_table.read()
    assert {row["source"] for row in kernels["rows"]} == set(kernels["sources"])


@pytest.mark.parametrize(
    ("values", "goal", "is_missed"),
    [
        ([1.0], {"at_most": 1.0}, False),
        ([1.01], {"at_most": 1.0}, True),
        ([0.8, 1.1], {"at_most": 1.0}, True),
        ([0.8, 1.1], {"at_least": 0.85}, True),
        ([0.9, 1.1], {"at_least": 0.85}, False),
        ([0.9, 0.8, 1.1], {"at_most": 1.0}, False),  # a median and its quartiles
        ([0.9, 0.8, 1.1], {"at_least": 0.95}, True),
        ([9.0], {}, False),
    ],
)
def test_the_worse_end_of_a_range_or_the_median_is_judged(values, goal, is_missed: bool) -> None:
    assert kernel_table.missed(values, goal) is is_missed
    assert kernel_table.cell(values, goal).startswith("**") is is_missed


def test_products_of_a_run_become_rows_in_gradients_and_floors() -> None:
    base = random.uniform(0.5, 2.0)
    entry = {
        "question": "product", "workload": "mlp", "k": 4, "base": "gradient",
        "seconds": {"gradient": [base] * 5, "sharpkern": [6 * base] * 5, "floor": [3 * base] * 5},
    }  # fmt: skip
    result = {"entries": [entry, entry | {"k": 1}, entry | {"k": 2}, {"question": "cold"}]}
    rows = kernel_table.suite_rows(result, {kernel_table.FLOOR: {"mlp": 1.9}})
    found = {row["figure"]: next(iter(row["values"].values())) for row in rows}
    assert found == {
        kernel_table.OF_FOUR: pytest.approx([1.5] * 3),
        kernel_table.GRADIENTS: pytest.approx([6.0] * 3),
        kernel_table.FLOOR: pytest.approx([2.0] * 3),
    }
    text = kernel_table.table(rows)
    assert len(re.findall(r"\*\*", text)) == 2, "one figure misses its goal"
    assert re.search(r"\| \*\*2\.00 \(2\.00 to 2\.00\)\*\* \|  \| ≤ 1\.9 \| s \|", text)
