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
        # A resumed run takes the steps after its checkpoint again. Left in place, their old rows would stand beside the
        # new.
        rows = [row for row in read(path) if row["step"] <= keep] if path.exists() else []
        replace_file(path, "".join(_line(row) for row in rows).encode())
        self._path = path
        # Not a buffered file: that writes whenever its buffer is full, in the middle of a line, and holds rows back
        # from whoever follows the run.
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)

    def write(self, row: Row) -> None:
        """Append a row; numbers that are not finite become null.

        Raises:
            OSError: the disk is full; the file is then as it was before.
        """
        line = _line(row).encode()
        size = os.fstat(self._descriptor).st_size
        try:
            # On a full disk ``write`` may store a part and raise nothing. The file is then cut back to whole rows.
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
    # Behind the last newline stands nothing, or the part of a line that a kill left.
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            rows.append(row)
            # A line such as ``3`` is JSON too; asking for the step tells it from a row.
            row["step"]
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: line {number} is no metrics row.") from error
    return rows


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a crash of the machine.

    Args:
        path: the file; ``path`` with ``.tmp`` behind it is written first.
        data: its content.

    Raises:
        OSError: it cannot be written; an old file of that name is as it was.
    """
    # In the same folder, because renaming is atomic within one file system only.
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        # Else the new name may reach the disk before the data, and a power cut leaves an empty file under it.
        os.fsync(file.fileno())
    temporary.replace(path)


def _line(row: Row) -> str:
    # JSON has no NaN and no infinity. Python would write them all the same, and other readers then refuse the line.
    clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
    # Lists are not searched: one with a NaN raises here, which is better than a file that cannot be read.
    return json.dumps(clean, allow_nan=False) + "\n"
