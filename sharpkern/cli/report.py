"""``sharpkern report``: a sweep's phase diagrams."""

from __future__ import annotations

import argparse
from pathlib import Path

from .exits import OK

DESCRIPTION = "Draw a sweep's phase diagrams: report.html in its folder, and PNGs."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the command's options."""
    parser.add_argument("folder", type=Path, help="of a sweep")
    parser.add_argument("--partial", action="store_true", help="although some cells are not finished")


def run(given: argparse.Namespace) -> int:
    """Draw; return the exit code."""
    from ..sweep.report import write_report

    print(f"report: {write_report(given.folder, partial=given.partial)}")
    return OK
