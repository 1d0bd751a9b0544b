"""How long until the sharpness is known to 1%, 0.1%, 1e-5 of the truth, from a random start?

Each solver gets, for each level, the cheapest of its settings whose true error is within the level for every seed: its
user could not know it, but no solver is charged for a stopping rule stricter than needed.

Critical sharpness, the cheap rival by forward passes, is timed beside the first level. It is 2 over the learning rate
along the gradient at which the loss stops to fall: another quantity, whose distance from the sharpness is its "error".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from interleave import interleave
from peers import solvers, truth
from points import at

from . import Effort

LEVELS = (1e-2, 1e-3, 1e-5)
RIVAL = "critical sharpness (forward passes)"


def ask(workload: str, point: str, effort: Effort) -> list[dict[str, Any]]:
    """Time all solvers; an entry for each level."""
    work, lr, of_threshold = at(workload, point)
    exact = truth.top(work, 3)
    seeds = range(1 if effort.quick else 2)
    ready = solvers.load(work)
    tried: dict[str, list[tuple[Any, float, float]]] = {}
    for name, solver in ready.items():
        tried[name] = []
        for setting in solver.settings:
            runs = [solver.solve(setting, seed) for seed in seeds]
            error = max(_error(value, exact[0]) for value, _ in runs)
            tried[name].append((setting, error, sum(count for _, count in runs) / len(runs)))
            if error <= min(LEVELS):
                break
    rival = solvers.CriticalSharpness(work, lr)
    value, passes = rival.solve(None, 0)
    entries = []
    for level in LEVELS:
        calls: dict[str, Callable[[], object]] = {}
        chosen: dict[str, dict[str, Any]] = {}
        failed: dict[str, str] = {}
        for name, trials in tried.items():
            good = [t for t in trials if t[1] <= level]
            if not good:
                failed[name] = f"not reached; best true error {min(t[1] for t in trials):.1e}"
                continue
            setting, error, products = min(good, key=lambda t: t[2])
            chosen[name] = {"setting": setting, "products": products, "error": error}
            calls[name] = partial(_value, ready[name], setting)
        if level == LEVELS[0]:
            chosen[RIVAL] = {"setting": "another quantity", "products": passes, "error": _error(value, exact[0])}
            calls[RIVAL] = partial(_value, rival, None)
        entries.append({
            "question": "cold", "workload": workload, "point": point, "level": level, "base": "sharpkern",
            "of_threshold": of_threshold, "eigenvalues": exact, "chosen": chosen, "failed": failed,
            "errors": {name: c["error"] for name, c in chosen.items()},
            "seconds": interleave(calls, effort.rounds, effort.seconds, effort.untimed) if calls else {},
        })  # fmt: skip
    return entries


def _value(solver: Any, setting: Any) -> None:
    solver.solve(setting, 0)


def _error(value: float, exact: float) -> float:
    return abs(value / exact - 1) if math.isfinite(value) else math.inf
