"""Write the speed table of docs/lab/kernels.md from results: ``python benchmarks/kernel_table.py``.

Two files are read from benchmarks/results. full.json is a run of the suite: its products of one vector and of four.
kernels.json holds figures of single kernels with where each came from, and the goals.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from interleave import ratio
from report import MODELS, between

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GRADIENTS = "product, in gradients"
FLOOR = "product, in its own matrix products and convolutions"
OF_FOUR = "block of four, each vector in gradients"
SUITE = "s"  # the letter of full.json among the sources
Row = dict[str, Any]


def suite_rows(result: Row, goals: dict[str, dict[str, float]]) -> list[Row]:
    """Return the rows of a run's products: medians of per-round ratios, with their quartiles."""
    rows = []
    for entry in result["entries"]:
        if entry["question"] != "product" or entry["k"] not in (1, 4):
            continue
        k, seconds, workload = entry["k"], entry["seconds"], entry["workload"]
        each = {**seconds, "sharpkern": [s / k for s in seconds["sharpkern"]]}
        figures = [(GRADIENTS, entry["base"]), (FLOOR, "floor")] if k == 1 else [(OF_FOUR, entry["base"])]
        for figure, base in figures:
            if base not in seconds:  # the largest model has no floor
                continue
            found = ratio(each, "sharpkern", base)
            row = {"figure": figure, "case": MODELS[workload], "source": SUITE,
                   "values": {str(k): [found["median"], found["low"], found["high"]]}}  # fmt: skip
            most = goals.get(figure, {}).get(workload)
            rows.append(row | ({} if most is None else {"goal": {"at_most": most}}))
    return rows


def missed(values: list[float], goal: dict[str, float]) -> bool:
    """Whether a figure misses its goal: its median, or the worse end of a range, does.

    Args:
        values: one number; two, the ends of a range; or three, a median and its quartiles.
        goal: ``{"at_most": number}`` or ``{"at_least": number}``; {} for none.
    """
    judged = values if len(values) < 3 else values[:1]
    return max(judged) > goal.get("at_most", float("inf")) or min(judged) < goal.get("at_least", 0.0)


def cell(values: list[float], goal: dict[str, float]) -> str:
    """Write a figure, bold where it misses its goal."""
    numbers = [f"{v:.0f}" if v >= 20 else f"{v:.2f}" for v in values]
    text = f"{numbers[0]} ({numbers[1]} to {numbers[2]})" if len(values) == 3 else " to ".join(numbers)
    return f"**{text}**" if missed(values, goal) else text


def table(rows: list[Row]) -> str:
    """Return the table: a figure's rows together under its name, figures in the order in which they first come."""
    order = list(dict.fromkeys(row["figure"] for row in rows))
    lines = ["| figure | case | one vector | a block | goal | run |", "|---" * 6 + "|"]
    named = ""
    for row in sorted(rows, key=lambda row: order.index(row["figure"])):
        goal = row.get("goal", {})
        one = row["values"].get("1")
        blocks = [f"{cell(values, goal)}, k = {k}" for k, values in row["values"].items() if k != "1"]
        wanted = " ".join(f"{'≤' if key == 'at_most' else '≥'} {value:g}" for key, value in goal.items())
        figure, named = ("" if row["figure"] == named else row["figure"]), row["figure"]
        cells = [figure, row["case"], cell(one, goal) if one else "", ", ".join(blocks), wanted, row["source"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sources(result: Row, found: dict[str, Row]) -> str:
    """Say of each run on which machine, when and how it was measured."""
    m = result["machine"]
    lines = [
        f"- {SUITE}: {m['cpu']} ({m['vector']}), {m['threads']} threads, torch {result['versions']['torch']}, commit "
        f"{result['versions']['commit']}, {result['date']}; results/full.json, medians of per-round ratios (quartiles)."
    ]
    for letter, s in found.items():
        torch = f"torch {s['torch']}" if s["torch"] else "torch not stated"
        threads = "1 thread" if s["threads"] == 1 else f"{s['threads']} threads"
        recorded = f"recorded by commit {s['recorded']}, {s['date']}"
        lines.append(f"- {letter}: {s['machine']}, {threads}, {torch}, {recorded}; {s['how']}.")
    return "\n".join(lines)


def page(full: Row, kernels: Row) -> str:
    """Return what stands between the marks of docs/lab/kernels.md."""
    rows = suite_rows(full, kernels["goals"]) + kernels["rows"]
    return f"{table(rows)}\n\nThe runs:\n\n{sources(full, kernels['sources'])}\n"


def read() -> tuple[Row, Row]:
    """Return the contents of full.json and kernels.json."""
    full, kernels = (json.loads((RESULTS / name).read_text()) for name in ("full.json", "kernels.json"))
    return full, kernels


if __name__ == "__main__":
    between(ROOT / "docs" / "lab" / "kernels.md", page(*read()))
