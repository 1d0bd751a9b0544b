"""How far a long command is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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
    with progress(total, unit, done) as advance:
        for item in items:
            advance(state(item))
            yield item


@contextmanager
def progress(total: int, unit: str, done: int = 0, at_most: str = "") -> Iterator[Callable[[str], None]]:
    """Show progress on stderr, with the time that is left; the function it gives is called after each item.

    Args:
        total: how many items there will be.
        unit: what an item is called.
        done: how many came before.
        at_most: said before the total where there may be fewer.
    """
    # A log file would keep every redraw of a bar, on one line.
    if not sys.stderr.isatty():
        yield _lines(total, unit, done, at_most)
        return
    # Optional, and not needed where output goes to a file.
    from tqdm import tqdm

    with tqdm(initial=done, total=total, unit=unit, dynamic_ncols=True) as bar:

        def advance(state: str) -> None:
            # Without a refresh of its own: the bar decides how often to draw.
            bar.set_postfix_str(state, refresh=False)
            bar.update()

        yield advance


def _lines(total: int, unit: str, done: int, at_most: str) -> Callable[[str], None]:
    # Not the time of day, which may be set while a run goes on.
    start = last = time.monotonic()
    number, of = 0, f" of {at_most}" if at_most else "/"

    def advance(state: str) -> None:
        nonlocal last, number
        number, now = number + 1, time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES or done + number == total:
            # By the items of this call: those that a resumed run had done took no time now.
            left = (now - start) / number * (total - done - number)
            parts = [f"{unit} {done + number}{of}{total}", state, f"{at_most}{left:.0f} s left"]
            print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)
            last = now

    return advance
