"""A sweep as one HTML page with its images inside, and the same images as PNG files."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ..train.metrics import read, replace_file
from .collect import table
from .diagrams import Map, Square, heatmap, trajectories
from .grid import Cell, Sweep, labels, read_sweep, word

Result = dict[str, Any]
_OWN = ("optimizer.lr", "optimizer.warmup_steps", "seed")  # within a map; the other axes make maps
_ENDS = {"diverged": "div.", "failed": "fail", "unfinished": ""}
_MOST_CURVES = 5
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:76rem;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;line-height:1.25;margin:.5rem 0}
h2{font-size:1.25rem;margin:2.5rem 0 .5rem;border-top:2px solid #ddd;padding-top:1rem}
h3{font-size:1.05rem;margin:1.5rem 0 .25rem}p{max-width:48rem;margin:.4rem 0}
h1,h2,code{overflow-wrap:anywhere}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr));gap:1rem;align-items:start}
figure{margin:0;min-width:0}img{width:100%;height:auto;display:block}figcaption{font-size:.9rem;color:#444}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
th{border-bottom-color:#888;vertical-align:bottom}th:first-child,td:first-child{text-align:left}
pre{overflow-x:auto;background:#f5f5f5;padding:.75rem;font-size:.85rem}
"""


def write_report(folder: Path, *, partial: bool = False) -> Path:
    """Write ``report.html`` and ``figures/*.png`` into a sweep's folder; return the page's path.

    Args:
        folder: of the sweep.
        partial: write it although some cells have no result.

    Raises:
        ValueError: no sweep, an unfinished one, or no result at all.
    """
    if not (folder / "sweep.toml").is_file():
        raise ValueError(f"{folder} is not a sweep's folder: it has no sweep.toml.")
    sweep = read_sweep(folder / "sweep.toml", folder)
    rows = table(sweep)
    unfinished = sum(row["status"] == "unfinished" for row in rows)
    # Refused unless asked for: the boundary is read off the cells that are there, and a missing one moves it.
    if unfinished == len(rows) or (unfinished and not partial):
        raise ValueError(
            f"{folder}: {unfinished} of {len(rows)} cells are not finished: call sharpkern sweep again"
            + ("." if unfinished == len(rows) else ", or report with --partial.")
        )
    (folder / "figures").mkdir(exist_ok=True)
    page = folder / "report.html"
    # One file, images inside, so that it can be sent; written whole or not at all.
    replace_file(page, _Report(sweep, rows).page().encode())
    return page


class _Report:
    """A report while it is made."""

    def __init__(self, sweep: Sweep, rows: list[Result]) -> None:
        self.sweep, self.rows = sweep, rows
        self.results = dict(zip((cell.name for cell in sweep.cells), rows, strict=True))
        self.lr_label = "target learning rate" + (" × initial sharpness" if sweep.lr_unit != "1" else "")
        named = [(key, label) for key, label in zip(sweep.axes, labels(sweep.axes), strict=True) if key not in _OWN]
        self.groups: dict[str, list[Cell]] = {}
        for cell in sweep.cells:
            name = ", ".join(f"{label} = {word(cell.axes[key])}" for key, label in named)
            self.groups.setdefault(name, []).append(cell)

    def page(self) -> str:
        """The HTML."""
        title = f"Sweep {self.sweep.folder.resolve().name}"
        parts = [f"<h1>{escape(title)}</h1>", *self.summary()]
        for name, cells in self.groups.items():
            parts += [f"<h2>{escape(name or 'Phase diagram')}</h2>", *self.group(name, cells)]
        parts += ["<h2>All cells</h2>", self.all_cells(), "<h2>The sweep file</h2>"]
        parts.append(f"<pre>{escape(self.sweep.text)}</pre>")
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            '<link rel="icon" href="data:,">'
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
            + "\n".join(parts)
            + "\n</body></html>\n"
        )

    def summary(self) -> list[str]:
        """What was run and how it came out."""
        c = self.sweep.cells[0].config
        statuses = [row["status"] for row in self.rows]
        counts = ", ".join(
            f"{statuses.count(s)} {s}" for s in ("trained", "failed", "diverged", "unfinished") if s in statuses
        )
        # Told once for all cells; what varies stands with the maps.
        fixed = {
            "model.kind": c.model.kind.upper(), "data.name": c.data.name, "optimizer.name": c.optimizer.name,
            "loss": c.loss, "batch_size": f"batches of {c.batch_size}" if c.batch_size else "full batch",
            "steps": f"{c.steps} steps",
        }  # fmt: skip
        setting = ", ".join(text for key, text in fixed.items() if key not in self.sweep.axes)
        lines = [f"<p>{escape(setting)}. {len(self.rows)} cells: {counts}.</p>"]
        trained = [row for row in self.rows if row["status"] == "trained"]
        if trained:
            best = max(trained, key=lambda row: row["best_test_accuracy"])
            lines.append(
                f"<p>Best test accuracy: {best['best_test_accuracy']:.3f}, by <code>{escape(best['cell'])}</code>.</p>"
            )
        lines.append(
            "<p>The red line separates runs that trained from those that diverged (the loss left all bounds: div.) or "
            "failed (training accuracy below 1.5 times chance at the end: fail). With several seeds, "
            "numbers are means over those that trained; 2/3 says how many did, and the line follows the majority.</p>"
        )
        return lines

    def group(self, name: str, cells: list[Cell]) -> list[str]:
        """The maps, boundary, trajectories and tables of one combination of the other axes."""
        suffix = f",{name.replace(' = ', '=').replace(', ', ',')}" if name else ""
        parts = ['<div class="figures">', *self.maps(cells, suffix), "</div>", *self.boundary(cells)]
        shown = self.chosen(cells)
        if not shown:
            return [*parts, "<p>No cell trained: there are no trajectories to compare.</p>"]
        o, seed = shown[0].config.optimizer, shown[0].config.seed
        setting = f"{self.lr_label} {o.lr:g}" + (f", seed {seed}" if "seed" in self.sweep.axes else "")
        path = self.path(f"trajectories{suffix}")
        runs = {f"warmup {c.config.optimizer.warmup_steps}": read(c.folder / "metrics.jsonl") for c in shown}
        trajectories(runs, setting, path)
        caption = "Loss, and sharpness against its threshold (dashed, falling as the learning rate grows). × diverged."
        return [
            *parts,
            f"<h3>Warmup lengths at {escape(setting)}</h3>",
            "<p>The largest target learning rate at which some warmup length trained.</p>",
            f'<div class="figures">{_figure(path, caption)}</div>',
            self.dynamics(shown),
        ]

    def maps(self, cells: list[Cell], suffix: str) -> list[str]:
        """Accuracy, loss, and where the critical learning rate is known, T_reach and T_save."""
        parts = []
        # The "#" keeps the zero of 0.10, so that all numbers show two digits.
        kinds: list[tuple[str, str, str, str, str, Callable[[Cell], float | None]]] = [
            ("best_test_accuracy", "best test accuracy", "The best at any evaluation of a run that trained.", ".2f",
             "viridis", lambda c: self.of(c, "best_test_accuracy")),
            ("best_test_loss", "best test loss", "The lowest at any evaluation of a run that trained.", "#.2g",
             "viridis_r", lambda c: self.of(c, "best_test_loss")),
            ("T_reach", "T_reach", "Steps to the target when warmup of the same slope starts at the critical learning "
             "rate, found at initialisation by forward passes.", ".0f", "cividis_r", lambda c: self.of(c, "T_reach")),
            ("T_save", "T_save", "Warmup steps saved by that, less the search's forward passes, two to a step.", ".0f",
             "cividis", lambda c: self.of(c, "T_save")),
        ]  # fmt: skip
        for file, title, note, form, colours, value in kinds:
            # Over the whole sweep and not over this group: equal colours mean equal numbers in all maps of a page.
            every = [v for c in self.sweep.cells if self.trained(c) and (v := value(c)) is not None]
            if not every:
                continue
            lr, warmup = (sorted(set(values)) for values in zip(*map(_place, cells), strict=True))
            squares = {}
            for place in dict.fromkeys(map(_place, cells)):
                here = [c for c in cells if _place(c) == place and self.of(c, "status") != "unfinished"]
                # Means over those that trained: one divergence among the seeds would make the others' numbers
                # meaningless.
                values = [v for c in here if self.trained(c) and (v := value(c)) is not None]
                if here:
                    ends = "\n".join(dict.fromkeys(_ENDS[self.of(c, "status")] for c in here if not self.trained(c)))
                    squares[place] = Square(
                        fmean(values) if values else None, sum(map(self.trained, here)), len(here), ends
                    )
            path = self.path(f"{file}{suffix}")
            content = Map(lr, warmup, squares, (min(every), max(every)), form, colours)
            heatmap(content, title, self.lr_label, path)
            parts.append(_figure(path, f"{title[0].upper()}{title[1:]}. {note}"))
        return parts

    def boundary(self, cells: list[Cell]) -> list[str]:
        """The largest learning rate that trained, by warmup length, and by how much warmup moves it."""
        seeds = sorted({c.config.seed for c in cells})
        lengths = sorted({c.config.optimizer.warmup_steps for c in cells})
        body, largest = [], {}
        for warmup in lengths:
            found = [self.edge([c for c in cells if _place(c)[1] == warmup and c.config.seed == s]) for s in seeds]
            largest[warmup] = [lr for lr, _ in found]
            body.append([str(warmup), *(_edge(lr, failed) for lr, failed in found)])
        head = ["warmup steps", *(f"seed {s}" if len(seeds) > 1 else "largest that trained" for s in seeds)]
        parts = [f"<h3>Boundary: the largest {escape(self.lr_label)} that trained</h3>", _table(head, body)]
        # A seed without any run that trained has no boundary to move.
        pairs = [(a, b) for a, b in zip(largest[lengths[0]], largest[lengths[-1]], strict=True) if a and b]
        if len(lengths) > 1 and pairs:
            gains = [b / a for a, b in pairs]
            each = f" (each seed: {', '.join(f'{g:g}' for g in gains)})" if len(gains) > 1 else ""
            parts.append(
                f"<p>From {lengths[0]} to {lengths[-1]} warmup steps the boundary moves by a factor of "
                f"{median(gains):g}{each}. ≥: no larger one was tried.</p>"
            )
        return parts

    def edge(self, cells: list[Cell]) -> tuple[float | None, bool]:
        """The largest learning rate below the first that fails after one that trained; is there such a failure?"""
        # From the first that trained: below it a rate may "fail" because it is too small to learn anything in these
        # steps.
        ordered = sorted((c for c in cells if self.of(c, "status") != "unfinished"), key=_place)
        first = next((i for i, c in enumerate(ordered) if self.trained(c)), None)
        if first is None:
            return None, True
        for one, following in pairwise(ordered[first:]):
            if not self.trained(following):
                return _place(one)[0], True
        return _place(ordered[-1])[0], False

    def chosen(self, cells: list[Cell]) -> list[Cell]:
        """The first seed's runs of all warmup lengths at the largest learning rate that some of them held."""
        seed = min(c.config.seed for c in cells)
        own = [c for c in cells if c.config.seed == seed and self.of(c, "status") != "unfinished"]
        trained = [c for c in own if self.trained(c)]
        if not trained:
            return []
        lr = max(_place(c)[0] for c in trained)
        runs = sorted((c for c in own if _place(c)[0] == lr), key=_place)
        most = min(len(runs), _MOST_CURVES)
        # Evenly spread over the lengths, first and last among them.
        return [runs[round(i * (len(runs) - 1) / max(1, most - 1))] for i in range(most)]

    def dynamics(self, cells: list[Cell]) -> str:
        """The table of catapults and regimes."""
        head = ["warmup steps", "result", "first crossing", "lr there", "sharpness there / first", "catapults",
                "highest loss", "largest fall", "regime"]  # fmt: skip
        body = []
        for cell in cells:
            r = self.results[cell.name]
            ratio = r["crossing_sharpness"] / r["initial_curvature"] if r["crossing_step"] else None
            regime = "–" if r["regime"] is None else r["regime"] + ("" if r["regime_is_sure"] else " ?")
            body.append([
                str(_place(cell)[1]), r["status"], _text(r["crossing_step"], "step {:d}"),
                _text(r["crossing_lr"], "{:.3g}"), _text(ratio, "{:.2f}"), _text(r["catapults"], "{:d}"),
                _text(r["largest_catapult"], "× {:.3g}"), _text(r["largest_drop"], "{:.0%}"), regime,
            ])  # fmt: skip
        note = (
            "<p>A catapult: beyond the threshold the loss jumps, the sharpness falls, the loss comes back. "
            "Regime: C1 sharpens before it meets the threshold, C2 flattens, C3 neither; ? where the crossing came too "
            "early to tell.</p>"
        )
        return f"<h3>Catapults and regimes</h3>{_table(head, body)}{note}"

    def all_cells(self) -> str:
        """One row a cell."""
        columns = {
            "status": "{}", "best_test_accuracy": "{:.3f}", "best_test_loss": "{:.4g}", "train_accuracy": "{:.3f}",
            "train_loss": "{:.3g}", "initial_sharpness": "{:.3g}", "learning_rate": "{:.3g}", "catapults": "{:d}",
            "regime": "{}", "seconds": "{:.1f}",
        }  # fmt: skip
        names = labels(self.sweep.axes)
        body = [
            [*(word(row[key]) for key in self.sweep.axes), *(_text(row.get(k), form) for k, form in columns.items())]
            for row in self.rows
        ]
        return _table([*names, *(name.replace("_", " ") for name in columns)], body)

    def path(self, name: str) -> Path:
        """Of a figure."""
        return self.sweep.folder / "figures" / f"{name}.png"

    def of(self, cell: Cell, column: str) -> Any:
        """A cell's value in a column."""
        return self.results[cell.name].get(column)

    def trained(self, cell: Cell) -> bool:
        """Neither failed nor diverged, and finished."""
        return bool(self.of(cell, "status") == "trained")


def _place(cell: Cell) -> tuple[float, int]:
    return cell.config.optimizer.lr, cell.config.optimizer.warmup_steps


def _edge(lr: float | None, failed: bool) -> str:
    return "none" if lr is None else f"{'' if failed else '≥ '}{lr:g}"


def _text(value: Any, form: str) -> str:
    return "–" if value is None else form.format(value)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = "\n".join(row(cells, "td") for cells in body)
    return f'<div class="wide"><table><thead>{row(head, "th")}</thead><tbody>\n{lines}\n</tbody></table></div>'


def _figure(path: Path, caption: str) -> str:
    image = base64.b64encode(path.read_bytes()).decode()
    text = escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{image}"><figcaption>{text}</figcaption></figure>'
