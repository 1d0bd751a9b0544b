"""Compare sharpkern with every peer that is installed, and with the limit: ``python benchmarks/run.py [--quick]``.

Writes one JSON with every round's time, then the table and plots made from it (report.py). docs/benchmarks.md explains
the questions.
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
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peers import load
from questions import Effort, cold, first, growth, product, training
from report import write_report

HERE = Path(__file__).parent
PACKAGES = (
    "torch", "numpy", "scipy", "pyhessian", "curvlinops-for-pytorch", "hessian-eigenthings", "jax", "jaxlib",
)  # fmt: skip


def entries(effort: Effort, compiled: bool) -> Iterator[dict[str, Any]]:
    """Ask everything."""
    found, _ = load()
    if not compiled:
        found.pop("jvp(jacrev), compiled", None)
    for workload in ("overhead", "mlp", "cnn", "gpt"):
        for k in (1, 4) if effort.quick else (1, 2, 4, 8):
            chosen = found if k == 1 else {name: c for name, c in found.items() if "compiled" not in name}
            if effort.quick and (workload in ("cnn", "gpt") and k > 1):
                continue
            yield product.ask(workload, k, chosen, effort)
    points = (("mlp", "edge"),) if effort.quick else (
        ("mlp", "init"), ("mlp", "trained"), ("mlp", "edge"), ("cnn", "edge"), ("gpt", "edge"),
    )  # fmt: skip
    for workload, point in points:
        yield from cold.ask(workload, point, effort)
    steps = 8 if effort.quick else 60
    yield training.ask("mlp", "sgd", steps, effort)
    yield training.ask("mlp", "adam", steps // 2, effort)
    if not effort.quick:
        yield training.ask("cnn", "sgd", 12, effort)
    axes = ("width", "vectors") if effort.quick else tuple(growth.AXES)
    few = {name: c for name, c in found.items() if name in ("sharpkern", "autograd, graph kept", "jvp(jacrev)")}
    for axis in axes:
        yield growth.ask(axis, few, effort)
    for workload in ("mlp",) if effort.quick else ("mlp", "gpt"):
        yield first.ask(workload, list(found))


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
    effort = Effort(rounds, options.seconds or (4.0 if options.quick else 20.0), options.quick)
    out = options.out or HERE / "results"
    out.mkdir(parents=True, exist_ok=True)
    path = out / ("quick.json" if options.quick else "full.json")
    settings = {"quick": options.quick, "rounds": rounds, "seconds": effort.seconds}
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(), "settings": settings, "machine": machine(),
        "versions": versions(), "missing": load()[1], "entries": [],
    }  # fmt: skip
    begun = time.perf_counter()
    for entry in entries(effort, compiled=not options.quick):
        result["entries"].append(entry)
        path.write_text(json.dumps(result, indent=None, separators=(",", ":")))
        label = " ".join(
            str(entry[key]) for key in ("workload", "point", "level", "optimizer", "k", "axis") if key in entry
        )
        print(f"{time.perf_counter() - begun:6.0f} s  {entry['question']} {label}", flush=True)
    print(f"{path}\n{write_report(path)}")


if __name__ == "__main__":
    main()
