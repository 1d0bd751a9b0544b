"""Say what became slower between two runs, beyond their noise: ``python benchmarks/regress.py OLD.json NEW.json``.

Times are compared as ratios to a base timed in the same rounds (mostly a plain gradient), so the machine's speed drops
out. What may change by chance is measured: the spread of the per-round ratios in both runs, and how much the ratios of
the peers, whose code is the same in both, moved from run to run. Counts (counts.py) have no noise. The last line says
whether the runs agree. Exits with 1 if anything of sharpkern became slower.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from report import is_own, where

SIGMAS = 3.0
LEAST = 0.02  # smaller changes are nobody's concern
Series = dict[tuple[str, str], tuple[float, float]]  # entry, contender -> log of the median ratio, its standard error


def series(result: dict[str, Any]) -> Series:
    """Collect all ratios of a run."""
    found: Series = {}
    for entry in result["entries"]:
        seconds = entry.get("seconds", {})
        base = seconds.get(entry.get("base"))
        length = f" {entry['steps']} steps" if "steps" in entry else ""  # the first steps of a run cost more
        for name, times in seconds.items():
            if base is None or name == entry["base"]:
                continue
            logs = sorted(math.log(a / b) for a, b in zip(times, base, strict=True))
            quarter = len(logs) // 4
            spread = (logs[-1 - quarter] - logs[quarter]) / 1.35  # quartiles to a standard deviation
            found[f"{entry['question']} {where(entry)}{length}", name] = (
                statistics.median(logs), 1.25 * spread / math.sqrt(len(logs)),
            )  # fmt: skip
    return found


def drift_of(old: Series, new: Series) -> float:
    """How far the ratios of the peers moved between the runs: a standard deviation of logs."""
    moved = [abs(new[key][0] - old[key][0]) for key in old if key in new and not is_own(key[1])]
    return 1.48 * statistics.median(moved) if moved else 0.0


def compare(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str], int]:
    """Return a line for everything that became slower, one for everything faster, and how many figures both have."""
    a, b = series(old), series(new)
    drift = drift_of(a, b)
    slower, faster = [], []
    common = [key for key in a if key in b and key[1].startswith("sharpkern")]
    for key in common:
        change = b[key][0] - a[key][0]
        allowed = max(LEAST, SIGMAS * math.hypot(a[key][1], b[key][1], drift))
        line = f"{key[0]}, {key[1]}: {math.exp(change):.2f} of before, noise up to {math.exp(allowed):.2f}"
        if change > allowed:
            slower.append(line)
        elif change < -allowed:
            faster.append(line)
    before, after = counts(old), counts(new)
    for key in before.keys() & after.keys():
        if before[key] != after[key]:
            line = f"{', '.join(key)}: {after[key]}, was {before[key]}; counts have no noise"
            (slower if after[key] > before[key] else faster).append(line)
    return slower, faster, len(common) + len(before.keys() & after.keys())


def counts(result: dict[str, Any]) -> dict[tuple[str, str], int]:
    """Collect all counts of a run."""
    return {
        (f"{entry['question']} {where(entry)}", what): number
        for entry in result["entries"] for what, number in entry.get("counts", {}).items()
    }  # fmt: skip


def verdict(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Say whether two runs agree, and what noise was allowed."""
    slower, faster, compared = compare(old, new)
    if not compared:
        return "nothing to compare: the runs have no figure of sharpkern in common."
    apart = len(slower) + len(faster)
    a, b = series(old), series(new)
    errors = [math.hypot(a[key][1], b[key][1]) for key in a if key in b]
    noise = f"; {SIGMAS:.0f} standard errors allowed, at least {LEAST:.0%}" if errors else ""
    if errors:
        noise += f" (median error of a ratio {statistics.median(errors):.1%}, peers moved {drift_of(a, b):.1%})"
    found = "agree" if not apart else "DISAGREE"
    return f"The runs {found}: {compared - apart} of {compared} figures of sharpkern are within the noise{noise}."


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    old, new = (json.loads(path.read_text()) for path in (options.old, options.new))
    if old["machine"] != new["machine"]:
        print(f"other machines: {old['machine']} and {new['machine']}; ratios may differ for that alone.")
    slower, faster, _ = compare(old, new)
    print(*(f"SLOWER  {line}" for line in slower), *(f"faster  {line}" for line in faster), verdict(old, new), sep="\n")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
