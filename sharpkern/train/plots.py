"""The picture of a run: loss, learning rate, and sharpness against the stability threshold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dynamics import Catapult
from .config import OptimizerConfig
from .metrics import Row

_BLUE, _RED, _GREY, _ORANGE, _GREEN = "#1f5fa8", "#c0392b", "#555555", "#d98a00", "#2e7d32"


def threshold_curves(optimizer: OptimizerConfig, *, minibatch: bool = False) -> list[tuple[str, float, str]]:
    """Return the thresholds that belong in a plot: label, kappa, and "solid", "dotted" or "dashed".

    Momentum and Adam have two: their moments start at zero, so the first step is bound more tightly. With mini-batches
    and momentum b, the batch sharpness has a plateau of its own at ``2 (1 - b) / lr`` (arXiv 2604.14108).
    """
    b = optimizer.beta1 if optimizer.name != "sgd" else optimizer.momentum
    if optimizer.name != "sgd":
        # At first m = (1 - b1) g, so the curvature may reach 2 / ((1 - b1) lr). Later the average of gradients that
        # change sign is smaller than g, which is where 2 + 2 b1 comes from (Cohen et al. 2022).
        late, early = (2 + 2 * b) / (1 - b), 2 / (1 - b)
        return [
            (f"(2+2β₁)/((1-β₁)η) = {late:.3g}/η", late, "solid"),
            (f"first step: {early:.3g}/η", early, "dotted"),
        ]
    if b:
        curves = [(f"(2+2β)/η = {2 + 2 * b:.3g}/η", 2 + 2 * b, "solid"), ("2/η", 2.0, "dotted")]
        if minibatch:
            curves.append((f"small batches: (2-2β)/η = {2 - 2 * b:.3g}/η", 2 - 2 * b, "dashed"))
        return curves
    return [("threshold 2/η", 2.0, "solid")]


def plot_run(
    rows: list[Row],
    optimizer: OptimizerConfig,
    catapults: list[Catapult],
    path: Path,
    title: str,
    *,
    minibatch: bool = False,
) -> None:
    """Draw three panels that share the step axis, and write a PNG.

    Args:
        rows: of metrics.jsonl.
        optimizer: for the threshold curves.
        catapults: shaded; indices into rows.
        path: where to write.
        title: above the panels.
        minibatch: the steps' batches were parts of the data: draw the batch sharpness too, which then is what settles
            at the threshold (arXiv 2412.20553).
    """
    # matplotlib is an optional dependency and slow to import. Without pyplot there is no global state and no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The row of a divergence holds no learning rate. ``catapults`` counts rows without it, as the caller's do.
    rows = [row for row in rows if row.get("loss") is not None]
    step = _column(rows, "step")
    figure = Figure(figsize=(9, 9), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 4])
    figure.suptitle(title, fontsize=12)

    top.plot(step, _column(rows, "loss"), color=_BLUE, label="training loss")
    test = [(row["step"], row["test_loss"]) for row in rows if row.get("test_loss") is not None]
    if test:
        top.plot(*zip(*test, strict=True), color=_GREY, marker=".", linestyle="none", label="test loss")
    top.set(yscale="log", ylabel="loss")
    middle.plot(step, _column(rows, "lr"), color=_GREY)
    middle.set(ylabel="learning rate η", ylim=(0, None))

    _draw_curvature(bottom, rows, optimizer, minibatch=minibatch)
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.3)
        for index, c in enumerate(catapults):
            end = len(rows) - 1 if c.end is None else c.end
            axes.axvspan(
                step[c.start], step[end], color=_ORANGE, alpha=0.2, linewidth=0,
                label="catapult" if index == 0 and axes is top else None,
            )  # fmt: skip
    for axes in (top, bottom):
        axes.legend(fontsize=9, framealpha=0.9)
    canvas.print_figure(path, dpi=120)


def _draw_curvature(axes: Any, rows: list[Row], optimizer: OptimizerConfig, *, minibatch: bool) -> None:
    """Draw curvatures and thresholds over the steps; arguments as of ``plot_run``."""
    step = _column(rows, "step")
    lr = _column(rows, "lr")
    adaptive = any(row.get("preconditioned_sharpness") is not None for row in rows)
    key, label = ("preconditioned_sharpness", "preconditioned sharpness") if adaptive else ("sharpness", "sharpness λ")
    value = _column(rows, key)
    if np.isfinite(value).any():  # nothing is with tracking.products = false
        axes.plot(step, value, color=_BLUE, label=label)
        error = _column(rows, f"{key}_error")
        low = np.maximum(value - error, 1e-12)
        axes.fill_between(step, low, value + error, color=_BLUE, alpha=0.25, linewidth=0, label="error band")
    if adaptive:
        axes.plot(
            step,
            _column(rows, "sharpness"),
            color=_ORANGE,
            linewidth=1,
            label="sharpness λ (not the stability variable)",
        )
    along = _column(rows, "batch_sharpness")
    if minibatch and np.isfinite(along).any():
        axes.plot(step, along, color=_GREEN, linewidth=0.8, alpha=0.6, label="batch sharpness g'Hg / g'g")
    for name, kappa, style in threshold_curves(optimizer, minibatch=minibatch):
        # A rate of 0 has an infinite threshold, which is not drawn.
        with np.errstate(divide="ignore"):
            axes.plot(step, kappa / lr, color=_RED, linestyle=style, label=name)
    # Limits from the curvatures alone: early in a warmup the threshold is so high that nothing else would be seen.
    shown = np.concatenate([value, _column(rows, "sharpness")]) if adaptive else value
    if minibatch:
        shown = np.concatenate([shown, along])
    positive = shown[np.isfinite(shown) & (shown > 0)]
    if positive.size:
        axes.set_ylim(positive.min() / 2, positive.max() * 4)
    axes.set(yscale="log", ylabel=label, xlabel="step")


def _column(rows: list[Row], key: str) -> NDArray[np.float64]:
    values: list[Any] = [row.get(key) for row in rows]
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)
