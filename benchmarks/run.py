"""Compare sharpkern with every peer that is installed, and with the limit: ``python benchmarks/run.py [--quick]``.

Writes one JSON with every round's time, then the table and plots made from it (report.py). docs/lab/benchmarks.md
explains the questions.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import subprocess
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peers import Peer, load
from questions import Effort, cold, first, growth, product, training
from report import write_report

HERE = Path(__file__).parent
PACKAGES = (
    "torch", "numpy", "scipy", "pyhessian", "curvlinops-for-pytorch", "hessian-eigenthings", "jax", "jaxlib",
)  # fmt: skip


QUICK_BLOCKS = {"overhead": (1, 4), "mlp": (1,), "cnn": (1,)}
BLOCKS = {"overhead": (1, 2, 4, 8), "mlp": (1, 2, 4, 8), "cnn": (1, 4), "wrn": (1,), "gpt": (1, 4)}
LARGE = ("sharpkern", "autograd, graph kept", "jvp(jacrev)", "JAX jit(jvp(grad))")
GROWN = ("sharpkern", "autograd, graph kept", "jvp(jacrev)")


def quick_entries(effort: Effort) -> Iterator[dict[str, Any]]:
    """Ask every question once or twice, nothing compiled by torch: under four minutes on two slow cores."""
    found = _without(load()[0], "compiled")
    for workload, blocks in QUICK_BLOCKS.items():
        for k in blocks:
            yield product.ask(workload, k, found, effort)
    yield from cold.ask("mlp", "edge", effort)
    yield training.ask("mlp", "init", "sgd", 3, effort)
    for axis in ("width", "vectors"):
        yield growth.ask(axis, {name: found[name] for name in GROWN}, effort)
    yield first.ask("mlp", list(GROWN), 1)


def full_entries(effort: Effort) -> Iterator[dict[str, Any]]:
    """Ask everything."""
    found = load()[0]
    few = replace(effort, rounds=3, untimed=0)
    for workload, blocks in BLOCKS.items():
        for k in blocks:
            yield product.ask(workload, k, found if k == 1 else _without(found, "compiled"), effort)
    yield product.ask("gpt2", 1, {name: c for name, c in found.items() if name in LARGE}, replace(few, rounds=2))
    for point in ("init", "trained", "edge"):
        yield from cold.ask("mlp", point, effort)
    for workload in ("cnn", "gpt"):
        yield from cold.ask(workload, "edge", few)
    yield training.ask("mlp", "init", "sgd", 200, effort)
    yield training.ask("mlp", "edge", "sgd", 40, effort)
    yield training.ask("mlp", "init", "adam", 40, effort)
    yield training.ask("cnn", "edge", "sgd", 8, effort)
    for axis in growth.AXES:
        yield growth.ask(axis, {name: found[name] for name in GROWN}, effort)
    yield first.ask("mlp", list(found), 2)
    yield first.ask("gpt", list(_without(found, "compiled")), 1)


def _without(found: dict[str, type[Peer]], word: str) -> dict[str, type[Peer]]:
    return {name: c for name, c in found.items() if word not in name}


def machine() -> dict[str, Any]:
    """Describe what the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {"cpu": cpu, "vector": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Versions of packages and of this checkout."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return {**found, "commit": git.stdout.strip() or "unknown"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer workloads and rounds, nothing compiled: minutes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="at most, for an entry")
    parser.add_argument("--seconds", type=float, help="begin no further round of an entry after so long")
    parser.add_argument("--out", type=Path, help="folder for JSON, table and plots; default benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("curvlinops").setLevel(logging.ERROR)
    rounds = options.rounds or (8 if options.quick else 30)
    effort = Effort(rounds, options.seconds or (2.0 if options.quick else 10.0), options.quick)
    out = options.out or HERE / "results"
    out.mkdir(parents=True, exist_ok=True)
    path = out / ("quick.json" if options.quick else "full.json")
    settings = {"quick": options.quick, "rounds": rounds, "seconds": effort.seconds}
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(), "settings": settings, "machine": machine(),
        "versions": versions(), "missing": load()[1], "entries": [],
    }  # fmt: skip
    begun = time.perf_counter()
    for entry in (quick_entries if options.quick else full_entries)(effort):
        result["entries"].append(entry)
        path.write_text(json.dumps(result, indent=None, separators=(",", ":")))
        label = " ".join(
            str(entry[key]) for key in ("workload", "point", "level", "optimizer", "k", "axis") if key in entry
        )
        print(f"{time.perf_counter() - begun:6.0f} s  {entry['question']} {label}", flush=True)
    print(f"{path}\n{write_report(path)}")


if __name__ == "__main__":
    main()
