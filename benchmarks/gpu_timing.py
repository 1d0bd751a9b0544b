"""Timing and judging of a GPU's figures: interleaved rounds, and rows that count only if the result is right."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]
ROUNDS = 7


def seconds(calls: Mapping[str, Callable[[], object]], device: torch.device, full: bool) -> dict[str, list[float]]:
    """Time calls round by round; each entry is the mean of as many calls as take about 5 ms, queued together."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = {}
    for name, call in calls.items():
        call()
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        repeats[name] = max(1, min(200, int(5e-3 / (time.perf_counter() - start)))) if full else 1
    for _ in range(ROUNDS if full else 1):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            wait(device)
            times[name].append((time.perf_counter() - start) / repeats[name])
    return times


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def row(name: str, goal: str, value: float, met: bool, error: float, limit: float, times: Mapping[str, Any]) -> Row:
    """Assemble a row; value and met count only if the result is right."""
    right = bool(error <= limit)
    summary = {key: {"min": min(t), "median": median(t)} for key, t in times.items()}
    return {"name": name, "goal": goal, "value": value, "met": met and right, "right": right, "error": error,
            "limit": limit, "seconds": summary}  # fmt: skip


def error_of(got: Tensor, want: Tensor) -> float:
    want = want.double()
    return float((got.double() - want).norm() / want.norm())
