"""``sharpkern bench``: the benchmark suite, which lives in a source checkout and is not part of the wheel."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

SCRIPT = Path("benchmarks") / "run.py"
DESCRIPTION = """Compare with every peer that is installed.

The suite is not part of the installed package: run this inside a source checkout."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options, which are those of the suite's script."""
    parser.add_argument("--quick", action="store_true", help="fewer workloads and rounds, nothing compiled: minutes")
    parser.add_argument("--threads", type=int, metavar="N", help="torch threads (default: 2)")
    parser.add_argument("--rounds", type=int, metavar="N", help="at most, for an entry (default: 30, quick: 8)")
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="X",
        help="begin no further round of an entry after so long (default: 10, quick: 2)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for JSON, table and plots (default: benchmarks/results)"
    )


def run(given: argparse.Namespace) -> int:
    """Run the suite; return its exit code."""
    # Passed on only where given, so that the suite's own defaults stand in one place.
    values = {name: getattr(given, name) for name in ("threads", "rounds", "seconds", "out")}
    arguments = [f"--{name}={value}" for name, value in values.items() if value is not None]
    quick = ["--quick"] if given.quick else []
    # A process of its own: the suite imports its parts as scripts from their folder, and peers that the package must
    # not need.
    return subprocess.run([sys.executable, str(find()), *quick, *arguments]).returncode


def find(start: Path | None = None) -> Path:
    """Return the suite's script: of the checkout that this package is imported from, or of the one at ``start``.

    Args:
        start: a folder in a checkout; None for the current one.

    Raises:
        FileNotFoundError: neither is there.
    """
    here = Path.cwd() if start is None else start
    # The first holds for an editable installation, whose files are those of the checkout.
    for root in (Path(__file__).parents[2], here, *here.parents):
        if (root / SCRIPT).is_file() and (root / "sharpkern").is_dir():
            return root / SCRIPT
    raise FileNotFoundError(
        "the benchmark suite is not installed with the package: run this inside a source checkout of sharpkern, "
        f"which has {SCRIPT}"
    )
