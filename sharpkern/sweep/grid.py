"""A sweep's TOML file, and the cells it declares."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..train.config import TrainConfig, build, parse_toml, read_toml, to_toml, validate, value_of

UNITS = ("1", "1/sharpness")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: of its folder: ``lr=0.1,warmup_steps=4``.
        axes: its value on each axis of the sweep.
        config: what to train; ``out`` is the cell's folder, learning rates are in ``lr_unit``.
        lr_unit: "1", or "1/sharpness" for learning rates in units of 1 / initial sharpness.
        keep_checkpoint: leave the last checkpoint in the folder.
    """

    name: str
    axes: dict[str, Any]
    config: TrainConfig
    lr_unit: str = "1"
    keep_checkpoint: bool = False

    @property
    def folder(self) -> Path:
        """Where the cell's run is."""
        return self.config.out

    def declared(self) -> str:
        """Return the cell's declaration, which does not depend on where the sweep's folder is."""
        # Without the folder, so that a sweep's folder can be moved or given by another path.
        text = to_toml(replace(self.config, out=Path(self.name)))
        return f"# learning rates in units of {'1' if self.lr_unit == '1' else '1 / initial sharpness'}\n{text}"


@dataclass(frozen=True)
class Sweep:
    """A sweep.

    Attributes:
        folder: of the whole sweep; the cells' folders are in ``cells/``.
        axes: the configuration keys that vary, as in ``optimizer.lr``, in the order of the file.
        cells: in the order of the file, the last axis fastest.
        lr_unit: see ``Cell``.
        text: of the TOML file.
    """

    folder: Path
    axes: tuple[str, ...]
    cells: tuple[Cell, ...]
    lr_unit: str
    text: str


def read_sweep(path: Path, out: Path | None = None) -> Sweep:
    """Read a sweep: a run's configuration with a table ``[sweep]``.

        loss = "mse"                          # any key of a run's config.toml, for every cell
        [sweep]
        lr_unit = "1/sharpness"               # learning rates times the cell's initial sharpness; "1" by default
        keep_checkpoints = true               # false by default
        [sweep.grid]                          # or several [[sweep.grid]]: every combination of the lists is a cell
        optimizer.lr = [1, 2, 4]
        optimizer.warmup_steps = [1, 16]

    Args:
        path: of the TOML file.
        out: the sweep's folder; the file's own ``out`` by default, else ``runs/`` and the file's name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no TOML, an unknown key, a value that does not fit, an empty grid.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such sweep file.")
    text = read_toml(path)
    tables = parse_toml(text, str(path))
    options = _table(tables.pop("sweep", {}), "sweep", path)
    folder = out or Path(tables.pop("out", Path("runs") / path.stem))
    # Again, because ``or`` looks no further where the caller gave the folder; a cell's configuration must not have it.
    tables.pop("out", None)
    if unknown := options.keys() - {"grid", "lr_unit", "keep_checkpoints"}:
        raise ValueError(
            f"{path}, [sweep]: unknown key {sorted(unknown)[0]!r}; known are grid, lr_unit, keep_checkpoints."
        )
    unit = options.get("lr_unit", "1")
    if unit not in UNITS:
        raise ValueError(f"{path}, [sweep]: lr_unit must be one of {', '.join(UNITS)}, got {unit!r}.")
    keep = options.get("keep_checkpoints", False)
    if not isinstance(keep, bool):
        raise ValueError(f"{path}, [sweep]: keep_checkpoints must be true or false, got {keep!r}.")
    grids = options.get("grid", {})
    flat = [_flatten(_table(g, "sweep.grid", path)) for g in (grids if isinstance(grids, list) else [grids])]
    # A set that keeps the order of the file, which is that of the table's columns.
    axes = tuple(dict.fromkeys(key for grid in flat for key in grid))
    if not axes:
        raise ValueError(f"{path}: the grid is empty: give lists in [sweep.grid], as in optimizer.lr = [0.1, 0.2].")
    # By name, as grids may overlap: what two of them declare is one cell.
    cells: dict[str, Cell] = {}
    for chosen in (c for grid in flat for c in _combinations(grid, path)):
        config = _configure(tables, chosen, folder, path, unit)
        # From the configuration and not from the file, so that ``lr = 1`` and ``lr = 1.0`` name one folder.
        values = {key: value_of(config, key) for key in axes}
        name = ",".join(f"{label}={word(values[key])}" for key, label in zip(axes, labels(axes), strict=True))
        cells[name] = Cell(name, values, replace(config, out=folder / "cells" / name), unit, keep)
    return Sweep(folder, axes, tuple(cells.values()), unit, text)


def _configure(tables: dict[str, Any], chosen: dict[str, Any], folder: Path, path: Path, unit: str) -> TrainConfig:
    """Build a cell's configuration."""
    # Tables are copied, for the cells write their own values into them.
    merged = {name: dict(value) if isinstance(value, dict) else value for name, value in tables.items()}
    for key, value in chosen.items():
        *above, last = key.split(".")
        table = merged
        for name in above:
            table = _table(table.setdefault(name, {}), name, path)
        table[last] = value
    config: TrainConfig = build(TrainConfig, merged, str(path))
    # One thread by default: cells run side by side, and each would else take all cores.
    config = replace(config, out=folder, threads=config.threads or 1)
    validate(config, str(path))
    # A result needs test data and a number of classes, which a user's own task does not tell.
    if config.task is not None:
        raise ValueError(f"{path}: a sweep is of reference models: task is for train, suggest and audit.")
    # An adaptive optimizer's threshold is one of P^-1 H: 1 / sharpness is no unit for its learning rate.
    if unit != "1" and config.optimizer.name != "sgd":
        raise ValueError(f"{path}: lr_unit = {unit!r} is for sgd, got {config.optimizer.name!r}.")
    return config


def _combinations(grid: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}, [sweep.grid]: {key} must be a list of at least one value, got {values!r}.")
        if key == "out":
            raise ValueError(f"{path}, [sweep.grid]: out cannot vary: each cell has its own folder.")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"optimizer": {"lr": [1]}}`` and ``{"optimizer.lr": [1]}`` become the latter."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _table(value: Any, name: str, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {name} must be a table, got {value!r}.")
    return value


def labels(axes: tuple[str, ...]) -> list[str]:
    """Short names: ``lr`` for optimizer.lr, ``optimizer`` for optimizer.name, the whole key where two would clash."""
    short = [key.rpartition(".")[0] if key.endswith((".name", ".kind")) else key.rpartition(".")[2] for key in axes]
    return [label if short.count(label) == 1 else key for label, key in zip(short, axes, strict=True)]


def word(value: Any) -> str:
    """Write a value so that it fits into a folder's name, and back without loss for numbers."""
    if isinstance(value, float):
        # Six digits where they are all there is, and every digit otherwise: two values must not share a folder.
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    # What a shell or a file system could take for its own becomes a dash.
    return re.sub(r"[^\w.+-]+", "-", str(value))
