"""Time contenders round by round in one process, so that a stall of the machine hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


def interleave(
    contenders: Mapping[Key, Callable[[], object]],
    rounds: int,
    seconds_at_most: float = float("inf"),
    untimed: int = 2,
) -> dict[Key, list[float]]:
    """Run each contender once per round.

    Args:
        contenders: name -> call. A call that returns a float reports the seconds of a process of its own.
        rounds: how many.
        seconds_at_most: begin no further round after so long, but finish at least three.
        untimed: rounds that run before.

    Returns:
        name -> seconds, one entry a round.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in contenders}
    begun = time.perf_counter()
    for index in range(untimed + rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            own = call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if index >= untimed:
                seconds[name].append(own if isinstance(own, float) else time.perf_counter() - start)
        if index >= untimed + 2 and time.perf_counter() - begun > seconds_at_most:
            break
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> dict[str, float]:
    """Compare two contenders.

    Returns:
        ``minima``: ratio of the smallest times; ``median``: median of the per-round ratios; ``low`` and ``high``: its
        quartiles.
    """
    paired = sorted(a / b for a, b in zip(seconds[name], seconds[base], strict=True))
    quarter = len(paired) // 4
    return {
        "minima": min(seconds[name]) / min(seconds[base]),
        "median": statistics.median(paired),
        "low": paired[quarter],
        "high": paired[-1 - quarter],
    }
