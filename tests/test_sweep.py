"""Sweeps: one TOML file, resumable cells, and the same table after any interruption."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import sharpkern as sk
from sharpkern import cli
from sharpkern.sweep import executors
from sharpkern.sweep.collect import result_row
from sharpkern.sweep.grid import read_sweep
from sharpkern.sweep.groups import Group
from sharpkern.sweep.run import CellEnd, locked, run_cell
from sharpkern.train.config import OptimizerConfig, TrainConfig, from_toml

BASE = """
loss = "mse"
steps = {steps}
eval_every = 3
checkpoint_every = 2
[model]
width = 8
depth = 2
[data]
limit = 40
"""
GRID = BASE.format(steps=12) + "[sweep.grid]\noptimizer.lr = [0.3, 1e7]\noptimizer.warmup_steps = [1, 4]\n"


def write(folder: Path, text: str = GRID) -> Path:
    path = folder / "sweep.toml"
    path.write_text(text)
    return path


def in_this_process(function: Callable[[Group], list[CellEnd]], todo: Sequence[Group]) -> Iterator[list[CellEnd]]:
    return map(function, todo)


def run(path: Path, out: Path) -> list[CellEnd]:
    return list(executors.run_sweep(read_sweep(path, out), in_this_process))


def table_without_time(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_grid_is_every_combination_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = '[sweep.grid]\noptimizer.name = ["adam", "sgd"]\n"optimizer.lr" = [1, 2.5e-5]\nseed = [0]\n'
    sweep = read_sweep(write(tmp_path, text), tmp_path / "out")
    assert sweep.axes == ("optimizer.name", "optimizer.lr", "seed")
    assert [cell.name for cell in sweep.cells] == [
        "optimizer=adam,lr=1,seed=0", "optimizer=adam,lr=2.5e-05,seed=0",
        "optimizer=sgd,lr=1,seed=0", "optimizer=sgd,lr=2.5e-05,seed=0",
    ]  # fmt: skip
    assert sweep.cells[1].config == TrainConfig(
        optimizer=OptimizerConfig(name="adam", lr=2.5e-5),
        threads=1,
        out=tmp_path / "out" / "cells" / "optimizer=adam,lr=2.5e-05,seed=0",
    )


def test_several_grids_share_their_axes_and_count_a_cell_once(tmp_path: Path) -> None:
    text = (
        '[[sweep.grid]]\nmodel.parameterisation = ["sp"]\noptimizer.lr = [1, 2]\n'
        '[[sweep.grid]]\nmodel.parameterisation = ["mup", "sp"]\noptimizer.lr = [2]\ndata.name = ["digits"]\n'
        "[[sweep.grid]]\noptimizer.lr = [1]\n"
    )
    names = [cell.name for cell in read_sweep(write(tmp_path, text)).cells]
    assert names == [
        "parameterisation=sp,lr=1,data=fashion-mnist-5k", "parameterisation=sp,lr=2,data=fashion-mnist-5k",
        "parameterisation=mup,lr=2,data=digits", "parameterisation=sp,lr=2,data=digits",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = ", "not TOML"),
        ("steps = 3", "the grid is empty"),
        ("[sweep]\ngrid = 3", "sweep.grid must be a table, got 3"),
        ("[sweep.grid]\nseed = []", "seed must be a list of at least one value, got []"),
        ("[sweep.grid]\nseed = 1", "seed must be a list of at least one value, got 1"),
        ("[sweep.grid]\noptimizer.lrr = [1]", "unknown option 'lrr'"),
        ("[sweep.grid]\nseed.x = [1]", "seed = {'x': 1} does not fit"),
        ("stepz = 3\n[sweep.grid]\nseed = [1]", "unknown option 'stepz'"),
        ("[sweep.grid]\nseed = ['a']", "seed = 'a' does not fit"),
        ("[sweep.grid]\noptimizer.lr = [0.0]", "optimizer.lr must be positive and finite, got 0.0"),
        ("[sweep.grid]\nsteps = [0]", "steps must be at least 1, got 0"),
        ("[sweep.grid]\nout = ['a']", "out cannot vary"),
        ("[sweep]\nunit = 3\n[sweep.grid]\nseed = [1]", "unknown key 'unit'; known are grid, lr_unit"),
        ("[sweep]\nlr_unit = 'm'\n[sweep.grid]\nseed = [1]", "lr_unit must be one of 1, 1/sharpness, got 'm'"),
        ("[sweep]\nkeep_checkpoints = 1\n[sweep.grid]\nseed = [1]", "keep_checkpoints must be true or false"),
        (
            "[optimizer]\nname = 'adam'\n[sweep]\nlr_unit = '1/sharpness'\n[sweep.grid]\nseed = [1]",
            "is for sgd, got 'adam'",
        ),
        # Refused before anything is imported: there is no such module, which would be another message.
        ("task = 'nowhere.to_be_found:make'\n[sweep.grid]\nseed = [1]", "task is for train, suggest and audit"),
        ("[sweep.grid]\ntask = ['nowhere.to_be_found:make']", "task is for train, suggest and audit"),
    ],
)
def test_mistakes_in_the_file_are_one_line(tmp_path: Path, text: str, message: str, capsys) -> None:
    assert cli.main(["sweep", str(write(tmp_path, text)), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'file' - see sharpkern sweep --help."),
        (["nowhere.toml"], "nowhere.toml: no such sweep file"),
        (["FILE", "--processes", "0"], "--processes must be at least 1, got 0"),
        (["FILE", "--executor", "ray"], "'ray' is not one of 'local', 'submitit'"),
        (["FILE", "--executor", "submitit", "--submitit", "debug"], "--submitit needs KEY=VALUE, got 'debug'"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write(tmp_path))
    assert cli.main(["sweep", *(path if a == "FILE" else a for a in arguments)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_cells_are_named_without_torch(tmp_path: Path) -> None:
    code = f"""
import sys
from sharpkern.cli import main
assert main(["sweep", {str(write(tmp_path))!r}, "--list"]) == 0
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "lr=0.3,warmup_steps=1"


def test_finished_cells_are_results_and_are_not_run_again(tmp_path: Path) -> None:
    path, out = write(tmp_path), tmp_path / "out"
    assert [o.status for o in run(path, out)] == ["trained", "trained", "diverged", "diverged"]
    rows = table_without_time(out)
    assert [row["status"] for row in rows] == ["trained", "trained", "diverged", "diverged"]
    assert float(rows[0]["best_test_accuracy"]) > 0
    critical, lr = float(rows[1]["critical_lr"]), float(rows[1]["learning_rate"])
    assert float(rows[1]["T_save"]) == pytest.approx(4 * min(1, critical / lr) - float(rows[1]["forward_passes"]) / 2)
    assert not list(out.glob("cells/*/checkpoint.pt"))
    before = {p: p.stat().st_mtime_ns for p in out.glob("cells/*/*")}
    assert run(path, out) == []
    assert {p: p.stat().st_mtime_ns for p in out.glob("cells/*/*")} == before
    write(tmp_path, GRID.replace("[1, 4]", "[1, 4, 6]"))  # a larger grid keeps what is done
    assert [o.name for o in run(path, out)] == ["lr=0.3,warmup_steps=6", "lr=1e+07,warmup_steps=6"]


def test_same_cell_with_other_settings_is_refused(tmp_path: Path) -> None:
    path, out = write(tmp_path), tmp_path / "out"
    run(path, out)
    write(tmp_path, GRID.replace("limit = 40", "limit = 41"))
    with pytest.raises(ValueError, match="declared with other settings"):
        run(path, out)


def test_cell_that_cannot_run_is_reported_and_tried_again(tmp_path: Path, capsys, monkeypatch) -> None:
    path = write(tmp_path, BASE.format(steps=2) + "[sweep.grid]\ndata.name = ['fashion-mnist-5k', 'mnist']\n")
    monkeypatch.setattr(executors, "local", lambda processes: in_this_process)
    for _ in range(2):
        assert cli.main(["sweep", str(path), "--out", str(tmp_path / "out")]) == 1
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert "1 cells have no result, the first is data=mnist: MNIST needs --data-dir" in err
    assert "FileNotFoundError" in (tmp_path / "out" / "cells" / "data=mnist" / "error.txt").read_text()
    assert [row["status"] == "unfinished" for row in table_without_time(tmp_path / "out")] == [False, True]


def test_learning_rates_in_units_of_the_initial_sharpness(tmp_path: Path) -> None:
    import torch

    from sharpkern.train.config import DataConfig
    from sharpkern.train.data import load
    from sharpkern.train.models import FCN

    text = (
        BASE.format(steps=1) + "[optimizer]\nlr_init = 0.5\n[sweep]\nlr_unit = '1/sharpness'\nkeep_checkpoints = true"
    )
    run(write(tmp_path, text + "\n[sweep.grid]\noptimizer.lr = [3]\n"), tmp_path / "out")
    folder = tmp_path / "out" / "cells" / "lr=3"
    data = load(DataConfig("fashion-mnist-5k", limit=40))
    goal = torch.nn.functional.one_hot(data.train_targets, 10).float()
    truth = sk.sharpness(
        FCN(784, 10, depth=2, width=8),
        lambda z, t: 0.5 * (z - t).square().mean(),
        (data.train_inputs, goal),
        tol=1e-5,
    ).value
    config = from_toml((folder / "config.toml").read_text())
    assert config.optimizer.lr * truth == pytest.approx(3, rel=1e-4)
    assert config.optimizer.lr_init * truth == pytest.approx(0.5, rel=1e-4)
    assert (folder / "checkpoint.pt").is_file()


def row(step: int, loss: float | None, accuracy: float) -> dict:
    return {
        "step": step, "loss": loss, "train_accuracy": accuracy, "test_accuracy": accuracy, "test_loss": loss,
        "measured": True, "ratio": 0.5, "threshold": 20.0, "lr": 0.1, "sharpness": 10.0, "seconds": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "status"),
    [
        ([row(1, 1.0, 0.1), row(2, 0.5, 0.16)], "trained"),
        ([row(1, 1.0, 0.1), row(2, 0.5, 0.14)], "failed"),
        ([row(1, 1.0, 0.1), row(2, 1.1e5, 0.1)], "diverged"),
        ([row(1, 1.0, 0.1), {"step": 2, "loss": None, "diverged": True}], "diverged"),
        ([{"step": 1, "loss": None, "diverged": True}], "diverged"),
    ],
)
def test_status_follows_the_rules(rows: list[dict], status: str) -> None:
    result = result_row(rows, TrainConfig(), classes=10)
    assert result["status"] == status
    json.dumps(result, allow_nan=False)


def test_cell_waits_for_another_process_that_has_it(tmp_path: Path) -> None:
    cell = read_sweep(write(tmp_path), tmp_path / "out").cells[0]
    cell.folder.mkdir(parents=True)
    found: list[CellEnd] = []
    with (cell.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: found.append(run_cell(cell)))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and not (cell.folder / "config.toml").exists()
        (cell.folder / "result.json").write_text('{"status": "failed"}')  # what the other process finds
    thread.join()
    assert found == [CellEnd(cell.name, "failed")]


def test_cell_is_held_by_one_caller_at_a_time(tmp_path: Path) -> None:
    cell = read_sweep(write(tmp_path), tmp_path / "out").cells[0]
    with locked(cell), (cell.folder / "lock").open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)


def free(cells: Path) -> bool:
    """No process holds a cell."""
    for path in cells.glob("*/lock"):
        with path.open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
    return True


def heed_interrupts() -> None:
    """Undo what a shell does to background jobs, such as these tests: they, and all they start, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupted_and_killed_sweep_ends_with_the_same_table(tmp_path: Path) -> None:
    text = BASE.format(steps=10) + (
        "[sweep]\nlr_unit = '1/sharpness'\n"
        f"[sweep.grid]\noptimizer.lr = [1, 40, 1e9]\noptimizer.warmup_steps = [1, 8]\nseed = {list(range(10))}\n"
    )
    path, whole, killed = write(tmp_path, text), tmp_path / "whole", tmp_path / "killed"
    run(path, whole)
    command = [sys.executable, "-m", "sharpkern.cli", "sweep", str(path), "--out", str(killed), "--processes", "2"]
    for number in (signal.SIGINT, signal.SIGKILL):
        seen = sum(p.stat().st_size for p in killed.glob("cells/*/metrics.jsonl"))
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
        )
        while process.poll() is None and sum(p.stat().st_size for p in killed.glob("cells/*/metrics.jsonl")) == seen:
            time.sleep(0.01)
        time.sleep(random.uniform(0.0, 1.5))
        assert process.poll() is None, "the sweep ended before it could be stopped: make it longer"
        process.send_signal(number)
        err = process.communicate(timeout=60)[1]
        if number == signal.SIGINT:
            assert process.returncode == 130
            assert err.strip().splitlines()[-1] == "sharpkern: interrupted; the same command goes on from here."
            assert "Traceback" not in err
        deadline = time.monotonic() + 20
        while not free(killed / "cells"):  # the processes of a killed sweep end, too
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert len(list(killed.glob("cells/*/result.json"))) < 60
        assert not (killed / "table.csv").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert table_without_time(killed) == table_without_time(whole)
    assert len(table_without_time(whole)) == 60


def die(group: Group) -> list[CellEnd]:
    os._exit(1)


def test_process_that_dies_is_one_clear_error(tmp_path: Path) -> None:
    cells = read_sweep(write(tmp_path), tmp_path / "out").cells
    with pytest.raises(RuntimeError, match="a process died, perhaps for want of memory"):
        list(executors.local(1)(die, [cells]))


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # its logs
def test_submitit_gives_the_same_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("submitit")
    path = write(tmp_path)
    run(path, tmp_path / "here")
    out = tmp_path / "jobs"
    options = ["--executor", "submitit", "--submitit", "cluster=debug", "--submitit", "timeout_min=5"]
    assert cli.main(["sweep", str(path), "--out", str(out), *options]) == 0
    assert table_without_time(out) == table_without_time(tmp_path / "here")
    assert (
        cli.main(["sweep", str(path), "--out", str(out), *options[:3], "cluster=debug", "--submitit", "tmeout=5"]) == 2
    )
    assert "tmeout" in capsys.readouterr().err


def test_missing_submitit_is_one_clear_line(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert cli.main(["sweep", str(write(tmp_path)), "--out", str(tmp_path / "out"), "--executor", "submitit"]) == 2
    assert capsys.readouterr().err == (
        "sharpkern: the submitit executor needs its extra: pip install 'sharpkern[sweep]'.\n"
    )
