"""Make the tables and plots from a run's JSON: ``python benchmarks/report.py results/full.json [--docs]``.

With ``--docs`` they go into docs/lab/benchmarks.md and README.md, between the marks there, and docs/images.
"""

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
MODELS = {
    "overhead": "MLP 64-128-128-10, batch 64", "mlp": "MLP 784-512x4-10, batch 256",
    "cnn": "CNN with norms, batch 64", "wrn": "WRN-16-2 with layer norm, batch 16",
    "gpt": "GPT, 1.9M parameters, 8 x 128 tokens", "gpt2": "GPT-2, 124M parameters, 1 x 128 tokens",
}  # fmt: skip
PLOTS = {
    "bench_growth.png": "Cost as a model, its batch and the number of vectors grow, with fitted exponents",
    "bench_products.png": "Products in gradients of the same loss",
}
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
        if kind == "first":
            rows += [
                {"question": "time to first product", "where": where(entry), "own": "sharpkern", "peer": name,
                 **ratio(seconds, "sharpkern", name)}
                for name in seconds if "sharpkern" in seconds and not is_own(name)
            ]  # fmt: skip
        if kind in ("growth", "first"):
            continue
        limit = {"product": wrong_beyond(entry), "cold": entry.get("level"), "training": 1e-2}[kind]
        others = entry.get("another_quantity", ())
        right = [n for n in seconds if entry["errors"].get(n, float("inf")) <= limit and n not in others]
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


def wrong_beyond(entry: Row) -> float:
    """Error of a product that is wrong: beyond ``WRONG``, and twice what double backward has in the same precision.

    In a ReLU network of many pre-activations rounding alone puts some on the other side of the kink than in float64.
    """
    return max(WRONG, 2 * entry["errors"].get("autograd, graph kept", 0.0))


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
            lines += [f"| {name} | {why} |" + " |" * (len(names) - 1) for name, why in entry["failed"].items()]
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
        shown = (
            ""
            if error is None
            else f"{error:.1e}" + (" WRONG" if kind == "product" and error > wrong_beyond(entry) else "")
        )
        if name in entry.get("another_quantity", ()):
            shown += " (another quantity)"
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
    if "of_threshold" in entry:
        note += f"\n\nSharpness over the threshold 2 / lr at the outset: {entry['of_threshold']:.2f}."
    if "eigenvalues" in entry:
        note += f" Largest eigenvalues: {', '.join(f'{value:.4g}' for value in entry['eigenvalues'])}."
    return "| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|\n" + "\n".join(lines) + note


Goal = tuple[str, float, float, str]  # what, the most it may be, the worst measured, where that was


def goals(result: Row) -> list[Goal]:
    """The suite's goals, those that were measured; products of one vector."""
    rows = [row for row in duels(result) if "vectors" not in row["where"]]
    products = [e for e in result["entries"] if e["question"] == "product" and e["k"] == 1]
    found: list[Goal] = []

    def judge(what: str, most: float, measured: list[tuple[float, str]]) -> None:
        if measured:
            found.append((what, most, *max(measured)))

    def of(question: str, *peers: str, level: str = "") -> list[tuple[float, str]]:
        chosen = [r for r in rows if r["question"] == question and r["where"].endswith(level)]
        return [(r["median"], f"{r['where']}, {r['peer']}") for r in chosen if not peers or r["peer"] in peers]

    judge("product / autograd with a kept graph", 0.85, of("product", "autograd, graph kept"))
    judge("product / what recomputes the primal", 0.7, of("product", *[n for n in RECOMPUTE if "JAX" not in n]))
    judge("product / JAX jit(jvp(grad))", 0.9, of("product", "JAX jit(jvp(grad))"))
    judge("product / JAX jit(linearize)", 0.9, of("product", "JAX jit(linearize)"))
    judge("peak memory / least of the peers'", 0.6, [memory for e in products for memory in _memory(e)])
    judge("cold, to 0.1% / best peer", 0.5, of("cold", level="to 0.001"))
    tracking = of("training")
    judge("tracking at 1% / PyHessian", 0.15, [t for t in tracking if t[1].endswith("PyHessian, cold")])
    judge("tracking at 1% / best other", 0.25, [t for t in tracking if not t[1].endswith("PyHessian, cold")])
    return found


def _memory(entry: Row) -> list[tuple[float, str]]:
    used = {n: b for n, b in entry["peak_bytes"].items() if b and n != entry["base"]}
    peers = {n: b for n, b in used.items() if not is_own(n)}
    if "sharpkern" not in used or not peers:
        return []
    least = min(peers, key=lambda n: peers[n])
    return [(used["sharpkern"] / peers[least], f"{where(entry)}, {least}")]


def goal_table(result: Row) -> str:
    """Misses first, the farthest first."""
    lines = []
    for what, most, got, place in sorted(goals(result), key=lambda g: -g[2] / g[1]):
        state = f"reached | {got:.2f}" if got <= most else f"**missed** | **{got:.2f}**"
        lines.append(f"| {what} | {most} | {state} | {place} |")
    return "| goal | at most | | worst | where, against |\n" + "|---" * 5 + "|\n" + "\n".join(lines)


def limits(result: Row) -> str:
    """Where sharpkern's product spends its time: what explains a miss."""
    head = "| workload | product / its own matrix products | shares of its time |\n|---|---|---|\n"
    lines = []
    for entry in result["entries"]:
        if entry.get("profile"):
            shares = ", ".join(f"{name} {share:.0%}" for name, share in entry["profile"].items())
            lines.append(
                f"| {where(entry)} | {ratio(entry['seconds'], 'sharpkern', 'floor')['median']:.2f} | {shares} |"
            )
    return head + "\n".join(lines) if lines else "Not measured in this run."


def readme_table(result: Row) -> str:
    """Products of one vector in gradients: the README's summary."""
    head = "| model | sharpkern | autograd, graph kept | best other | of the product's own GEMMs and convolutions |\n"
    lines = []
    for entry in result["entries"]:
        if entry["question"] != "product" or entry["k"] != 1:
            continue
        seconds, errors = entry["seconds"], entry["errors"]
        kept = "autograd, graph kept"
        others = [n for n in errors if n not in (kept, "sharpkern") and errors[n] <= wrong_beyond(entry)]
        best = min(others, key=lambda n: min(seconds[n]))
        costs = [ratio(seconds, name, entry["base"])["minima"] for name in ("sharpkern", kept, best)]
        floor = ratio(seconds, "sharpkern", "floor")["minima"]
        lines.append(
            f"| {MODELS[entry['workload']]} | {costs[0]:.2f} | {costs[1]:.2f} | {costs[2]:.2f} ({best}) | {floor:.2f} |"
        )
    m = result["machine"]
    note = f"{m['cpu']} ({m['vector']}), {m['threads']} thread(s), {result['date']}; ratios of minima."
    return head + "|---" * 5 + "|\n" + "\n".join(lines) + "\n\n" + note


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

    for name in PLOTS:  # one of an earlier run is not this run's
        (folder / name).unlink(missing_ok=True)
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
    sections = (
        conditions(result), "## Goals\n\n" + goal_table(result), "## Where a product's time goes\n\n" + limits(result),
        "## Against each peer\n\n" + table(result), "## Everything\n\n" + details(result),
    )  # fmt: skip
    text.write_text("\n\n".join(sections) + "\n")
    plots(result, path.parent)
    return text


def write_docs(path: Path) -> None:
    """Put tables and plots into docs/lab/benchmarks.md and README.md, between their marks."""
    root = Path(__file__).parents[1]
    text = write_report(path).read_text()
    for name, caption in PLOTS.items():
        if (path.parent / name).is_file():
            (root / "docs" / "images" / name).write_bytes((path.parent / name).read_bytes())
            text = f"![{caption}](../images/{name})\n\n{text}"
    between(root / "docs" / "lab" / "benchmarks.md", text)
    between(root / "README.md", readme_table(json.loads(path.read_text())) + "\n")


def between(page: Path, text: str) -> None:
    """Replace what stands between the two marks of a page.

    Raises:
        ValueError: the page lacks one.
    """
    before, start, rest = page.read_text().partition("<!-- measured -->")
    _, end, after = rest.partition("<!-- end -->")
    if not start or not end:
        raise ValueError(f"{page} needs the marks <!-- measured --> and <!-- end -->.")
    page.write_text(f"{before}{start}\n\n{text}\n{end}{after}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("--docs", action="store_true", help="update docs/lab/benchmarks.md and its plots, too")
    options = parser.parse_args()
    (write_docs if options.docs else write_report)(options.json)
