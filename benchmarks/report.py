"""Make docs' table and plots from a run's JSON: ``python benchmarks/report.py results/full.json [--docs]``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from interleave import ratio

WRONG = 1e-3  # relative error of a product in float32 beyond which it is wrong
OWN = ("sharpkern", "floor")
RECOMPUTE = ("autograd, from scratch", "jvp(jacrev)", "jvp(jacrev), compiled", "curvlinops", "hessian-eigenthings",
             "JAX jit(jvp(grad))")  # fmt: skip
Row = dict[str, Any]


def is_own(name: str) -> bool:
    """Whether a contender is sharpkern, in whatever setting, or a limit; not a peer."""
    return name.startswith(OWN)


def where(entry: Row) -> str:
    """Name an entry."""
    keys = ("workload", "point", "optimizer", "axis")
    words = [str(entry[key]) for key in keys if key in entry]
    if entry.get("k", 1) != 1:
        words.append(f"{entry['k']} vectors")
    if "level" in entry:
        words.append(f"to {entry['level']:.1g}")
    return " ".join(words)


def duels(result: Row) -> list[Row]:
    """Compare sharpkern with each peer of each entry: ratio of sharpkern's time to the peer's, of minima and per round.

    A peer whose result is wrong competes with nobody. In training runs both sides must be within 1%.
    """
    rows = []
    for entry in result["entries"]:
        kind, seconds = entry["question"], entry.get("seconds", {})
        if kind in ("growth", "first"):
            continue
        limit = {"product": WRONG, "cold": entry.get("level"), "training": 1e-2}[kind]
        right = [name for name in seconds if name in entry["errors"] and entry["errors"][name] <= limit]
        ours = [name for name in right if is_own(name)]
        if not ours:
            continue
        mine = min(ours, key=lambda name: min(seconds[name]))
        for name in right:
            if is_own(name):
                continue
            base = extra(entry, mine, name) if kind == "training" else ratio(seconds, mine, name)
            rows.append({"question": kind, "where": where(entry), "own": mine, "peer": name, **base})
            if kind == "product" and name in RECOMPUTE:
                whole = "sharpkern, with its gradient"
                rows.append({
                    "question": "product and gradient", "where": where(entry), "own": whole, "peer": name,
                    **ratio(seconds, whole, name),
                })  # fmt: skip
    return rows


def extra(entry: Row, mine: str, peer: str) -> dict[str, float]:
    """Ratio of what tracking adds to a step: medians over steps, less the plain step."""
    plain = entry["seconds"][entry["base"]]
    added = {name: [s - p for s, p in zip(entry["seconds"][name], plain, strict=True)] for name in (mine, peer)}
    return ratio({name: [max(s, 1e-9) for s in v] for name, v in added.items()}, mine, peer)


def table(result: Row) -> str:
    """Rows where a peer wins first."""
    head = (
        "| question | where | peer | sharpkern / peer, minima | per round: median (quartiles) |\n" + "|---" * 5 + "|\n"
    )
    lines = []
    for row in sorted(duels(result), key=lambda r: -r["median"]):
        bold = "**" if row["median"] > 1 else ""
        lines.append(
            f"| {row['question']} | {row['where']} | {row['peer']} | {row['minima']:.2f} "
            f"| {bold}{row['median']:.2f}{bold} ({row['low']:.2f} to {row['high']:.2f}) |"
        )
    return head + "\n".join(lines)


def details(result: Row) -> str:
    """Everything that was timed, question by question."""
    parts = []
    for entry in result["entries"]:
        kind = entry["question"]
        if kind == "first":
            stages = entry["stages"]
            names = list(next(iter(stages.values()), {}))
            lines = [
                f"| {name} | " + " | ".join(f"{s:.3f}" for s in row.values()) + " |" for name, row in stages.items()
            ]
            head = "| seconds | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|\n"
            parts.append(f"**Time to first result, {where(entry)}**\n\n{head}" + "\n".join(lines))
            continue
        if kind == "growth":
            lines = [f"| {name} | {slope:.2f} |" for name, slope in entry["exponents"].items()]
            parts.append(f"**Growth with {entry['axis']}**\n\n| contender | exponent |\n|---|---|\n" + "\n".join(lines))
            continue
        parts.append(f"**{kind.capitalize()}, {where(entry)}**\n\n{_entry(entry)}")
    return "\n\n".join(parts)


def _entry(entry: Row) -> str:
    seconds, base, kind = entry["seconds"], entry["base"], entry["question"]
    head = ["contender", "ms, least", f"of {base}: minima", "per-round median", "error"]
    head += {"product": ["peak memory, gradients"], "cold": ["products", "setting"], "training": ["products"]}[kind]
    lines = []
    for name, times in seconds.items():
        error = entry["errors"].get(name)
        shown = "" if error is None else f"{error:.1e}" + (" WRONG" if kind == "product" and error > WRONG else "")
        compared = ratio(seconds, name, base) if base in seconds else {"minima": float("nan"), "median": float("nan")}
        cells = [name, f"{1e3 * min(times):.2f}", f"{compared['minima']:.2f}", f"{compared['median']:.2f}", shown]
        if kind == "product":
            used = entry["peak_bytes"].get(name)
            cells.append("" if used is None else f"{used / entry['peak_bytes'][base]:.2f}")
        elif kind == "cold":
            chosen = entry["chosen"][name]
            cells += [f"{chosen['products']:.0f}", str(chosen["setting"])]
        else:
            cells.append(f"{entry['products'][name]:.1f}" if name in entry["products"] else "")
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"| {name} | {why} |" + " |" * (len(head) - 2) for name, why in entry.get("failed", {}).items()]
    compiling = ", ".join(f"{name} {s:.1f} s" for name, s in entry.get("compile_seconds", {}).items())
    note = f"\n\nCompile time: {compiling}." if compiling else ""
    return "| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|\n" + "\n".join(lines) + note


def goals(result: Row) -> list[tuple[str, float, float | None]]:
    """The suite's goals: what, the most it may be, and the worst that was measured."""
    rows, products = duels(result), [e for e in result["entries"] if e["question"] == "product" and e["k"] == 1]

    def worst(question: str, *names: str) -> float | None:
        found = [r["median"] for r in rows if r["question"] == question and r["peer"] in names and is_single(r)]
        return max(found, default=None)

    def is_single(row: Row) -> bool:
        return "vectors" not in row["where"]

    memory = [
        e["peak_bytes"]["sharpkern"]
        / min(b for n, b in e["peak_bytes"].items() if b and not is_own(n) and n != e["base"])
        for e in products
    ]
    cold = [r["median"] for r in rows if r["question"] == "cold" and r["where"].endswith("to 0.001")]
    tracking = [r for r in rows if r["question"] == "training"]
    others = [r["median"] for r in tracking if r["peer"] != "PyHessian, cold"]
    return [
        ("product / autograd with a kept graph", 0.85, worst("product", "autograd, graph kept")),
        ("product / what recomputes the primal", 0.7, worst("product", *[n for n in RECOMPUTE if "JAX" not in n])),
        ("product / JAX jit(jvp(grad))", 0.9, worst("product", "JAX jit(jvp(grad))")),
        ("product / JAX jit(linearize)", 0.9, worst("product", "JAX jit(linearize)")),
        ("peak memory / least of the peers'", 0.6, max(memory, default=None)),
        ("cold, to 0.1% / best peer", 0.5, max(cold, default=None)),
        ("tracking at 1% / PyHessian", 0.15, worst("training", "PyHessian, cold")),
        ("tracking at 1% / best other", 0.25, max(others, default=None)),
    ]


def goal_table(result: Row) -> str:
    """Misses first."""
    found = [(what, most, got) for what, most, got in goals(result) if got is not None]
    found.sort(key=lambda g: g[2] <= g[1])
    lines = [f"| {what} | {most} | {got:.2f} | {'reached' if got <= most else 'missed'} |" for what, most, got in found]
    return "| goal: worst of all workloads | at most | measured | |\n|---|---|---|---|\n" + "\n".join(lines)


def conditions(result: Row) -> str:
    """One paragraph on machine, versions, settings."""
    m, versions = result["machine"], ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    missing = ", ".join(f"{name} ({why})" for name, why in result["missing"].items()) or "none"
    return (
        f"{m['cpu']} ({m['vector']}), {m['threads']} thread(s), {result['date']}; {versions}. Missing peers: {missing}."
    )


def plots(result: Row, folder: Path) -> None:
    """Products in gradients; growth with fitted exponents."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    singles = [e for e in result["entries"] if e["question"] == "product" and e["k"] == 1]
    if singles:
        figure, axes = plt.subplots(1, len(singles), figsize=(4 * len(singles), 3.6), squeeze=False)
        for ax, entry in zip(axes[0], singles, strict=True):
            bars = {
                n: ratio(entry["seconds"], n, entry["base"])["median"] for n in entry["seconds"] if n != entry["base"]
            }
            names = sorted(bars, key=lambda n: -bars[n])
            ax.barh(names, [bars[n] for n in names], color=["tab:blue" if is_own(n) else "0.6" for n in names])
            ax.set_title(entry["workload"])
            ax.set_xlabel("gradients")
            ax.tick_params(axis="y", labelsize=7)
        figure.tight_layout()
        figure.savefig(folder / "bench_products.png", dpi=90)
    grown = [e for e in result["entries"] if e["question"] == "growth"]
    if grown:
        figure, axes = plt.subplots(1, len(grown), figsize=(3.6 * len(grown), 3.4), squeeze=False)
        for ax, entry in zip(axes[0], grown, strict=True):
            for name in entry["contenders"]:
                times = [1e3 * min(entry["seconds"][f"{name} {size}"]) for size in entry["sizes"]]
                ax.loglog(entry["sizes"], times, "o-", label=f"{name}: {entry['exponents'][name]:.2f}")
            ax.set_xlabel(entry["axis"])
            ax.set_ylabel("ms")
            ax.legend(fontsize=7, title="exponent")
        figure.tight_layout()
        figure.savefig(folder / "bench_growth.png", dpi=90)
    plt.close("all")


def write_report(path: Path) -> Path:
    """Write the tables and plots beside a JSON; return the table's path."""
    result = json.loads(path.read_text())
    text = path.with_suffix(".md")
    sections = (conditions(result), "## Goals\n\n" + goal_table(result), "## Against each peer\n\n" + table(result),
                "## Everything\n\n" + details(result))  # fmt: skip
    text.write_text("\n\n".join(sections) + "\n")
    plots(result, path.parent)
    return text


def write_docs(path: Path) -> None:
    """Put the tables and plots into docs/benchmarks.md, between its two marks."""
    docs = Path(__file__).parents[1] / "docs"
    text = write_report(path).read_text()
    page = docs / "benchmarks.md"
    before, _, rest = page.read_text().partition("<!-- measured -->")
    after = rest.partition("<!-- end -->")[2]
    page.write_text(f"{before}<!-- measured -->\n\n{text}\n<!-- end -->{after}")
    for name in ("bench_products.png", "bench_growth.png"):
        if (path.parent / name).is_file():
            (docs / "images" / name).write_bytes((path.parent / name).read_bytes())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("--docs", action="store_true", help="update docs/benchmarks.md and its plots, too")
    options = parser.parse_args()
    (write_docs if options.docs else write_report)(options.json)
