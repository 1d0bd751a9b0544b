"""Runs: reproducible, resumable after any interruption, and honest when they diverge."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sharpkern as sk
from sharpkern.train import checkpoint, metrics
from sharpkern.train.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig, from_toml, to_toml
from sharpkern.train.loop import Run, batch_at


def config(out: Path, **changes) -> TrainConfig:
    small = TrainConfig(
        model=ModelConfig(width=12, depth=3),
        data=DataConfig(limit=80),
        optimizer=OptimizerConfig(lr=0.05, warmup_steps=4),
        steps=8,
        batch_size=32,
        eval_every=4,
        checkpoint_every=3,
        threads=1,
        out=out,
    )
    return dataclasses.replace(small, **changes)


def rows_without_time(folder: Path) -> list[dict]:
    rows = metrics.read(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def finish(run: Run) -> list[dict]:
    return list(run.steps())


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "gi-adam"])
def test_same_seed_gives_the_same_rows(tmp_path: Path, optimizer: str) -> None:
    chosen = OptimizerConfig(name=optimizer, lr=0.01, warmup_steps=4, momentum=0.9)
    for name in ("a", "b"):
        finish(Run(config(tmp_path / name, optimizer=chosen)))
    assert rows_without_time(tmp_path / "a") == rows_without_time(tmp_path / "b")
    assert len(rows_without_time(tmp_path / "a")) == 8


def test_rows_hold_what_a_plain_training_run_computes(tmp_path: Path) -> None:
    run = Run(config(tmp_path / "run", loss="mse"))
    model = type(run.model)(784, 10, depth=3, width=12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for row in finish(run):
        x, y = batch_at(row["step"], run.config, run.data.train_inputs, run.targets)
        optimizer.param_groups[0]["lr"] = 0.05 * min(1.0, row["step"] / 4)
        loss = 0.5 * (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert row["lr"] == pytest.approx(optimizer.param_groups[0]["lr"])
        truth = sk.sharpness(model, lambda z, t: 0.5 * (z - t).square().mean(), (x, y), tol=1e-4)
        assert row["sharpness"] == pytest.approx(truth.value, rel=1e-2)
        optimizer.step()
    assert {"test_accuracy", "train_accuracy", "test_loss"} <= row.keys()


def test_resumed_run_gives_the_same_rows(tmp_path: Path) -> None:
    finish(Run(config(tmp_path / "whole")))
    run = Run(config(tmp_path / "cut"))
    steps = run.steps()
    for _ in range(5):  # two steps beyond the checkpoint at step 3
        next(steps)
    steps.close()
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    finish(Run(config(tmp_path / "cut"), resume=True))
    assert rows_without_time(tmp_path / "cut") == rows_without_time(tmp_path / "whole")


def test_killed_run_resumes_with_the_same_rows(tmp_path: Path) -> None:
    common = dict(steps=12, checkpoint_every=2)
    finish(Run(config(tmp_path / "whole", **common)))
    wanted = config(tmp_path / "killed", **common)
    (tmp_path / "run.toml").write_text(to_toml(wanted))
    command = [sys.executable, "-m", "sharpkern.cli", "train"]
    process = subprocess.Popen(
        [*command, "--config", str(tmp_path / "run.toml")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    path = tmp_path / "killed" / "metrics.jsonl"
    while process.poll() is None and (not path.exists() or path.stat().st_size == 0):
        time.sleep(0.01)
    time.sleep(random.uniform(0.0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.wait()
    for line in path.read_text().splitlines():
        json.loads(line)  # never half a row
    assert len(metrics.read(path)) <= 12
    done = subprocess.run([*command, "--resume", str(tmp_path / "killed")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert rows_without_time(tmp_path / "killed") == rows_without_time(tmp_path / "whole")


def test_diverging_run_keeps_its_rows_and_says_at_which_step(tmp_path: Path) -> None:
    run = Run(config(tmp_path / "run", optimizer=OptimizerConfig(lr=1e6), steps=30, loss="mse"))
    with pytest.raises(sk.NonFiniteLossError) as caught:
        finish(run)
    rows = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1] == {"step": caught.value.step, "loss": None, "diverged": True}
    assert [row["step"] for row in rows] == list(range(1, caught.value.step + 1))


def test_every_epoch_is_a_new_permutation_of_all_examples() -> None:
    x = torch.arange(10)
    setting = config(Path("unused"), batch_size=3)
    epochs = [torch.cat([batch_at(3 * e + i, setting, x, x)[0] for i in (1, 2, 3)]) for e in range(2)]
    assert all(len(set(epoch.tolist())) == 9 for epoch in epochs)
    assert not torch.equal(*epochs)
    assert batch_at(1, dataclasses.replace(setting, batch_size=None), x, x)[0] is x


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    Run(config(tmp_path / "run"))
    with pytest.raises(ValueError, match="holds a run already"):
        Run(config(tmp_path / "run"))


def test_configuration_survives_toml(tmp_path: Path) -> None:
    setting = config(tmp_path / 'a "b"', seed=3)
    assert from_toml(to_toml(setting)) == setting
    assert from_toml("steps = 5\n[optimizer]\nlr = 1\n").optimizer.lr == 1.0
    for text, message in [
        ("stepz = 5", "unknown option 'stepz'"),
        ("steps = 'five'", "steps = 'five' does not fit"),
        ("[optimizer]\nname = 'sgdd'", "name = 'sgdd' does not fit"),
        ("steps = ", "not TOML"),
        ("steps = 0", "steps must be at least 1, got 0"),
        ("model = 3", "model must be a table"),
        ("[model]\nkind = 'gpt'", "gpt needs text"),
    ]:
        with pytest.raises(ValueError, match=message):
            from_toml(text)


def test_metrics_file_cuts_later_rows_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = metrics.MetricsFile(path)
    for step in (1, 2, 3):
        file.write({"step": step, "loss": float("nan") if step == 2 else 0.5})
    file.close()
    with path.open("a") as torn:
        torn.write('{"step": 4')
    assert [row["loss"] for row in metrics.read(path)] == [0.5, None, 0.5]
    metrics.MetricsFile(path, keep=2).close()
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n'
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="line 1 is no metrics row"):
        metrics.read(path)


def test_damaged_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        checkpoint.load(path)
    checkpoint.save(path, {"step": 3})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="damaged checkpoint"):
        checkpoint.load(path)


def test_rows_are_readable_by_pandas(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    finish(Run(config(tmp_path / "run", optimizer=OptimizerConfig(name="adam", lr=0.01))))
    table = pandas.read_json(tmp_path / "run" / "metrics.jsonl", lines=True)
    columns = {
        "step", "loss", "lr", "sharpness", "sharpness_error", "preconditioned_sharpness", "threshold", "ratio",
        "grad_norm", "matvecs", "seconds",
    }  # fmt: skip
    assert columns <= set(table.columns)
    assert table.step.tolist() == list(range(1, 9))
    assert (table.sharpness > 0).all()
