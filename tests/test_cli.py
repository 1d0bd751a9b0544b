"""The command line: exit codes, one-line errors, files in the run folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sharpkern import cli
from sharpkern.train import metrics

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
        "checkpoint.pt", "config.toml", "metrics.jsonl", "sharpness.png", "summary.txt",
    ]  # fmt: skip
    assert "harpness at initialisation" in text
    assert str(out / "sharpness.png") in text
    assert (out / "sharpness.png").read_bytes()[:4] == b"\x89PNG"
    assert len(metrics.read(out / "metrics.jsonl")) == 4


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
        (["trian"], "unknown command 'trian'"),
        (["train", "--preset", "demmo"], "unknown preset 'demmo'"),
        (["train", "--config", "nowhere.toml"], "nowhere.toml: no such configuration file"),
        (["train", "--resume", "nowhere"], "nowhere is not a run folder"),
        (["train", "--data.name", "mnist"], "MNIST needs --data-dir"),
        (["train", "--data.name", "cifar-10", "--data.dir", "nowhere"], "data_batch_1.bin: missing"),
        (["train", "--data.name", "text"], "gpt needs text"),
        (["train", "--steps", "0"], "steps must be at least 1, got 0"),
        (["train", "--preset"], "--preset needs a value"),
        (["doctor", "please"], "doctor takes no options"),
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
    code, _, err = run(*arguments, capsys=capsys)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err


def test_interrupt_keeps_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    from sharpkern.train.loop import Run

    step = Run._step

    def interrupted(self, number: int):
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Run, "_step", interrupted)
    out = tmp_path / "run"
    code, _, err = run("train", *SMALL, "--out", str(out), capsys=capsys)
    assert code == 130
    assert "--resume" in err
    assert len(metrics.read(out / "metrics.jsonl")) == 2


def test_audit_prints_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, err = run("audit", *SMALL, capsys=capsys)
    assert code == 0, err
    assert text.strip().splitlines()[-1].startswith("Trustworthy")


def test_doctor_lists_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run("doctor", capsys=capsys)
    assert code == 0
    for backend in ("cuda", "triton", "cpu", "reference"):
        assert f"backend {backend}: " in text


def test_help_does_not_import_torch() -> None:
    code = "import sys; from sharpkern.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "train" in done.stdout
