"""Runs: reproducible, resumable after any interruption, and honest when they diverge."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sharpkern as sk
from sharpkern.curvature.losses import NonFiniteLossError
from sharpkern.rop.recompute import RecomputedProgram
from sharpkern.train import checkpoint, metrics
from sharpkern.train.build import batch_at
from sharpkern.train.config import DataConfig, ModelConfig, OptimizerConfig, TrackingConfig, TrainConfig, to_toml
from sharpkern.train.loop import Run
from sharpkern.train.summary import summary_lines


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


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "gi-adam", "ri-adam"])
def test_same_seed_gives_the_same_rows(tmp_path: Path, optimizer: str) -> None:
    chosen = OptimizerConfig(name=optimizer, lr=0.01, warmup_steps=4, momentum=0.9)
    for name in ("a", "b"):
        finish(Run(config(tmp_path / name, optimizer=chosen)))
    assert rows_without_time(tmp_path / "a") == rows_without_time(tmp_path / "b")
    assert len(rows_without_time(tmp_path / "a")) == 8


def test_recomputing_run_gives_the_same_values(tmp_path: Path) -> None:
    runs = {
        kept: Run(config(tmp_path / str(kept), tracking=TrackingConfig(recompute=not kept))) for kept in (True, False)
    }
    rows = {kept: finish(run) for kept, run in runs.items()}
    engines = {kept: run.tracker.hessian.engine.program for kept, run in runs.items()}
    assert isinstance(engines[False], RecomputedProgram) and not isinstance(engines[True], RecomputedProgram)
    for kept, again in zip(rows[True], rows[False], strict=True):
        assert again["sharpness"] == pytest.approx(kept["sharpness"], rel=1e-4)
        assert again["loss"] == pytest.approx(kept["loss"], rel=1e-5)


def test_rows_hold_what_a_plain_training_run_computes(tmp_path: Path) -> None:
    run = Run(config(tmp_path / "run", loss="mse"))
    model = type(run.model)(784, 10, depth=3, width=12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for row in finish(run):
        x, y = run.task.batch(row["step"])
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


@pytest.mark.parametrize("optimizer", ["adam", "gi-adam"])
def test_rows_hold_what_shows_that_adam_fails(tmp_path: Path, optimizer: str) -> None:
    chosen = OptimizerConfig(name=optimizer, lr=0.01, beta1=0.8, beta2=0.9, eps=1e-4)
    run = Run(config(tmp_path / "run", optimizer=chosen, loss="mse", seed=random.randrange(2**31)))
    with torch.no_grad():  # one unit of the first layer is off
        run.model.layers[0].weight[3] = 0.0
        run.model.layers[0].bias[3] = -1.0
    model = copy.deepcopy(run.model).double()
    x, y = (t.double() for t in run.task.batch(1))
    model(x).sub(y).square().mean().mul(0.5).backward()
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    row = finish(run)[0]
    assert row["m_norm"] == pytest.approx(0.2 * float(g.norm()), rel=1e-4)
    share = 0.1 if optimizer == "adam" else 1.0
    assert row["v_norm"] == pytest.approx(share * float((g * g).norm()), rel=1e-4)
    assert row["grad_norm"] == pytest.approx(float(g.norm()), rel=1e-4)
    dead = sum(int((layer.weight.grad == 0).all(1).sum()) for layer in model.layers)
    assert row["dead_units"] == dead / 34 >= 1 / 34
    # Adam's first step is -lr g / |g|, GI-Adam's shorter by the root of 1 - beta2: P^-1 follows
    params = list(model.parameters())
    names = [name for name, _ in model.named_parameters()]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([p.numel() for p in params])
        views = {n: part.view(p.shape) for n, part, p in zip(names, parts, params, strict=True)}
        return 0.5 * (torch.func.functional_call(model, views, (x,)) - y).square().mean()

    flat = torch.cat([p.detach().flatten() for p in params])
    for name, root in (("initial_adam", 1.0), ("initial_gi_adam", 0.1**-0.5)):
        scale = (0.2 * (root * g.abs() + 1e-4)).rsqrt()
        v = torch.randn_like(flat)
        for _ in range(300):  # a power iteration on P^-1/2 H P^-1/2, shifted against large negative eigenvalues
            product = scale * torch.autograd.functional.vhp(loss, flat, scale * v)[1]
            value = float(v @ product / (v @ v))
            v = product + 0.5 * abs(value) * v
            v /= v.norm()
        assert row[name] == pytest.approx(value, rel=2e-2)
    assert row[f"initial_{optimizer.replace('-', '_')}"] == pytest.approx(row["preconditioned_sharpness"], rel=1e-2)
    assert "initial_adam" not in metrics.read(tmp_path / "run" / "metrics.jsonl")[1]
    assert f"{row['initial_adam']:.4g} for Adam" in "\n".join(summary_lines([row]))


@pytest.mark.parametrize("optimizer", ["sgd", "gi-adam"])
def test_run_that_takes_over_a_program_gives_the_same_rows(tmp_path: Path, optimizer: str) -> None:
    diverging = OptimizerConfig(lr=1e7)
    first = Run(config(tmp_path / "first", loss="mse", optimizer=diverging, seed=random.randrange(2**31)))
    with pytest.raises(NonFiniteLossError):
        finish(first)
    chosen = OptimizerConfig(name=optimizer, lr=0.01, warmup_steps=4)
    seed = random.randrange(2**31)
    finish(Run(config(tmp_path / "own", loss="mse", optimizer=chosen, seed=seed)))
    finish(Run(config(tmp_path / "shared", loss="mse", optimizer=chosen, seed=seed), like=first))
    assert rows_without_time(tmp_path / "shared") == rows_without_time(tmp_path / "own")


@pytest.mark.parametrize(
    "other",
    [
        {"loss": "cross-entropy"},
        {"batch_size": 7},
        {"data": DataConfig(limit=30)},
        {"tracking": TrackingConfig(recompute=True)},
    ],
)
def test_run_takes_over_no_other_program(tmp_path: Path, other: dict) -> None:
    first = Run(config(tmp_path / "first", loss="mse"))
    with pytest.raises(ValueError, match="another model, data, loss, batch size or recompute"):
        Run(config(tmp_path / "second", **{"loss": "mse"} | other), like=first)


@pytest.mark.parametrize("optimizer", ["sgd", "ri-adam"])
def test_resumed_run_gives_the_same_rows(tmp_path: Path, optimizer: str) -> None:
    chosen = OptimizerConfig(name=optimizer, lr=0.05, warmup_steps=4)
    finish(Run(config(tmp_path / "whole", optimizer=chosen)))
    run = Run(config(tmp_path / "cut", optimizer=chosen))
    steps = run.steps()
    for _ in range(5):  # two steps beyond the checkpoint at step 3
        next(steps)
    steps.close()
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    finish(Run(config(tmp_path / "cut", optimizer=chosen), resume=True))
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


def test_damaged_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        checkpoint.load(path)
    checkpoint.save(path, {"step": 3})
    whole = path.read_bytes()
    torch.save({"step": 3}, path)  # without the random numbers' state
    other = path.read_bytes()
    for content in (whole[:-40], b"", b"hello", other):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged checkpoint") as caught:
            checkpoint.load(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    assert checkpoint.load(path) == {"step": 3}


def test_checkpoint_holds_no_code(tmp_path: Path) -> None:
    run = Run(config(tmp_path / "run", optimizer=OptimizerConfig(name="adam", lr=0.01)))
    finish(run)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert {"step", "model", "optimizer", "schedule", "tracker", "rng"} == state.keys()
    assert state["step"] == 8


@pytest.mark.parametrize("left", [["config.toml"], ["config.toml", "metrics.jsonl"]], ids="+".join)
def test_run_killed_before_its_first_checkpoint_resumes_from_the_start(tmp_path: Path, left: list[str]) -> None:
    finish(Run(config(tmp_path / "whole")))
    folder = tmp_path / "killed"
    Run(config(folder))
    (folder / "checkpoint.pt").rename(folder / "checkpoint.pt.tmp")
    for name in {"metrics.jsonl"} - set(left):
        (folder / name).unlink()
    finish(Run(config(folder), resume=True))
    assert rows_without_time(folder) == rows_without_time(tmp_path / "whole")


def test_run_that_lost_its_checkpoint_keeps_its_rows(tmp_path: Path) -> None:
    finish(Run(config(tmp_path / "run")))
    (tmp_path / "run" / "checkpoint.pt").unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        Run(config(tmp_path / "run"), resume=True)
    assert len(rows_without_time(tmp_path / "run")) == 8


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
