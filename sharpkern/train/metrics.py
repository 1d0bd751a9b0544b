"""Metrics as JSON lines: one row a step, never half a row."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class MetricsFile:
    """Appends rows; each is one write of a whole line. A file that is removed meanwhile is made again, rows and all.

    Args:
        path: the file.
        keep: rows of steps up to this one are kept, later ones and a torn last line are cut (atomically), as a resumed
            run needs it.

    Attributes:
        removed: whether that has happened.

    Raises:
        ValueError: a line of the file is no row; see ``read``.
        OSError: the file cannot be written; an old one is then as it was.
    """

    def __init__(self, path: Path, *, keep: int = 0) -> None:
        # A resumed run takes the steps after its checkpoint again. Left in place, their old rows would stand beside the
        # new.
        rows = [row for row in read(path) if row["step"] <= keep] if path.exists() else []
        replace_file(path, "".join(_line(row) for row in rows).encode())
        self._path = path
        self.removed = False
        # Not a buffered file: that writes whenever its buffer is full, in the middle of a line, and holds rows back
        # from whoever follows the run.
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND)

    def write(self, row: Row) -> None:
        """Append a row; numbers that are not finite become null.

        Raises:
            OSError: the disk is full; the file is then as it was before.
        """
        line = _line(row).encode()
        state = os.fstat(self._descriptor)
        if not state.st_nlink:
            self._make_again()
        size = state.st_size
        try:
            # On a full disk ``write`` may store a part and raise nothing. The file is then cut back to whole rows.
            written = os.write(self._descriptor, line)
            if written != len(line):
                raise OSError(errno.ENOSPC, "no room for a row of metrics", str(self._path))
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise

    def _make_again(self) -> None:
        # The system keeps what was written for as long as the file is open, whatever name it has lost.
        rows = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        if self._path.exists():
            raise FileExistsError(errno.EEXIST, "was replaced by another file during the run", str(self._path))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self._path, rows)
        os.close(self._descriptor)
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND)
        self.removed = True

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def read(path: Path) -> list[Row]:
    """Read all whole rows; a torn last line is left out.

    Raises:
        ValueError: a line that is not the last is no JSON object with a step, or has a step that is no whole number.
    """
    lines = path.read_bytes().split(b"\n")
    rows: list[Row] = []
    # Behind the last newline stands nothing, or the part of a line that a kill left.
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
        # Besides what is no JSON: bytes that are no text, numbers of thousands of digits, brackets as deep as that.
        except (ValueError, RecursionError):
            row = None
        # A line such as ``3`` is JSON too.
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise ValueError(f"{path}: line {number} is no metrics row.")
        rows.append(row)
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
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            # Else the new name may reach the disk before the data, and a power cut leaves an empty file under it.
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        # On a full disk a part of it would take the room that is left.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _line(row: Row) -> str:
    # JSON has no NaN and no infinity. Python would write them all the same, and other readers then refuse the line.
    clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
    # Lists are not searched: one with a NaN raises here, which is better than a file that cannot be read.
    return json.dumps(clean, allow_nan=False) + "\n"
