"""A user's own model, loss and data on the command line: trained, resumed, audited, suggested for, refused."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch

import sharpkern as sk
from sharpkern import cli
from sharpkern.train import metrics
from sharpkern.train.config import from_toml
from sharpkern.train.loop import Run


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


OWN = """
import torch
from torch.utils.data import DataLoader, TensorDataset

def parts(data):
    model = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
    return model, torch.nn.MSELoss(), data

def examples():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, generator=g)
    return x, torch.randn(12, 2, generator=g) + x[:, :2]

def batch(): return parts(examples())
def loader(): return parts(DataLoader(TensorDataset(*examples()), batch_size=5))
def generator(): return parts((x, y) for x, y in zip(*(t.split(4) for t in examples())))
def pair(): return parts(None)[:2]
def number(): return 3
def no_model(): return (3, torch.nn.MSELoss(), examples())
def no_loss(): return (parts(None)[0], "mse", examples())
def tensor(): return parts(examples()[0])
def listed(): return parts(list(examples()))
def nothing(): return parts([])
def broken(): return {}["key"]
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of its own name in the current directory, and the name."""
    name = f"own_{os.urandom(4).hex()}"
    (tmp_path / f"{name}.py").write_text(OWN)
    (tmp_path / f"{name}_imports.py").write_text("import missing_dependency")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    return name


@pytest.mark.parametrize(("function", "optimizer"), [("batch", "sgd"), ("loader", "adam"), ("generator", "gi-adam")])
def test_train_takes_a_users_own_task(
    own: str, function: str, optimizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ["--steps", "7", "--seed", "4", "--optimizer.name", optimizer, "--optimizer.lr", "0.03"]
    warmup = ["--optimizer.warmup-steps", "3", "--tracking.k", "2", "--checkpoint-every", "2", "--threads", "1"]
    code, text, err = run(
        "train", "--task", f"{own}:{function}", *steps, *warmup, "--out", "run", capsys=capsys
    )  # fmt: skip
    assert code == 0, err
    assert f"{own}:{function}, {1 if function == 'batch' else 3} batch(es)" in text
    rows = metrics.read(Path("run/metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, 8)) and len(rows[0]["eigenvalues"]) == 2
    assert {p.name for p in Path("run").iterdir()} >= {"sharpness.png", "summary.txt", "checkpoint.pt"}
    torch.manual_seed(4)
    model, loss_fn, data = getattr(sys.modules[own], function)()
    batches = [data] if isinstance(data, tuple) else list(data)
    inner = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "gi-adam": sk.GIAdam}[optimizer](model.parameters())
    for row in rows:  # a plain loop
        inner.param_groups[0]["lr"] = 0.03 * min(1.0, row["step"] / 3)
        x, y = batches[(row["step"] - 1) % len(batches)]
        loss = loss_fn(model(x), y)
        inner.zero_grad()
        loss.backward()
        inner.step()
        assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)


def test_run_of_an_own_task_resumes_with_the_same_rows(own: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--task", f"{own}:loader", "--steps", "7", "--checkpoint-every", "3"]
    assert run(*arguments, "--out", "whole", capsys=capsys)[0] == 0
    cut = Run(dataclasses.replace(from_toml(Path("whole/config.toml").read_text()), out=Path("cut")))
    steps = cut.steps()
    for _ in range(5):
        next(steps)
    steps.close()
    assert run("train", "--resume", "cut", capsys=capsys)[0] == 0
    whole, resumed = ([r | {"seconds": 0} for r in metrics.read(Path(n, "metrics.jsonl"))] for n in ("whole", "cut"))
    assert whole == resumed and len(whole) == 7


@pytest.mark.parametrize("function", ["batch", "loader"])
def test_audit_and_suggest_take_a_users_own_task(own: str, function: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, err = run("audit", "--task", f"{own}:{function}", capsys=capsys)
    assert code == 0, err
    assert "Trustworthy" in text
    code, text, err = run("suggest", "--task", f"{own}:{function}", "--probe-steps", "8", capsys=capsys)
    assert code == 0, err
    advice = text.strip().splitlines()[-1].partition(" with ")[2].split()
    arguments = ["--task", f"{own}:{function}", *advice, "--steps", "20", "--out", "run"]
    assert run("train", *arguments, capsys=capsys)[0] == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere_at_all:f", "no module named 'nowhere_at_all'"),
        ("OWN.inner:f", "no module named "),
        ("OWN:nobody", "the module OWN has no function 'nobody'"),
        ("OWN:OWN", "has no function"),
        ("OWN", "task must be package.module:function, got 'OWN'"),
        (":f", "task must be package.module:function, got ':f'"),
        ("OWN_imports:f", "raised ModuleNotFoundError: No module named 'missing_dependency' (OWN_imports.py, line 1)"),
        ("OWN:number", "must return (model, loss_fn, data), got int"),
        ("OWN:pair", "must return (model, loss_fn, data), got a tuple of 2"),
        ("OWN:no_model", "where the model is a torch.nn.Module, got int"),
        ("OWN:no_loss", "where loss_fn can be called, got str"),
        ("OWN:tensor", "where data are a batch or an iterable of batches, got Tensor"),
        ("OWN:listed", "where a batch is (inputs, targets) or a dict, got Tensor"),
        ("OWN:nothing", "but its data hold no batch"),
        ("OWN:broken", "broken() raised KeyError: 'key' (OWN.py, line 24)"),
    ],
)
@pytest.mark.parametrize("command", ["train", "audit"])
def test_wrong_tasks_are_one_sentence(
    own: str, command: str, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(command, "--task", name.replace("OWN", own), capsys=capsys)
    assert code == 2
    assert message.replace("OWN", own) in err
    assert len(err.strip().splitlines()) == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "option", [["--model.width", "3"], ["--loss", "mse"], ["--batch-size", "4"], ["--data.limit", "9"]]
)
def test_options_that_a_task_would_ignore_are_refused(
    own: str, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run("train", "--task", f"{own}:batch", *option, capsys=capsys)
    assert code == 2
    assert "a task brings its own model, data and loss: leave out " in err
