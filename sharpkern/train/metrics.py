"""Metrics as JSON lines: one row a step, never half a row."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class MetricsFile:
    """Appends rows; each is one write of a whole line.

    Args:
        path: the file.
        keep: rows of steps up to this one are kept, later ones and a torn last line are cut (atomically), as a resumed
            run needs it.
    """

    def __init__(self, path: Path, *, keep: int = 0) -> None:
        rows = [row for row in read(path) if row["step"] <= keep] if path.exists() else []
        replace_file(path, "".join(_line(row) for row in rows).encode())
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)

    def write(self, row: Row) -> None:
        """Append a row; numbers that are not finite become null.

        Raises:
            OSError: the disk is full; the file is then as it was before.
        """
        line = _line(row).encode()
        size = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, line)
            if written != len(line):
                raise OSError(errno.ENOSPC, "no room for a row of metrics", str(self._path))
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def read(path: Path) -> list[Row]:
    """Read all whole rows; a torn last line is left out.

    Raises:
        ValueError: a line that is not the last is no JSON object with a step.
    """
    lines = path.read_text().split("\n")
    rows: list[Row] = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            rows.append(row)
            row["step"]
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: line {number} is no metrics row.") from error
    return rows


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _line(row: Row) -> str:
    clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
    return json.dumps(clean, allow_nan=False) + "\n"
