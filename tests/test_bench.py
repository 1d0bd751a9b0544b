"""The benchmark suite's judgement, on made-up runs; nothing is timed."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

regress = pytest.importorskip("regress")
report = pytest.importorskip("report")
MACHINE = {"cpu": "made up", "vector": "none", "threads": 1}


def run(seed: int, slow: float = 1.0, speed: float = 1.0, drift: float = 0.0, noise: float = 0.02) -> dict:
    """A run whose machine has a speed; sharpkern takes 2 gradients times ``slow``; all but gradients drift."""
    rng = random.Random(seed)
    entries = []
    for workload in ("mlp", "cnn", "gpt"):
        cost = {"gradient": 1.0, "sharpkern": 2.0 * slow, "jvp(jacrev)": 4.0, "autograd, graph kept": 2.5, "bad": 0.1}
        shift = {name: rng.gauss(0, drift) if name != "gradient" else 0.0 for name in cost}
        seconds = {
            name: [speed * c * (1 + shift[name]) * (1 + abs(rng.gauss(0, noise))) for _ in range(20)]
            for name, c in cost.items()
        }
        seconds["sharpkern, with its gradient"] = [1.5 * s for s in seconds["sharpkern"]]
        errors = dict.fromkeys(cost, 1e-7) | {"bad": 0.1}
        del errors["gradient"]
        entries.append({
            "question": "product", "workload": workload, "k": 1, "base": "gradient", "seconds": seconds,
            "errors": errors, "failed": {"broken": "raises"}, "compile_seconds": {},
            "peak_bytes": {"gradient": 10, "sharpkern": 30, "jvp(jacrev)": 40},
        })  # fmt: skip
    return {"machine": MACHINE, "entries": entries}


def test_a_slower_product_is_found():
    slower, faster, _ = regress.compare(run(0), run(1, slow=1.2))
    assert len(slower) == 6
    assert not faster
    assert "mlp" in slower[0]


def test_a_faster_product_is_no_regression():
    slower, faster, _ = regress.compare(run(0), run(1, slow=0.8))
    assert not slower
    assert len(faster) == 6


def test_the_same_code_on_a_slower_machine_is_no_regression():
    assert regress.compare(run(0), run(1, speed=3.0)) == ([], [], 6)


def test_noise_between_runs_is_taken_from_the_peers():
    assert not regress.compare(run(2, drift=0.1), run(3, drift=0.1))[0]
    assert regress.compare(run(2), run(3, slow=1.15))[0]


def test_noise_within_a_run_is_taken_from_its_rounds():
    assert not regress.compare(run(4, noise=0.6), run(5, noise=0.6, slow=1.05))[0]


def test_training_runs_of_different_length_are_not_compared():
    short, long = run(0), run(1, slow=2.0)
    for result, steps in ((short, 4), (long, 40)):
        for entry in result["entries"]:
            entry["steps"] = steps
    assert regress.compare(short, long) == ([], [], 0)


def test_exit_code(tmp_path, capsys):
    for name, result in (("old", run(0)), ("same", run(1)), ("slow", run(2, slow=1.5))):
        (tmp_path / name).write_text(json.dumps(result))
    assert regress.main([str(tmp_path / "old"), str(tmp_path / "same")]) == 0
    assert "The runs agree: 6 of 6" in capsys.readouterr().out
    assert regress.main([str(tmp_path / "old"), str(tmp_path / "slow")]) == 1
    shown = capsys.readouterr().out
    assert "SLOWER" in shown
    assert "The runs DISAGREE: 0 of 6" in shown


def counted(**changed: int) -> dict:
    numbers = {"FLOPs": 1000, "ATen calls": 33, "kernel calls": 0} | changed
    return {"machine": {}, "entries": [{"question": "count product with 1", "workload": "mlp", "counts": numbers}]}


def test_one_call_more_is_a_regression_and_one_less_is_none():
    assert regress.compare(counted(), counted()) == ([], [], 3)
    slower, faster, _ = regress.compare(counted(), counted(**{"ATen calls": 34, "FLOPs": 999}))
    assert [line.split(":")[0] for line in slower] == ["count product with 1 mlp, ATen calls"]
    assert [line.split(":")[0] for line in faster] == ["count product with 1 mlp, FLOPs"]


def test_runs_without_a_common_figure_do_not_agree():
    assert "nothing to compare" in regress.verdict(counted(), run(0))


def test_a_wrong_peer_competes_with_nobody_and_losses_come_first():
    result = run(0, slow=1.5)  # 3 gradients: loses to 2.5
    rows = report.duels(result)
    assert "bad" not in {row["peer"] for row in rows}
    first = report.table(result).splitlines()[2]
    assert "autograd, graph kept" in first
    assert "**" in first
    shown = report.details(result)
    assert "1.0e-01 WRONG" in shown
    assert "| broken | raises" in shown


def test_wrong_is_relative_to_double_backward_where_rounding_alone_is_coarse():
    result = run(0)
    for entry in result["entries"]:
        entry["errors"].update({"sharpkern": 3e-3, "autograd, graph kept": 2e-3, "jvp(jacrev)": 5e-3})
    assert {row["peer"] for row in report.duels(result)} == {"autograd, graph kept"}


def test_missed_goals_come_first():
    lines = report.goal_table(run(0, slow=1.5)).splitlines()[2:]
    states = [line.split("|")[3].strip() for line in lines]
    assert states == sorted(states)  # "**missed**" before "reached"
    assert "**missed**" in states


def test_another_quantity_competes_with_nobody():
    result = run(0)
    for entry in result["entries"]:
        entry["another_quantity"] = ["jvp(jacrev)"]
    assert {row["peer"] for row in report.duels(result)} == {"autograd, graph kept"}
    assert "(another quantity)" in report.details(result)


def test_a_missed_goal_names_where_and_against_whom():
    result = run(0)
    result["entries"][1]["seconds"]["sharpkern"] = [3.0] * 20  # the CNN's gradient takes 1, its kept graph 2.5
    line = next(x for x in report.goal_table(result).splitlines() if "kept graph" in x)
    assert "missed" in line
    assert line.endswith("| cnn, autograd, graph kept |")


def test_the_readme_table_is_made_from_the_run(tmp_path):
    result = run(0) | {"date": "2026-01-01"}
    for entry in result["entries"]:
        entry["seconds"]["floor"] = [s / 2 for s in entry["seconds"]["sharpkern"]]
    table = report.readme_table(result)
    assert "| 2.00 |" in table  # of the floor
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- measured -->\nold\n<!-- end -->\nz\n")
    report.between(page, table)
    assert "old" not in page.read_text()
    assert page.read_text().startswith("a\n")
    assert page.read_text().endswith("<!-- end -->\nz\n")
    page.write_text("no marks")
    with pytest.raises(ValueError, match="marks"):
        report.between(page, table)


def test_the_suite_is_found_in_a_checkout_only(tmp_path, monkeypatch):
    from sharpkern.cli import bench

    assert bench.find().is_file()
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site" / "sharpkern" / "bench.py"))
    with pytest.raises(FileNotFoundError, match="source checkout"):
        bench.find(tmp_path)
