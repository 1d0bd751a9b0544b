"""``sharpkern bench``: the benchmark suite, which lives in a source checkout and is not part of the wheel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

from typer import Option

SCRIPT = Path("benchmarks") / "run.py"
DESCRIPTION = """Compare with every peer that is installed.

The suite is not part of the installed package: run this inside a source checkout."""


def run(
    quick: Annotated[bool, Option("--quick", help="fewer workloads and rounds, nothing compiled: minutes")] = False,
    threads: Annotated[int | None, Option(help="torch threads (default: 2)")] = None,
    rounds: Annotated[int | None, Option(help="at most, for an entry (default: 30, quick: 8)")] = None,
    seconds: Annotated[
        float | None, Option(help="begin no further round of an entry after so long (default: 10, quick: 2)")
    ] = None,
    out: Annotated[Path | None, Option(help="folder for JSON, table and plots (default: benchmarks/results)")] = None,
) -> int:
    """Run the suite with its own options; return its exit code."""
    # Passed on only where given, so that the suite's own defaults stand in one place.
    values = {"threads": threads, "rounds": rounds, "seconds": seconds, "out": out}
    arguments = [f"--{name}={value}" for name, value in values.items() if value is not None]
    # A process of its own: the suite imports its parts as scripts from their folder, and peers that the package must
    # not need.
    return subprocess.run([sys.executable, str(find()), *["--quick"] * quick, *arguments]).returncode


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
