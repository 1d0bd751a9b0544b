"""Cells trained together leave what each would leave alone."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sharpkern.sweep import stacked
from sharpkern.sweep.executors import run_sweep
from sharpkern.sweep.grid import Cell, Sweep, read_sweep
from sharpkern.sweep.groups import groups, run_group
from sharpkern.sweep.run import Outcome, run_cell
from sharpkern.train.batched import FCNStack, stacked_losses
from sharpkern.train.config import TrainConfig
from sharpkern.train.losses import build_loss
from sharpkern.train.metrics import read
from sharpkern.train.models import ACTIVATIONS, FCN, PARAMETERISATIONS

# Of a figure against that of a single run, relative: float32, sums in another order, over 12 steps of stable training.
TOLERANCE = 1e-3
TEXT = """
loss = "{loss}"
steps = 12
eval_every = 5
{batch}
[model]
width = 9
depth = {depth}
activation = "{activation}"
parameterisation = "{parameterisation}"
[data]
limit = 60
[optimizer]
momentum = {momentum}
[tracking]
every = 12
[sweep]
lr_unit = "1/sharpness"
[sweep.grid]
optimizer.lr = [0.2, 0.5, 1e30]
optimizer.warmup_steps = [1, 6]
seed = {seeds}
"""


def sweep_of(folder: Path, out: str, **choices: object) -> Sweep:
    chosen = {
        "loss": "mse", "batch": "", "depth": 3, "activation": "relu", "parameterisation": "sp", "momentum": 0.0,
        "seeds": random.sample(range(10**6), 2),
    } | choices  # fmt: skip
    path = folder / "sweep.toml"
    path.write_text(TEXT.format(**chosen))
    return read_sweep(path, folder / out)


def close(got: object, want: object, what: str) -> None:
    if isinstance(want, float) and not isinstance(want, bool):
        assert isinstance(got, float), what
        assert abs(got - want) <= TOLERANCE * abs(want) + 1e-6, f"{what}: {got} in the stack, {want} alone"
    elif isinstance(want, list):
        assert isinstance(got, list) and len(got) == len(want), what
        for a, b in zip(got, want, strict=True):
            close(a, b, what)
    else:
        assert got == want, f"{what}: {got} in the stack, {want} alone"


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def same_folder(got: Path, want: Path) -> None:
    assert files(got) == files(want)
    for name in ("config.toml", "cell.toml"):
        assert (got / name).read_text().replace(str(got), "") == (want / name).read_text().replace(str(want), "")
    rows, truth = read(got / "metrics.jsonl"), read(want / "metrics.jsonl")
    assert [list(row) for row in rows] == [list(row) for row in truth]
    pairs = [*zip(rows, truth, strict=True)]
    pairs.append((json.loads((got / "result.json").read_text()), json.loads((want / "result.json").read_text())))
    for row, true in pairs:
        assert list(row) == list(true)
        for key in row.keys() - {"seconds"}:
            if key.endswith("accuracy") and true[key] is not None:
                assert abs(row[key] - true[key]) <= 1.01 / 60, f"{key}: one example"  # a tie may fall either way
            else:
                close(row[key], true[key], f"{got.name}, {key}")


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"loss": "cross-entropy", "momentum": 0.7, "parameterisation": "mup"},
        {"batch": "batch_size = 16", "activation": "tanh", "parameterisation": "ntp"},
        {"batch": "batch_size = 16", "loss": "cross-entropy", "momentum": 0.5, "activation": "gelu", "depth": 2},
        {"batch": "batch_size = 64", "seeds": [random.randrange(10**6)]},
    ],
    ids=lambda choices: ",".join(f"{k}={v}" for k, v in choices.items() if k != "seeds") or "full batch",
)
def test_stacked_cells_leave_what_single_runs_leave(tmp_path: Path, choices: dict[str, object]) -> None:
    together = sweep_of(tmp_path, "together", **choices)
    (group,) = groups(together.cells)
    outcomes = run_group(group)
    shutil.rmtree(tmp_path / "alone", ignore_errors=True)
    alone = read_sweep(tmp_path / "sweep.toml", tmp_path / "alone")
    statuses = [run_cell(cell) for cell in alone.cells]
    assert sorted(outcomes, key=lambda o: o.name) == sorted(statuses, key=lambda o: o.name)
    assert sum(o.status == "diverged" for o in outcomes) >= len(outcomes) // 3
    for got, want in zip(together.cells, alone.cells, strict=True):
        same_folder(got.folder, want.folder)
