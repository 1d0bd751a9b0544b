"""Metrics: whole rows or none, whatever happens to the process or the disk."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from pathlib import Path

import pytest

from sharpkern.train import metrics


def filled(path: Path, steps: int) -> str:
    file = metrics.MetricsFile(path)
    for step in range(1, steps + 1):
        file.write({"step": step, "loss": 0.5 / step})
    file.close()
    return path.read_text()


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = metrics.MetricsFile(path)
    file.write({"step": 1, "loss": float("nan"), "threshold": float("inf"), "ratio": float("-inf"), "lr": 0.1})
    file.close()
    assert path.read_text() == '{"step": 1, "loss": null, "threshold": null, "ratio": null, "lr": 0.1}\n'


@pytest.mark.parametrize("torn", ["", "{", '{"step": 4, "lo', '{"step": 4}'])
def test_torn_last_line_is_left_out_and_cut_on_resume(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = filled(path, 3)
    path.write_text(whole + torn)
    assert [row["step"] for row in metrics.read(path)] == [1, 2, 3]
    metrics.MetricsFile(path, keep=3).close()
    assert path.read_text() == whole


@pytest.mark.parametrize("keep", [0, 1, 3, 9])
def test_rows_after_the_checkpoint_are_cut(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = filled(path, 3).splitlines(keepends=True)
    file = metrics.MetricsFile(path, keep=keep)
    assert path.read_text() == "".join(lines[:keep])
    file.write({"step": 4})
    file.close()
    assert path.read_text() == "".join(lines[:keep]) + '{"step": 4}\n'
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_old_file_survives_when_the_cut_one_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = filled(path, 3)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        metrics.MetricsFile(path, keep=1)
    assert path.read_text() == whole


def test_row_is_one_write_of_a_whole_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []
    real = os.write
    file = metrics.MetricsFile(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(os, "write", lambda fd, data: (writes.append(data), real(fd, data))[1])
    row = {"step": 1, "note": "x" * 9000}
    file.write(row)
    monkeypatch.undo()
    file.close()
    assert len(writes) == 1
    assert writes[0].endswith(b"\n")
    assert json.loads(writes[0]) == row


def test_full_disk_leaves_no_half_row(tmp_path: Path) -> None:
    """A limit on the file's size makes the kernel write part of a row, as a full disk does."""
    path = tmp_path / "metrics.jsonl"
    file = metrics.MetricsFile(path)
    file.write({"step": 1, "note": "x" * 100})
    whole = path.read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 40, limits[1]))
    try:
        with pytest.raises(OSError, match="no room for a row of metrics"):
            file.write({"step": 2, "note": "y" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == whole
    file.write({"step": 2})
    file.close()
    assert [row["step"] for row in metrics.read(path)] == [1, 2]


@pytest.mark.parametrize("line", ["{}", "[1]", "3", "null", "{oops", ""])
def test_line_that_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match="metrics.jsonl: line 2 is no metrics row"):
        metrics.read(path)
