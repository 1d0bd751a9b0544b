"""What may happen to a run from outside: a second process, a removed folder, a full disk, signals that end it."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train_loop import config, finish, rows_without_time

from sharpkern.train import checkpoint, loop, metrics
from sharpkern.train.config import to_toml
from sharpkern.train.lock import NAME, FolderLock
from sharpkern.train.loop import Run
from sharpkern.train.signals import ended_like_ctrl_c


def started(tmp_path: Path, steps: int) -> subprocess.Popen:
    """A run in another process, which has written a row."""
    wanted = config(tmp_path / "run", steps=steps, checkpoint_every=2)
    (tmp_path / "run.toml").write_text(to_toml(wanted))
    command = [sys.executable, "-m", "sharpkern.cli", "train", "--config", str(tmp_path / "run.toml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    path = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and path.stat().st_size):
        time.sleep(0.01)
    return process


# That a kill leaves no lock: ``test_train_loop.test_killed_run_resumes_with_the_same_rows``.
@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGHUP", marks=pytest.mark.slow)])
def test_second_process_is_refused_and_a_signal_ends_the_first_as_ctrl_c_does(tmp_path: Path, name: str) -> None:
    process = started(tmp_path, steps=100_000)
    with pytest.raises(ValueError, match=f"{tmp_path}/run is in use by process {process.pid}: wait for its end"):
        Run(config(tmp_path / "run"), resume=True)
    process.send_signal(getattr(signal, name))
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert told.splitlines()[-1] == "sharpkern: interrupted; the run folder keeps what was done, --resume continues."
    assert "Traceback" not in told
    assert (tmp_path / "run" / "summary.txt").exists()
    steps = [row["step"] for row in metrics.read(tmp_path / "run" / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))


def test_signals_are_put_back_and_ignored_ones_stay_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_like_ctrl_c():
            os.kill(os.getpid(), signal.SIGHUP)  # nohup
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        found = []

        def elsewhere() -> None:
            with ended_like_ctrl_c():
                found.append(signal.getsignal(signal.SIGTERM))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert found == [signal.SIG_DFL]
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_each_signal_ends_the_block_as_ctrl_c_does(name: str) -> None:
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with ended_like_ctrl_c():
            assert signal.getsignal(number) != signal.SIG_DFL  # which would end this process
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_lock_names_its_holder_and_nobody_before(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("12345678901\n")  # of a process that is gone
    lock = FolderLock(tmp_path)
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()}: wait"):
        FolderLock(tmp_path)
    lock.release()
    FolderLock(tmp_path).release()


def test_folder_is_held_by_one_run_of_a_process(tmp_path: Path) -> None:
    run = Run(config(tmp_path / "run"))
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
        Run(config(tmp_path / "run"), resume=True)
    run.cycle = run  # a dropped run is no holder, though only the collector can tell
    del run
    finished = Run(config(tmp_path / "run"), resume=True)
    finish(finished)
    finish(Run(config(tmp_path / "run", steps=9), resume=True))  # a finished run is none either


def test_run_that_was_begun_meanwhile_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look into the folder and its lock lies the building of the task, which takes seconds."""
    other = tmp_path / "run" / "metrics.jsonl"

    def slow(*arguments: Any, **keywords: Any) -> Any:
        other.parent.mkdir()
        other.write_text('{"step": 1}\n')
        return build(*arguments, **keywords)

    build = loop.build_task
    monkeypatch.setattr(loop, "build_task", slow)
    with pytest.raises(ValueError, match="holds a run already"):
        Run(config(tmp_path / "run"))
    assert other.read_text() == '{"step": 1}\n'


def test_failed_start_leaves_no_lock(tmp_path: Path) -> None:
    run = Run(config(tmp_path / "run"))
    run.close()
    path = tmp_path / "run" / "checkpoint.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    for _ in range(2):
        with pytest.raises(ValueError, match="damaged checkpoint"):
            Run(config(tmp_path / "run"), resume=True)
    path.write_bytes(whole)
    finish(Run(config(tmp_path / "run"), resume=True))


@pytest.mark.parametrize("at", [2, 5])
def test_removed_folder_is_written_again_and_the_run_ends_in_one_line(tmp_path: Path, at: int) -> None:
    finish(Run(config(tmp_path / "whole")))
    steps = Run(config(tmp_path / "run")).steps()
    for _ in range(at):
        next(steps)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(OSError, match=rf"run was removed during the run: .* with the {at + 1} steps") as told:
        next(steps)
    assert "\n" not in str(told.value) and told.value.errno is None
    resumed = Run(config(tmp_path / "run"), resume=True)
    assert resumed.done == at + 1
    finish(resumed)
    assert rows_without_time(tmp_path / "run") == rows_without_time(tmp_path / "whole")


def test_folder_that_another_run_has_taken_is_left_alone(tmp_path: Path) -> None:
    steps = Run(config(tmp_path / "run")).steps()
    next(steps)
    shutil.rmtree(tmp_path / "run")
    finish(Run(config(tmp_path / "run", seed=1)))
    theirs = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(OSError, match="was replaced by another file"):
        next(steps)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == theirs


def test_full_disk_keeps_whole_rows_and_the_last_checkpoint(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the row of a step does not fit."""
    finish(Run(config(tmp_path / "whole")))
    run = Run(config(tmp_path / "run"))
    steps = run.steps()
    for _ in range(4):
        next(steps)
    size = (tmp_path / "run" / "metrics.jsonl").stat().st_size
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"^{tmp_path}/run: .* at step 5; earlier rows and the last checkpoint"):
            next(steps)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size == size
    finish(Run(config(tmp_path / "run"), resume=True))
    assert rows_without_time(tmp_path / "run") == rows_without_time(tmp_path / "whole")


def test_full_disk_leaves_no_part_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(config(tmp_path / "run"))
    steps = run.steps()
    next(steps)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    next(steps)
    with pytest.raises(OSError, match="run: No space left on device at step 3; earlier rows"):
        next(steps)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_checkpoint_brings_back_the_random_numbers_to_come(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "checkpoint.pt", {"step": 1})
    wanted = torch.randn(5)
    torch.randn(3)
    checkpoint.load(tmp_path / "checkpoint.pt")
    assert torch.equal(torch.randn(5), wanted)


def test_flipped_bit_in_a_weight_is_noticed(tmp_path: Path) -> None:
    """torch reads such a file without a word."""
    path = tmp_path / "checkpoint.pt"
    weight = torch.randn(1000)
    checkpoint.save(path, {"step": 1, "model": {"w": weight}})
    content = bytearray(path.read_bytes())
    place = content.index(weight.numpy().tobytes()) + int(torch.randint(0, 4000, ()))
    content[place] ^= 1 << int(torch.randint(0, 8, ()))
    path.write_bytes(content)
    assert not torch.equal(torch.load(path)["model"]["w"], weight)
    with pytest.raises(ValueError, match="damaged checkpoint .*checksum"):
        checkpoint.load(path)


def test_checkpoint_of_another_run_is_refused_by_name(tmp_path: Path) -> None:
    Run(config(tmp_path / "run")).close()
    path = tmp_path / "run" / "checkpoint.pt"
    for state in ({}, {"step": 1, "model": {}}, {"step": "x"}, {"step": 1, "model": 3}):
        checkpoint.save(path, state)
        with pytest.raises(ValueError, match="checkpoint.pt: not a checkpoint of this run") as told:
            Run(config(tmp_path / "run"), resume=True)
        assert "\n" not in str(told.value)
