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


def test_a_critical_start_keeps_the_slope_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--loss", "mse", "--optimizer.lr", "20", "--optimizer.warmup-steps", "400"]
    rows = {}
    for start in ("False", "True"):
        out = str(tmp_path / start)
        code, _, err = run("train", *SMALL, *options, "--optimizer.critical-start", start, "--out", out, capsys=capsys)
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
        (["suggest", "--lr-target", "big"], "--lr-target must be a number, got 'big'"),
        (["suggest", "--probe-steps", "1.5"], "--probe-steps must be whole, got '1.5'"),
        (["suggest", *SMALL, "--lr-target", "-1"], "lr_target must be positive and finite, got -1.0"),
        (["suggest", *SMALL, "--probe-steps", "3"], "probe_steps must be at least 8"),
        (["suggest", "--stepz", "5"], "see sharpkern suggest --help"),
        (["train", "--stepz", "5"], "Unrecognized options: --stepz, 5; see sharpkern train --help"),
        (["train", "--steps", "abc"], "Error parsing --steps: invalid literal for int() with base 10: 'abc'"),
        (["train", "--steps"], "Missing value for argument '--steps'"),
        (["train", "--data.name", "foo"], "invalid choice 'foo' for argument '--data.name'"),
        (["audit", "--model.kind", "mlp"], "see sharpkern audit --help"),
        (["train", "--data.name", "mnist", "--data-dir", "nowhere"], "train-images-idx3-ubyte: missing"),
        (["train", "--data-dir=nowhere", "--data.name=cifar-10"], "data_batch_1.bin: missing"),
        (["train", "--model.kind", "gpt", "--data.name", "text", "--text-file", "nowhere"], "no such text file"),
        (["train", "--config", "binary.toml"], "can't decode byte 0xff"),
        (["train", *SMALL, "--out", "binary.toml"], "binary.toml: File exists."),
        (["train", *SMALL, "--out", "binary.toml/run"], "binary.toml/run: Not a directory."),
        (["train", *SMALL, "--optimizer.lr", "-1"], "Invalid learning rate: -1.0"),
        (["train", *SMALL, "--tracking.tol", "3"], "tol must lie between 0 and 1, got 3.0"),
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
    from sharpkern.train.loop import Run

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


def test_progress_is_plain_lines_where_no_terminal_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_SECONDS_BETWEEN_LINES", 0.0)
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


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], "doctor"),
        (["train", "--help"], "--preset demo"),
        (["suggest", "--help"], "--probe-steps"),
        (["audit", "-h"], "--model.kind"),
    ],
)
def test_help_does_not_import_torch(arguments: list[str], expected: str) -> None:
    code = f"""
import sys
from sharpkern.cli import main
try:
    main({arguments!r})
except SystemExit as done:
    assert not done.code
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert expected in done.stdout
