"""What a sweep's cells came to: one row a cell."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from ..dynamics import classify_regime, detect_catapults, training_outcome
from ..train.config import TrainConfig
from ..train.metrics import Row, replace_file
from .grid import Cell, Sweep

RESULT, DECLARED = "result.json", "cell.toml"
_STATUSES = ("trained", "failed", "diverged")
_WORDS = ("status", "regime")  # columns of a result that are no numbers
# A multiple of the first loss, for a loss has no scale of its own.
_OUT_OF_BOUNDS = 1e5
_SMOOTH = 10  # steps over which a mini-batch run is averaged before catapults and regimes are looked for


def result_of(cell: Cell) -> dict[str, Any] | None:
    """Return a finished cell's result, None for any other.

    Raises:
        ValueError: the folder belongs to a cell of the same name with other settings, or the result is damaged.
    """
    declared = cell.folder / DECLARED
    # Compared as text: a cell is known by its folder's name, which tells its place on the axes and nothing of the rest.
    if declared.exists() and declared.read_bytes() != cell.declared().encode():
        raise ValueError(
            f"{cell.folder} was declared with other settings (see its {DECLARED}): choose another --out, or remove it."
        )
    path = cell.folder / RESULT
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_bytes())
    # Besides what is no JSON: bytes that are no text, numbers of thousands of digits, brackets as deep as that.
    except (ValueError, RecursionError):
        result = None
    if not _is_result(result):
        raise ValueError(f"{path} is damaged: remove it, and sharpkern sweep makes the cell's result again.")
    found: dict[str, Any] = result
    return found


def _is_result(result: Any) -> bool:
    if not isinstance(result, dict) or result.get("status") not in _STATUSES:
        return False
    return all(
        value is None or (isinstance(value, str) if name in _WORDS else isinstance(value, int | float))
        for name, value in result.items()
    )


def table(sweep: Sweep) -> list[dict[str, Any]]:
    """Return one row a cell, in the order of the file: its name, its values on the axes, its result.

    A cell without a result has the status "unfinished" and nothing else.
    """
    rows = [{"cell": cell.name, **cell.axes, **(result_of(cell) or {"status": "unfinished"})} for cell in sweep.cells]
    # A cell without a result has fewer keys, and a CSV file has one header for all.
    columns = dict.fromkeys(key for row in rows for key in row)
    return [columns | row for row in rows]


def result_row(rows: list[Row], config: TrainConfig, classes: int) -> dict[str, Any]:
    """Return a finished run's row of the table.

    The status is that of ``training_outcome``: "trained", "failed" or "diverged", the last also for a loss of 1e5 times
    the first (Kalra and Barkeshli, Phase diagram of early training dynamics, 2023).

    Args:
        rows: of metrics.jsonl.
        config: of the run.
        classes: of the data, for chance.
    """
    finite = [row for row in rows if row.get("loss") is not None]
    evaluated = [row for row in finite if row.get("train_accuracy") is not None]
    losses = [row["loss"] for row in rows]
    # A first loss of 0 would make any later one a divergence.
    limit = _OUT_OF_BOUNDS * losses[0] if finite and losses[0] else math.inf
    # Not for text: its commonest character alone is far more often right than one in a vocabulary.
    accuracy = [row["train_accuracy"] for row in evaluated] if evaluated and config.model.kind != "gpt" else None
    status = training_outcome(losses, accuracy=accuracy, chance=1 / classes, limit=limit).name
    return {
        "status": status,
        "learning_rate": config.optimizer.lr,
        "steps": len(finite),
        "best_test_accuracy": max((row["test_accuracy"] for row in evaluated), default=None),
        "best_test_loss": min((x for row in evaluated if (x := row["test_loss"]) is not None), default=None),
        "train_accuracy": evaluated[-1]["train_accuracy"] if evaluated else None,
        "train_loss": finite[-1]["loss"] if finite else None,
        **_dynamics(finite, config, status),
        "seconds": sum(row["seconds"] for row in finite),
    }


def curvature_key(rows: list[Row]) -> str:
    """Return the column that the stability threshold is about."""
    adaptive = any(row.get("preconditioned_sharpness") is not None for row in rows)
    return "preconditioned_sharpness" if adaptive else "sharpness"


def _dynamics(rows: list[Row], config: TrainConfig, status: str) -> dict[str, Any]:
    """Say how the run met the stability threshold, how often it was thrown back, and in which regime."""
    # All keys in every result, so that a run that was never measured leaves its columns empty, not missing.
    empty = dict.fromkeys(
        ("initial_sharpness", "initial_curvature", "crossing_step", "crossing_lr", "crossing_sharpness", "catapults",
         "largest_catapult", "largest_drop", "regime", "trend", "regime_is_sure", "near_threshold")
    )  # fmt: skip
    # Carried values are left out: with them a catapult could begin and end on one and the same value.
    measured = [row for row in rows if row["measured"] and row["ratio"] and row["threshold"]]
    if not measured:
        return empty
    key = curvature_key(measured)
    curvature, lr = [row[key] for row in measured], [row["lr"] for row in measured]
    result = empty | {"initial_sharpness": measured[0]["sharpness"], "initial_curvature": curvature[0]}
    # The same at every step, as the trainer never changes momentum or betas.
    kappa = measured[0]["threshold"] * lr[0]
    crossed = next((row for row in measured if row["ratio"] > 1), None)
    if crossed:
        result |= {
            "crossing_step": crossed["step"],
            "crossing_lr": crossed["lr"],
            "crossing_sharpness": crossed[key],
        }
    # Full-batch losses have no noise to average, and a mean would blur catapults of a few steps.
    smooth = 1 if config.batch_size is None else _SMOOTH
    # with momentum the loss also rises without a catapult: the sharpness must fall
    drop = 0.0 if smooth == 1 and config.optimizer.name == "sgd" and not config.optimizer.momentum else 0.1
    loss = [row["loss"] for row in measured]
    found = detect_catapults(loss, curvature, lr, kappa, min_drop=drop, smooth=smooth)
    if status == "diverged":  # the last one is the divergence, unless it ended
        found = [c for c in found if c.end is not None]
    result |= {
        "catapults": len(found),
        "largest_catapult": max((c.loss_ratio for c in found), default=None),
        "largest_drop": max((c.sharpness_drop for c in found), default=None),
    }
    if curvature[0] > 0:
        regime = classify_regime(curvature, lr, kappa, smooth=smooth)
        result |= {
            "regime": regime.name,
            "trend": regime.trend,
            "regime_is_sure": regime.confident,
            "near_threshold": regime.persistence,
        }
    return result


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the table as CSV; it is there whole or not at all.

    Args:
        path: the file.
        rows: of ``table``, at least one, all with the same keys.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, text.getvalue().encode())
