"""One process at a time in a run folder."""

from __future__ import annotations

import fcntl
import gc
import os
import weakref
from pathlib import Path

NAME = "run.lock"


class FolderLock:
    """Holds a folder until ``release``, until it is dropped, or until the process ends, however it does.

    Args:
        folder: there already; a file ``run.lock`` in it names the process.

    Raises:
        ValueError: another process holds it, or another run of this one.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        self._close = weakref.finalize(self, os.close, descriptor)
        if not _taken(descriptor):
            holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            if holder == str(os.getpid()):
                gc.collect()  # that of a run that was dropped, but is held by a cycle of references
            if holder != str(os.getpid()) or not _taken(descriptor):
                self._close()
                raise ValueError(
                    f"{folder} is in use by process {holder or 'unknown'}: wait for its end, or choose another --out."
                )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let others in."""
        # The file stays: removing it would let two processes lock two files of one name.
        self._close()


def _taken(descriptor: int) -> bool:
    try:
        # The kernel's own lock: a kill ends it with the process, where a file that is there or not would stay.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
