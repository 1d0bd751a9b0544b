"""How far a long command is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


def with_progress(
    items: Iterable[T], done: int, total: int, unit: str, state: Callable[[T], str] = lambda _: ""
) -> Iterator[T]:
    """Pass items on, and show progress on stderr.

    Args:
        items: what is still to do, in order; may end early.
        done: how many came before.
        total: how many there will be.
        unit: what an item is called.
        state: says where things stand after an item.
    """
    # A log file would keep every redraw of a bar, on one line.
    show = _with_bar if sys.stderr.isatty() else _with_lines
    return show(items, done, total, unit, state)


def _with_bar(items: Iterable[T], done: int, total: int, unit: str, state: Callable[[T], str]) -> Iterator[T]:
    # Optional, and not needed where output goes to a file.
    from tqdm import tqdm

    with tqdm(items, initial=done, total=total, unit=unit, dynamic_ncols=True) as bar:
        for item in bar:
            # Without a refresh of its own: the bar decides how often to draw.
            bar.set_postfix_str(state(item), refresh=False)
            yield item


def _with_lines(items: Iterable[T], done: int, total: int, unit: str, state: Callable[[T], str]) -> Iterator[T]:
    # Not the time of day, which may be set while a run goes on.
    start = last = time.monotonic()
    for number, item in enumerate(items, 1):
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES or done + number == total:
            # By the items of this call: those that a resumed run had done took no time now.
            left = (now - start) / number * (total - done - number)
            parts = [f"{unit} {done + number}/{total}", state(item), f"{left:.0f} s left"]
            print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)
            last = now
        yield item
