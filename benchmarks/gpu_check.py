"""Everything to know from a GPU, in one run below nine minutes: ``python benchmarks/gpu_check.py``.

Builds the extension in place, measures every GPU figure of the design (each result checked against float64 first),
runs ``pytest -m gpu``, and writes a JSON and a Markdown table. What fails is reported in its row and loses no other.

    --dry-run     the same measurements on the CPU at tiny sizes, without build and tests: proves that the code runs
    --no-build    use the extension that is there
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 500.0  # seconds for all of it; tests get what the measurements leave


def run(command: list[str], limit: float) -> tuple[int, str]:
    """Run a command in the repository; return its exit status (124: out of time) and the end of its output."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, limit), check=False)
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        return 124, (output if isinstance(output, str) else output.decode(errors="replace"))[-4000:]
    except OSError as error:
        return 127, str(error)
    return done.returncode, (done.stdout + done.stderr)[-4000:]


def build() -> dict[str, Any]:
    """Build ``sharpkern._C`` next to its sources; the output says whether nvcc was found."""
    status, output = run([sys.executable, "setup.py", "build_ext", "--inplace"], 150)
    found = "building without CUDA" not in output
    return {"status": status, "with_cuda": status == 0 and found, "output": output if status else output[-400:]}


def machine(device: torch.device, commit: str | None) -> dict[str, Any]:
    """Name everything that a figure depends on."""
    facts: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "device": str(device)}
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError as error:
        facts["triton"] = str(error)
    status, head = run(["git", "rev-parse", "HEAD"], 10)
    facts["commit"] = commit or (head.strip() if status == 0 else "unknown")
    facts["fp32_precision"] = torch.backends.cuda.matmul.fp32_precision
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"device": properties.name, "memory_GiB": properties.total_memory / 2**30, "cuda": torch.version.cuda}
        facts["multiprocessors"] = properties.multi_processor_count
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
        status, output = run(query, 10)
        facts["driver, clocks, power"] = output.strip() if status == 0 else "unknown"
    return facts


def measure(device: torch.device, full: bool, until: float) -> list[dict[str, Any]]:
    """Run all measurements; a failure becomes a row."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from gpu_rows import MEASUREMENTS

    rows: list[dict[str, Any]] = []
    for measurement in MEASUREMENTS:
        torch.manual_seed(0)
        rounds = measurement(device, full)
        while True:
            if time.monotonic() > until:
                rows.append({"name": measurement.__name__, "failed": "no time was left"})
                break
            try:
                row = next(rounds, None)
            except Exception as error:
                rows.append({"name": measurement.__name__, "failed": f"{type(error).__name__}: {error}"})
                traceback.print_exc()
                break
            if row is None:
                break
            rows.append(row)
            print(line(row), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    if "failed" in row:
        return f"| {row['name']} | failed: {row['failed'].splitlines()[0][:120]} | | |"
    verdict = "WRONG" if not row["right"] else "yes" if row["met"] else "no"
    return f"| {row['name']} | {row['value']:.3g} | {row['goal']} | {verdict} (error {row['error']:.0e}) |"


def main() -> int:
    """Run the check; exit 2 without a GPU, 1 if anything failed or is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--no-build", action="store_true")
    parser.add_argument("--commit", help="where the checkout has no git")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of gpu_check.json, .md"
    )
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu_check: no CUDA device here (torch.cuda.is_available() is false); --dry-run runs it on the CPU.")
        return 2
    start = time.monotonic()
    device = torch.device("cpu" if options.dry_run else "cuda")
    results: dict[str, Any] = {"machine": machine(device, options.commit), "dry_run": options.dry_run}
    if not options.dry_run and not options.no_build:
        results["build"] = build()
        print(f"build: {results['build']}", flush=True)
    print("| what | measured | goal | reached |\n|---|---|---|---|", flush=True)
    results["rows"] = measure(device, not options.dry_run, start + 0.6 * BUDGET)
    if not options.dry_run:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests", "-p", "no:cacheprovider"]
        status, output = run(command, start + BUDGET - time.monotonic())
        results["tests"] = {"status": status, "output": output}
        print(f"pytest -m gpu: exit {status}\n{output[-1500:]}", flush=True)
    results["wall_seconds"] = time.monotonic() - start
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu_check.json").write_text(json.dumps(results, indent=1))
    facts = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    table = "\n".join(["| what | measured | goal | reached |", "|---|---|---|---|", *map(line, results["rows"])])
    (options.out / "gpu_check.md").write_text(f"{facts}\n\n{table}\n")
    good = all(row.get("right") for row in results["rows"]) and not results.get("tests", {}).get("status")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
