"""``sharpkern report``: a sweep's phase diagrams."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from .exits import OK

DESCRIPTION = "Draw a sweep's phase diagrams: report.html in its folder, and PNGs."


def run(
    folder: Annotated[Path, Argument(help="of a sweep")],
    partial: Annotated[bool, Option("--partial", help="although some cells are not finished")] = False,
) -> int:
    """Draw; return the exit code."""
    from ..sweep.report import write_report

    print(f"report: {write_report(folder, partial=partial)}")
    return OK
