"""The command line: exit codes, one-line errors, files in the run folder."""

from __future__ import annotations

import dataclasses
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
import typer
from scipy.sparse.linalg import LinearOperator, eigsh

import sharpkern
from sharpkern import cli
from sharpkern.cli import bench, doctor, options, progress
from sharpkern.train import metrics
from sharpkern.train.build import build_task
from sharpkern.train.config import PRESETS, OptimizerConfig, TrackingConfig, TrainConfig, from_toml, value_of
from sharpkern.train.loop import Run

SMALL = ["--data.limit", "60", "--model.width", "10", "--steps", "4", "--threads", "1"]


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    "options",
    [
        ["--optimizer.lr", "0.05"],
        ["--optimizer.name", "sgd", "--optimizer.momentum", "0.9", "--loss", "mse", "--optimizer.lr", "0.01"],
        ["--optimizer.name", "adam", "--optimizer.lr", "0.001", "--batch-size", "30"],
        ["--model.kind", "cnn", "--model.width", "4", "--optimizer.lr", "0.01"],
        ["--model.kind", "gpt", "--data.name", "text", "--data.context", "8", "--model.width", "16",
         "--model.heads", "2", "--model.blocks", "1", "--optimizer.name", "gi-adam", "--optimizer.lr", "0.001",
         "--batch-size", "6"],
    ],
    ids=["sgd", "momentum", "adam", "cnn", "gpt"],
)  # fmt: skip
def test_train_fills_the_run_folder(tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    code, text, err = run("train", *SMALL, *options, "--out", str(out), capsys=capsys)
    assert code == 0, err
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint.pt", "config.toml", "metrics.jsonl", "run.lock", "sharpness.png", "summary.txt",
    ]  # fmt: skip
    assert "harpness at initialisation" in text
    assert str(out / "sharpness.png") in text
    assert (out / "sharpness.png").read_bytes()[:4] == b"\x89PNG"
    assert len(metrics.read(out / "metrics.jsonl")) == 4


def test_a_critical_start_keeps_the_slope_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--loss", "mse", "--optimizer.lr", "20", "--optimizer.warmup-steps", "400"]
    rows = {}
    flags = {"False": "--no-optimizer.critical-start", "True": "--optimizer.critical-start"}
    for start, flag in flags.items():
        out = str(tmp_path / start)
        code, _, err = run("train", *SMALL, *options, flag, "--out", out, capsys=capsys)
        assert code == 0, err
        rows[start] = [row["lr"] for row in metrics.read(tmp_path / start / "metrics.jsonl")]
    gaps = [b - a for a, b in zip(rows["False"], rows["True"], strict=True)]
    assert gaps[0] > 0 and gaps == pytest.approx([gaps[0]] * len(gaps))
    (tmp_path / "True" / "checkpoint.pt").unlink()
    (tmp_path / "True" / "metrics.jsonl").write_text("")  # as if killed before the first step was written
    assert run("train", "--resume", str(tmp_path / "True"), capsys=capsys)[0] == 0
    again = [row["lr"] for row in metrics.read(tmp_path / "True" / "metrics.jsonl")]
    assert again == pytest.approx(rows["True"])


def test_config_file_reproduces_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    assert run("train", *SMALL, "--optimizer.lr", "0.03", "--out", str(first), capsys=capsys)[0] == 0
    config = str(first / "config.toml")
    assert run("train", "--config", config, "--out", str(second), capsys=capsys)[0] == 0
    losses = [[row["loss"] for row in metrics.read(folder / "metrics.jsonl")] for folder in (first, second)]
    assert losses[0] == losses[1]


def test_diverging_run_exits_with_3_and_keeps_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    options = ["--optimizer.lr", "1e7", "--loss", "mse", "--steps", "30"]
    code, text, err = run("train", *SMALL, *options, "--out", str(out), capsys=capsys)
    assert code == 3
    assert "the loss is" in err and "at step" in err
    assert "diverged" in text
    assert (out / "sharpness.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'? - see sharpkern --help."),
        (["train", "--preset", "demmo"], "'demmo' is not one of 'demo'"),
        (["train", "--config", "nowhere.toml"], "nowhere.toml: no such configuration file"),
        (["train", "--resume", "nowhere"], "nowhere is not a run folder"),
        (["train", "--data.name", "mnist"], "MNIST needs --data-dir"),
        (["train", "--data.name", "cifar-10", "--data.dir", "nowhere"], "data_batch_1.bin: missing"),
        (["train", "--data.name", "text"], "gpt needs text"),
        (["train", "--steps", "0"], "steps must be at least 1, got 0"),
        (["train", "--preset"], "Option '--preset' requires an argument - see sharpkern train --help."),
        (["doctor", "please"], "(please) - see sharpkern doctor --help."),
        (["suggest", "--lr-target", "big"], "Invalid value for '--lr-target': "),
        (["suggest", "--probe-steps", "1.5"], "Invalid value for '--probe-steps': "),
        (["suggest", *SMALL, "--lr-target", "-1"], "lr_target must be positive and finite, got -1.0"),
        (["suggest", *SMALL, "--probe-steps", "3"], "probe_steps must be at least 8"),
        (["suggest", "--stepz", "5"], "see sharpkern suggest --help"),
        (["train", "--stepz", "5"], "No such option: --stepz"),
        (["train", "--steps", "abc"], "Invalid value for '--steps': "),
        (["train", "--steps"], "Option '--steps' requires an argument"),
        (
            ["train", "--data.name", "foo"],
            "'foo' is not one of 'fashion-mnist-5k', ",
        ),
        (["audit", "--model.kind", "mlp"], "see sharpkern audit --help"),
        (["train", "--data.name", "mnist", "--data-dir", "nowhere"], "train-images-idx3-ubyte: missing"),
        (["train", "--data-dir=nowhere", "--data.name=cifar-10"], "data_batch_1.bin: missing"),
        (["train", "--model.kind", "gpt", "--data.name", "text", "--text-file", "nowhere"], "no such text file"),
        (["train", "--config", "binary.toml"], "not TOML: no UTF-8 at byte 0"),
        (["train", *SMALL, "--out", "binary.toml"], "binary.toml: File exists."),
        (["train", *SMALL, "--out", "binary.toml/run"], "binary.toml/run: Not a directory."),
        (["train", "--optimizer.lr", "-1"], "optimizer.lr must be positive and finite, got -1.0"),
        (["train", "--tracking.tol", "3"], "tracking.tol must lie between 0 and 1, got 3.0"),
        (["train", "--step", "5"], "No such option: --step "),
        (
            ["train", "--config", "nowhere.toml", "--preset", "demo"],
            "give --preset or --config, not both.",
        ),
        (["train", *SMALL, "--tracking.probe", "61"], "tracking.probe = 61, but there are only 60 training examples"),
        (["train", "--resume", "nowhere", "--steps", "5"], "--resume takes the run's own configuration"),
        (["suggest", "--resume", "5"], "No such option: --resume"),
        (["bench", "--fast"], "No such option: --fast - see sharpkern bench --help."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_user_errors_are_one_line_and_exit_with_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    code, _, err = run(*arguments, capsys=capsys)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err


def test_interrupt_keeps_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    step = Run.step

    def interrupted(self):
        if self.done == 2:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Run, "step", interrupted)
    out = tmp_path / "run"
    code, _, err = run("train", *SMALL, "--out", str(out), capsys=capsys)
    assert code == 130
    assert "--resume" in err
    assert len(metrics.read(out / "metrics.jsonl")) == 2


def test_interrupt_of_a_command_without_a_run_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "findings", interrupted)
    assert cli.main(["doctor"]) == 130


def test_no_command_is_a_mistake_and_version_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version", capsys=capsys) == (0, f"{sharpkern.__version__}\n", "")
    code, bare, _ = run(capsys=capsys)
    assert code == 2
    assert run("--help", capsys=capsys) == (0, bare, "")


def test_progress_is_plain_lines_where_no_terminal_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    code, _, err = run("train", *SMALL, "--out", str(tmp_path / "run"), capsys=capsys)
    assert code == 0
    lines = [line for line in err.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0] for line in lines] == [f"step {i}/4" for i in range(1, 5)]
    assert lines[-1].endswith(", 0 s left")
    assert all(", loss " in line and ", sharpness x lr " in line for line in lines)
    assert "\r" not in err


def test_resume_of_a_finished_run_draws_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run("train", *SMALL, "--out", str(out), capsys=capsys)[0] == 0
    rows = (out / "metrics.jsonl").read_bytes()
    (out / "sharpness.png").unlink()
    assert run("train", "--resume", str(out), capsys=capsys)[0] == 0
    assert (out / "sharpness.png").is_file()
    assert (out / "metrics.jsonl").read_bytes() == rows
    code, _, err = run("train", *SMALL, "--out", str(out), capsys=capsys)
    assert code == 2
    assert "holds a run already" in err


def test_audit_prints_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, err = run("audit", *SMALL, capsys=capsys)
    assert code == 0, err
    assert text.strip().splitlines()[-1].startswith("Trustworthy")


@pytest.mark.parametrize("options", [["--loss", "mse"], ["--batch-size", "20", "--optimizer.name", "adam"]])
def test_suggest_recommends_options_that_train(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, err = run("suggest", *SMALL, *options, "--probe-steps", "8", capsys=capsys)
    assert code == 0, err
    for words in ("harpness at the start", "Critical learning rate", "Natural trend", "Largest sensible target",
                  "Recommended target", "Recommended initial", "Recommended warmup", "Cost"):  # fmt: skip
        assert words in text
    advice = text.strip().splitlines()[-1].partition(" with ")[2].split()
    assert [o for o in advice if o.startswith("--")] == [
        "--optimizer.lr", "--optimizer.lr-init", "--optimizer.warmup-steps"
    ]  # fmt: skip
    out = str(tmp_path / "run")
    code, text, err = run("train", *SMALL, *options, *advice, "--steps", "10", "--out", out, capsys=capsys)
    assert code == 0, err
    losses = [row["loss"] for row in metrics.read(tmp_path / "run" / "metrics.jsonl")]
    assert sum(losses[5:]) < 2.5 * sum(losses[:5])


def test_suggest_takes_the_target_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, err = run(
        "suggest", *SMALL, "--loss", "mse", "--probe-steps", "8", "--lr-target=0.00123", capsys=capsys
    )
    assert code == 0, err
    assert "Recommended target: 0.00123, as asked." in text
    assert "--optimizer.lr 0.00123 --optimizer.lr-init 0.00123 --optimizer.warmup-steps 1" in text


def test_doctor_lists_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run("doctor", capsys=capsys)
    assert code == 0
    for backend in ("cuda", "triton", "cpu", "reference"):
        assert f"backend {backend}: " in text


# What a command's help must show, and options of other commands that it must not.
HELP = {
    "train": ("--preset --config --resume --task --steps --tracking.k --optimizer.lr --out", "--lr-target"),
    "suggest": ("--preset --config --task --probe-steps --optimizer.beta2", "--resume --steps --out --optimizer.lr"),
    "audit": ("--preset --config --task --batch-size --model.kind", "--resume --steps --out --checkpoint-every --opt"),
    "sweep": ("--processes --submitit --list", "--task --steps"),
    "report": ("--partial", "--task --steps"),
    "bench": ("--quick --threads --rounds --seconds --out", "--task --steps"),
    "doctor": ("--help", "--task --steps --out"),
}


@pytest.mark.parametrize("command", ["", *HELP])
def test_help_shows_own_options_and_exit_codes_without_torch(command: str) -> None:
    code = f"""
import sys
from sharpkern.cli import main
assert main({[*filter(None, [command]), "--help"]!r}) == 0
assert "torch" not in sys.modules
"""
    # A narrow terminal breaks no name apart, and colours are not used even where they are asked for.
    env = {**os.environ, "COLUMNS": "40", "FORCE_COLOR": "1"}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
    assert "\x1b" not in shown
    words = shown.replace(",", " ").split()
    has, has_not = HELP.get(command, (" ".join(HELP), "--task"))
    assert set(has.split()) <= set(words)
    assert not [word for word in words for other in has_not.split() if word == other or word.startswith(f"{other}.")]
    codes = shown.partition("exit codes:")[2].splitlines()[1:]
    assert [line.split()[0] for line in codes] == ["0", "1", "2", "3", "130"]


def configuration(*flags: str) -> TrainConfig:
    """What a command with all options of a run is given for these flags."""
    found: list[TrainConfig] = []
    app = typer.Typer(add_completion=False)
    app.command()(options.with_run_options(*options.EVERYTHING)(lambda config: found.append(config)))
    typer.main.get_command(app).main(list(flags), standalone_mode=False)
    return found[0]


def declared(table: object, prefix: str = "") -> Iterator[tuple[str, type, object]]:
    """Key, type and default of every option."""
    hints = get_type_hints(type(table))
    for name, default in vars(table).items():
        if dataclasses.is_dataclass(default):
            yield from declared(default, f"{name}.")
        else:
            yield prefix + name, hints[name], default


def test_every_option_of_a_run_has_a_flag_that_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainConfig, "validate", lambda self: None)  # any one value, whether or not it fits the others
    plain = TrainConfig()
    for key, kind, default in declared(plain):
        flag, kinds = key.replace("_", "-"), get_args(kind) or (kind,)
        if bool in kinds:
            flags, wanted = [f"--no-{flag}" if default else f"--{flag}"], not default
        else:
            # The first other one of a few words, or any number or text.
            wanted = next(x for x in kinds if x != default) if isinstance(kinds[0], str) else kinds[0]("7")
            flags = [f"--{flag}", str(wanted)]
        changed = configuration(*flags)
        assert value_of(changed, key) == wanted != default
        assert [k for k, *_ in declared(plain) if value_of(changed, k) != value_of(plain, k)] == [key]


def test_flags_override_a_preset_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("steps = 5\n[tracking]\nk = 3\nbudget = 0.1\n[optimizer]\nlr = 0.4\n")
    path = str(tmp_path / "run.toml")
    assert configuration("--config", path, "--optimizer.lr", "0.2", "--no-tracking.dataset") == TrainConfig(
        steps=5, optimizer=OptimizerConfig(lr=0.2), tracking=TrackingConfig(k=3, budget=0.1)
    )
    found = configuration("--preset", "demo", "--steps", "90")
    assert found == dataclasses.replace(PRESETS["demo"], steps=90)


@pytest.mark.parametrize("kind", ["toml", "flags"])
def test_tracking_options_reach_the_rows(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tracking.k", "3", "--tracking.probe", "20", "--tracking.max-matvecs", "60"]
    if kind == "toml":
        (tmp_path / "run.toml").write_text("[tracking]\nk = 3\nprobe = 20\nmax_matvecs = 60\n")
        arguments = ["--config", str(tmp_path / "run.toml")]
    out = tmp_path / "run"
    code, _, err = run("train", *arguments, *SMALL, "--batch-size", "30", "--out", str(out), capsys=capsys)
    assert code == 0, err
    row = metrics.read(out / "metrics.jsonl")[0]
    made = build_task(from_toml((out / "config.toml").read_text()))
    inputs, targets = made.data.train_inputs[:20], made.targets[:20]
    params = list(made.model.parameters())
    gradient = torch.autograd.grad(made.loss_fn(made.model(inputs), targets), params, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradient])

    def product(v: np.ndarray) -> np.ndarray:
        parts = torch.autograd.grad(flat, params, torch.from_numpy(v).float().flatten(), retain_graph=True)
        return torch.cat([p.flatten() for p in parts]).numpy()

    operator = LinearOperator((len(flat), len(flat)), matvec=product, dtype=np.float32)
    truth = eigsh(operator, k=3, which="LA", return_eigenvectors=False)
    assert row["eigenvalues"] == pytest.approx(sorted(truth, reverse=True), rel=1e-2)
    assert row["sharpness"] == row["eigenvalues"][0] and row["sharpness_error"] > 0
    assert row["status"] == "measured" and row["converged"] is True


def test_whole_training_set_is_tracked_in_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {}
    for size, more in (("60", []), ("25", ["--tracking.dataset"])):
        out = tmp_path / size
        code, _, err = run(
            "train", *SMALL, "--batch-size", size, *more, "--tracking.tol", "1e-4", "--tracking.max-matvecs", "300",
            "--out", str(out), capsys=capsys,
        )  # fmt: skip
        assert code == 0, err
        rows[size] = metrics.read(out / "metrics.jsonl")[0]
    assert rows["25"]["loss"] != rows["60"]["loss"]
    assert rows["25"]["sharpness"] == pytest.approx(rows["60"]["sharpness"], rel=1e-3)


def test_budget_is_handed_to_the_tracker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = ["--tracking.budget", "1e-6", "--steps", "8", "--out", str(out)]
    assert run("train", *SMALL, *arguments, capsys=capsys)[0] == 0
    assert [row["status"] for row in metrics.read(out / "metrics.jsonl")] == ["measured"] + 7 * ["carried"]


def test_bench_hands_its_options_to_the_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    done = subprocess.CompletedProcess([], 5)
    monkeypatch.setattr(bench.subprocess, "run", lambda command: called.append(command) or done)
    assert cli.main(["bench", "--quick", "--rounds", "3", "--seconds=0.5"]) == 5
    assert called == [[sys.executable, str(bench.find()), "--quick", "--rounds=3", "--seconds=0.5"]]
    source = bench.find().read_text()
    assert all(f'"--{name}"' in source for name in inspect.signature(bench.run).parameters)


def test_a_run_without_products_measures_along_the_gradient(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {}
    for name, chosen in (("with", ["--tracking.directions"]), ("without", ["--no-tracking.products"])):
        out = tmp_path / name
        arguments = [*SMALL, "--batch-size", "30", "--optimizer.momentum", "0.5", "--tracking.chunk", "20"]
        code, printed, err = run("train", *arguments, *chosen, "--out", str(out), capsys=capsys)
        assert code == 0, err
        rows[name] = metrics.read(out / "metrics.jsonl")
        assert "Batch sharpness x lr" in printed and (out / "sharpness.png").stat().st_size > 0
    for a, b in zip(rows["with"], rows["without"], strict=True):
        assert (a["status"], b["status"], b["matvecs"], b["sharpness"]) == ("measured", "untracked", 0, None)
        for key in ("loss", "batch_sharpness", "update_curvature"):
            assert b[key] == pytest.approx(a[key], rel=1e-4)
