"""What ``recompute=True`` saves in memory, and costs in time: ``python benchmarks/bench_memory.py [--rounds 5]``.

Writes results/memory.json and the table of docs/explain/memory.md. Memory is the most bytes of tensors held at once,
and time that of the processor, on one thread: other programs on the machine do not count. Rounds are interleaved.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from report import MODELS, between
from run import machine, versions
from workloads import WORKLOADS

import sharpkern as sk
from sharpkern.curvature.memory import gradient_of, memory_of

ROOT = Path(__file__).parents[1]
NAMES = ("mlp", "cnn", "wrn", "gpt")
KINDS = {"kept": False, "recomputed": True}


def ask(name: str, rounds: int) -> dict[str, Any]:
    """Measure one workload."""
    torch.manual_seed(0)
    work = WORKLOADS[name]()
    operators = {kind: sk.HessianOperator(*work, recompute=again) for kind, again in KINDS.items()}
    v = torch.randn(operators["kept"].n)
    calls: dict[str, Callable[[], object]] = {"gradient": lambda: gradient_of(operators["kept"], work.batch)}
    for kind, H in operators.items():
        calls[f"primal, {kind}"] = lambda H=H: (H.refresh(), H.gradient)
        calls[f"form, {kind}"] = lambda H=H: H.quadratic_form(v)
        calls[f"product, {kind}"] = lambda H=H: H @ v
    seconds: dict[str, list[float]] = {key: [] for key in calls}
    for number in range(-2, rounds):
        for key, call in calls.items():
            start = time.process_time()
            call()
            if number >= 0:
                seconds[key].append(time.process_time() - start)
    assert torch.equal(operators["kept"] @ v, operators["recomputed"] @ v)
    return {
        "workload": name, "parameters": len(v), "seconds": seconds,
        "segments": len(operators["recomputed"].engine.program.segments),
        "bytes": {kind: asdict(memory_of(H)) for kind, H in operators.items()},
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """Return the table of the page."""
    lines = [
        "| model | gradient, MB | segments | memory of a product, kept | recomputed | time of a product, kept | "
        "recomputed | form | loss and gradient |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for e in result["entries"]:
        kept, again = (e["bytes"][kind]["product"] / e["bytes"][kind]["gradient"] for kind in KINDS)
        times = [
            statistics.median(a / b for a, b in zip(e["seconds"][key], e["seconds"]["gradient"], strict=True))
            for key in ("product, kept", "product, recomputed", "form, kept", "form, recomputed", "primal, kept",
                        "primal, recomputed")
        ]  # fmt: skip
        lines.append(
            f"| {MODELS[e['workload']]} | {e['bytes']['kept']['gradient'] / 1e6:.1f} | {e['segments']} | {kept:.2f} | "
            f"**{again:.2f}** | {times[0]:.2f} | {times[1]:.2f} | {times[2]:.2f}, {times[3]:.2f} | {times[4]:.2f}, "
            f"{times[5]:.2f} |"
        )
    m, v = result["machine"], result["versions"]
    where = f"{m['cpu']}, {m['threads']} thread, torch {v['torch']}, commit {v['commit']}, {result['date']}"
    return "\n".join([
        *lines, "",
        "All in units of the model's own forward and backward pass; of two numbers the second is recomputed. "
        f"Medians on {where}; `benchmarks/bench_memory.py`.", "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine(), "versions": versions(), "entries": [],
    }  # fmt: skip
    for name in NAMES:
        result["entries"].append(ask(name, options.rounds))
        print(table({**result, "entries": result["entries"][-1:]}), flush=True)
    (ROOT / "benchmarks" / "results" / "memory.json").write_text(json.dumps(result))
    between(ROOT / "docs" / "explain" / "memory.md", table(result))


if __name__ == "__main__":
    main()
