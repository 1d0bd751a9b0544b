"""Signals that ask a process to end: they end it as Ctrl-C does, so that files are closed and results written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What kill, batch systems and containers send, and a terminal that is closed.
_NAMES = ("SIGTERM", "SIGHUP")


@contextmanager
def ended_like_ctrl_c() -> Iterator[None]:
    """Within the block, SIGTERM and SIGHUP raise KeyboardInterrupt; of no effect outside of the main thread."""
    # Only the main thread may set handlers, and only it receives signals.
    main = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in _NAMES if main and hasattr(signal, name)]
    # One that is ignored stays so: nohup relies on it.
    before = {n: h for n in numbers if (h := signal.getsignal(n)) in (signal.SIG_DFL, None)}
    for number in before:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise KeyboardInterrupt
