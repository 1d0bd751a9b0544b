"""Which cells are trained together: the units of work that an executor is given."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path

from .grid import Cell
from .run import CellEnd, run_cell

Group = tuple[Cell, ...]

_MOST_CELLS = 32  # of a stack: more gain little, and a kill loses them all
_MOST_NUMBERS = 8_000_000  # in weights and activations of a stack: 32 MB, and about four times that at the peak
_INPUTS = 1024  # about so many numbers in an image


def groups(cells: Sequence[Cell], at_once: int = 1) -> list[Group]:
    """Divide cells into those that are trained together, and those on their own.

    A stack's cells have one small fully connected network, data, loss, batch size, number of steps and momentum, are
    trained by SGD, and their sharpness is measured at the first step only. Learning rates, warmup and seeds may differ.

    Args:
        cells: any.
        at_once: so many groups can be trained at the same time: what could be one stack is divided among them.
    """
    together: dict[Hashable, list[Cell]] = {}
    for cell in cells:
        together.setdefault(_in_common(cell) if _most(cell) > 1 else cell.name, []).append(cell)
    found: list[Group] = []
    for members in together.values():
        wanted = math.ceil(len(members) / max(1, _most(members[0])))
        # A multiple of ``at_once``, so that all processes have work to the end; never an empty group.
        parts = min(len(members), math.ceil(wanted / at_once) * at_once)
        ends = [len(members) * i // parts for i in range(parts + 1)]
        found += [tuple(members[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
    return found


def run_group(cells: Group) -> list[CellEnd]:
    """Train cells to their ends, together if there are several."""
    if len(cells) == 1:
        return [run_cell(cells[0])]
    from .stacked import run_stack

    return run_stack(cells)


def _in_common(cell: Cell) -> Hashable:
    """Return what all cells of a stack share: everything but seed, folder, and how the learning rate is scheduled."""
    c = cell.config
    o = replace(c.optimizer, lr=1.0, lr_init=0.0, critical_start=False, warmup_steps=1, power=1.0, decay="constant")
    return replace(c, optimizer=o, seed=0, out=Path())


def _most(cell: Cell) -> int:
    """Return how many cells like this one may be in a stack."""
    c = cell.config
    examples = c.batch_size or c.data.limit
    # Solved at the first step alone, with steps left to stack: a later solve would be each cell's own.
    if (
        c.model.kind != "fcn" or c.optimizer.name != "sgd" or not 1 < c.steps <= c.tracking.every
        or cell.keep_checkpoint or examples is None
    ):  # fmt: skip
        return 0
    width, hidden = c.model.width, c.model.depth - 1
    numbers = width * (_INPUTS + width * hidden) + examples * width * hidden
    if c.batch_size is not None:
        numbers += examples * _INPUTS  # each cell has its own batch
    return min(_MOST_CELLS, _MOST_NUMBERS // numbers)
