"""The pictures of a report: maps over target learning rate and warmup length, and trajectories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..train.metrics import Row
from .collect import curvature_key

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK, _BLANK, _BOUNDARY = "#222222", "#dcdcdc", "#c0392b"
_DPI = 160


@dataclass(frozen=True)
class Square:
    """One square of a map, over all seeds.

    Attributes:
        value: what is drawn; None where no seed trained.
        held: so many of the seeds trained.
        seeds: that have a result.
        ended: what to write where none trained.
    """

    value: float | None
    held: int
    seeds: int
    ended: str = ""

    @property
    def inside(self) -> bool:
        """Say whether most seeds trained: the boundary runs between squares that differ in this."""
        return 2 * self.held > self.seeds


@dataclass(frozen=True)
class Map:
    """A map's content.

    Attributes:
        lr: target learning rates, ascending.
        warmup: warmup lengths, ascending.
        squares: by (lr, warmup).
        limits: of the colours; maps that are to be compared share them.
        form: of the numbers, as in ``.2f``; see ``rounded``.
        colours: name of a colour map.
    """

    lr: Sequence[float]
    warmup: Sequence[int]
    squares: Mapping[tuple[float, int], Square]
    limits: tuple[float, float]
    form: str
    colours: str


def rounded(value: float, form: str) -> str:
    """Format a number; what rounds to zero has no sign (the format's own "z" needs Python 3.11)."""
    text = format(value, form)
    return text if float(text) else text.removeprefix("-")


def heatmap(content: Map, title: str, lr_label: str, path: Path) -> None:
    """Draw a map with its numbers and its boundary, and write a PNG.

    Args:
        content: the squares.
        title: above.
        lr_label: of the axis of learning rates, which says their unit.
        path: of the PNG.
    """
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection

    width, height = len(content.lr), len(content.warmup)
    figure = _figure(max(3.4, 0.9 + 0.46 * width), max(1.9, 1.1 + 0.42 * height))
    axes = figure.subplots()
    # NaN for squares without a value: the colour map draws them in its colour for "bad".
    image = np.full((height, width), np.nan)
    low, high = content.limits
    if low == high:  # one colour, from the middle of the map: numbers are legible on it
        low, high = low - 1, high + 1
    colours = colormaps[content.colours].with_extremes(bad=_BLANK)
    for (lr, warmup), square in content.squares.items():
        x, y = content.lr.index(lr), content.warmup.index(warmup)
        if square.value is None:
            axes.text(x, y, square.ended, ha="center", va="center", fontsize=7.5, color="#555555", linespacing=0.95)
            continue
        image[y, x] = square.value
        r, g, b, _ = colours((square.value - low) / (high - low))
        text = rounded(square.value, content.form)
        if square.held < square.seeds:
            text += f"\n{square.held}/{square.seeds}"
        # Brightness as the eye weighs it (Rec. 601), not the mean of the three.
        dark = 0.3 * r + 0.59 * g + 0.11 * b < 0.5
        axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else _INK, linespacing=0.95)
    axes.imshow(image, origin="lower", aspect="auto", cmap=colours, vmin=low, vmax=high)
    axes.add_collection(LineCollection(boundary(content), colors=_BOUNDARY, linewidths=2.8, capstyle="round"))
    axes.set_xticks(range(width), [f"{lr:g}" for lr in content.lr])
    axes.set_yticks(range(height), [str(w) for w in content.warmup])
    if max(len(f"{lr:g}") for lr in content.lr) > 5:
        axes.tick_params(axis="x", rotation=45)
    axes.tick_params(length=0)
    axes.set(xlabel=lr_label, ylabel="warmup steps", xlim=(-0.5, width - 0.5), ylim=(-0.5, height - 0.5))
    axes.set_title(title, fontsize=9.5)
    axes.spines[:].set_visible(False)
    _write(figure, path)


def boundary(content: Map) -> list[list[tuple[float, float]]]:
    """Return the line segments between neighbouring squares of which one held and the other did not."""
    # -1 for squares that were not run: nothing is known of them, so they have no boundary.
    inside = np.full((len(content.warmup), len(content.lr)), -1)
    for (lr, warmup), square in content.squares.items():
        inside[content.warmup.index(warmup), content.lr.index(lr)] = square.inside
    known = inside >= 0
    right = (inside[:, 1:] != inside[:, :-1]) & known[:, 1:] & known[:, :-1]
    above = (inside[1:] != inside[:-1]) & known[1:] & known[:-1]
    upright = [[(x + 0.5, y - 0.5), (x + 0.5, y + 0.5)] for y, x in np.argwhere(right).tolist()]
    return upright + [[(x - 0.5, y + 0.5), (x + 0.5, y + 0.5)] for y, x in np.argwhere(above).tolist()]


def trajectories(runs: Mapping[str, list[Row]], title: str, path: Path) -> None:
    """Draw loss, and sharpness with its threshold, of a few runs, and write a PNG.

    Args:
        runs: rows of metrics.jsonl by label.
        title: above.
        path: of the PNG.
    """
    from matplotlib import colormaps

    figure = _figure(4.6, 5.4)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 3])
    losses: list[float] = []
    curvatures: list[float] = []
    key = curvature_key([row for rows in runs.values() for row in rows])
    for index, (label, rows) in enumerate(runs.items()):
        # The upper end of the map is a yellow that cannot be seen on white.
        colour = colormaps["plasma"](0.85 * index / max(1, len(runs) - 1))
        finite = [row for row in rows if row.get("loss") is not None]
        if not finite:
            continue
        step, loss, curvature, threshold = (_column(finite, name) for name in ("step", "loss", key, "threshold"))
        top.plot(step, loss, color=colour, label=label, linewidth=1.3)
        if len(finite) < len(rows):
            across = top.get_xaxis_transform()  # at the top edge, wherever the loss went
            top.plot(step[-1], 0.96, "x", color=colour, markersize=8, markeredgewidth=2, transform=across)
        bottom.plot(step, curvature, color=colour, linewidth=1.3)
        bottom.plot(step, threshold, color=colour, linewidth=1, linestyle="--")
        # A run that diverges would set the scale for all others: limits come from what stayed near its start.
        losses += loss[loss <= 20 * loss[0]].tolist()
        curvatures += curvature[(curvature > 0) & (curvature <= 5 * curvature[0])].tolist()
    # In the legend once, in black: colours tell the runs apart, and styles the curves.
    bottom.plot([], [], color=_INK, linewidth=1, linestyle="--", label="threshold")
    bottom.plot([], [], color=_INK, linewidth=1.3, label=key.replace("_", " "))
    for axes, values in ((top, losses), (bottom, curvatures)):
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        if values and min(values) > 0:
            axes.set_ylim(min(values) / 1.5, max(values) * 2.5)
        axes.legend(fontsize=7.5, framealpha=0.9, loc="upper right")
    top.set_ylabel("training loss")
    bottom.set(xlabel="step", ylabel=key.replace("_", " "))
    top.set_title(title, fontsize=9.5)
    _write(figure, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _write(figure: Figure, path: Path) -> None:
    # Not pyplot: no global state, and no display. Imported here, as matplotlib is optional and no sweep needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for axes in figure.axes:
        axes.tick_params(labelsize=8.5)
        axes.xaxis.label.set_fontsize(9)
        axes.yaxis.label.set_fontsize(9)
    FigureCanvasAgg(figure).print_figure(path, dpi=_DPI)


def _column(rows: list[Row], key: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=np.float64)
