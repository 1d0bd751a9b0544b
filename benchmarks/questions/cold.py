"""How long until the sharpness is known to 1%, 0.1%, 1e-5 of the truth, from a random start?

Each solver gets, for each level, the cheapest of its settings whose true error is within the level for every seed: its
user could not know it, but no solver is charged for a stopping rule stricter than needed.

Critical sharpness, the cheap rival by forward passes, is timed beside the first level. It is 2 over the learning rate
along the gradient at which the loss stops to fall: another quantity, whose distance from the sharpness is its "error".
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from interleave import interleave
from peers import solvers, truth
from points import at

from . import Effort

LEVELS = (1e-2, 1e-3, 1e-5)
RIVAL = "critical sharpness (forward passes)"
Trial = dict[str, Any]  # setting; its largest true error over seeds; its mean number of products


def ask(workload: str, point: str, effort: Effort) -> list[dict[str, Any]]:
    """Time all solvers; an entry for each level, all from the same rounds."""
    work, lr, of_threshold = at(workload, point)
    exact = truth.top(work, 3)
    solving = solvers.load(work)
    seeds = range(1 if effort.quick or effort.untimed == 0 else 2)
    tried = {name: _trials(solver, exact[0], seeds) for name, solver in solving.items()}
    chosen: list[dict[str, Trial]] = []
    for level in LEVELS:
        good = {name: [t for t in trials if t["error"] <= level] for name, trials in tried.items()}
        chosen.append({name: min(trials, key=lambda t: t["products"]) for name, trials in good.items() if trials})
    rival = solvers.CriticalSharpness(work, lr)
    value, passes = rival.solve(None, 0)
    chosen[0][RIVAL] = {"setting": "another quantity", "products": passes, "error": _error(value, exact[0])}
    calls = {
        (name, trial["setting"]): partial(_solve, solving.get(name, rival), trial["setting"])
        for choice in chosen for name, trial in choice.items()
    }  # fmt: skip
    seconds = interleave(calls, effort.rounds, effort.seconds, effort.untimed)
    return [
        {
            "question": "cold", "workload": workload, "point": point, "level": level, "base": "sharpkern",
            "of_threshold": of_threshold, "eigenvalues": exact, "chosen": choice, "another_quantity": [RIVAL],
            "failed": {
                name: f"not reached; best true error {min(t['error'] for t in trials):.1e}"
                for name, trials in tried.items() if name not in choice
            },
            "errors": {name: trial["error"] for name, trial in choice.items()},
            "seconds": {name: seconds[name, trial["setting"]] for name, trial in choice.items()},
        }
        for level, choice in zip(LEVELS, chosen, strict=True)
    ]  # fmt: skip


def _trials(solver: Any, exact: float, seeds: range) -> list[Trial]:
    """Try a solver's settings, cheap to dear, until one reaches the strictest level."""
    trials: list[Trial] = []
    for setting in solver.settings:
        runs = [solver.solve(setting, seed) for seed in seeds]
        error = max(_error(value, exact) for value, _ in runs)
        trials.append({"setting": setting, "error": error, "products": sum(count for _, count in runs) / len(runs)})
        if error <= min(LEVELS):
            break
    return trials


def _solve(solver: Any, setting: Any) -> None:
    solver.solve(setting, 0)


def _error(value: float, exact: float) -> float:
    return abs(value / exact - 1) if math.isfinite(value) else math.inf
