"""Say what became slower between two runs, beyond their noise: ``python benchmarks/regress.py OLD.json NEW.json``.

Times are compared as ratios to a base timed in the same rounds (mostly a plain gradient), so the machine's speed drops
out. What may change by chance is measured: the spread of the per-round ratios in both runs, and how much the ratios of
the peers, whose code is the same in both, moved from run to run. Exits with 1 if anything of sharpkern became slower.
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
        for name, times in seconds.items():
            if base is None or name == entry["base"]:
                continue
            logs = sorted(math.log(a / b) for a, b in zip(times, base, strict=True))
            quarter = len(logs) // 4
            spread = (logs[-1 - quarter] - logs[quarter]) / 1.35  # quartiles to a standard deviation
            found[f"{entry['question']} {where(entry)}", name] = (
                statistics.median(logs), 1.25 * spread / math.sqrt(len(logs)),
            )  # fmt: skip
    return found


def compare(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return a line for everything that became slower, and one for everything faster."""
    a, b = series(old), series(new)
    common = [key for key in a if key in b]
    drifts = [abs(b[key][0] - a[key][0]) for key in common if not is_own(key[1])]
    drift = 1.48 * statistics.median(drifts) if drifts else 0.0
    slower, faster = [], []
    for key in common:
        if not key[1].startswith("sharpkern"):
            continue
        change = b[key][0] - a[key][0]
        allowed = max(LEAST, SIGMAS * math.hypot(a[key][1], b[key][1], drift))
        line = f"{key[0]}, {key[1]}: {math.exp(change):.2f} of before, noise up to {math.exp(allowed):.2f}"
        if change > allowed:
            slower.append(line)
        elif change < -allowed:
            faster.append(line)
    return slower, faster


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    old, new = (json.loads(path.read_text()) for path in (options.old, options.new))
    if old["machine"] != new["machine"]:
        print(f"other machines: {old['machine']} and {new['machine']}; ratios may differ for that alone.")
    slower, faster = compare(old, new)
    print("\n".join([*(f"SLOWER  {line}" for line in slower), *(f"faster  {line}" for line in faster)]) or "no change")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
