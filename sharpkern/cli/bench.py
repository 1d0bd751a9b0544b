"""Find and run the benchmark suite, which lives in a source checkout and is not part of the wheel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path("benchmarks") / "run.py"


def find(start: Path | None = None) -> Path:
    """Return the suite's script: of the checkout that this package is imported from, or of the one at ``start``.

    Args:
        start: a folder in a checkout; None for the current one.

    Raises:
        FileNotFoundError: neither is there.
    """
    here = Path.cwd() if start is None else start
    for root in (Path(__file__).parents[2], here, *here.parents):
        if (root / SCRIPT).is_file() and (root / "sharpkern").is_dir():
            return root / SCRIPT
    raise FileNotFoundError(
        "the benchmark suite is not installed with the package: run this inside a source checkout of sharpkern, "
        f"which has {SCRIPT}"
    )


def run(arguments: list[str]) -> int:
    """Run the suite with the given options; return its exit code."""
    return subprocess.run([sys.executable, str(find()), *arguments]).returncode
