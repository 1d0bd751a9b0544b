"""Plant faults one at a time, and see whether the tests that belong to them notice.

    python scripts/mutants.py                                # every fault of scripts/mutants/*.toml
    python scripts/mutants.py eigen kernels                  # the faults of these areas
    python scripts/mutants.py eigen --only krylov --jobs 2   # those whose file or note holds "krylov"
    python scripts/mutants.py warm --out mutants.json        # keep the outcomes; the table is of all that stand there
    python scripts/mutants.py --out mutants.json --left      # go on where a run was stopped, and try survivors again

Each area is a TOML file with a list of faults:

    [[mutant]]
    file = "sharpkern/eigen/krylov.py"
    old = "ends * k + 2"                # must stand in the file exactly once; give as much as makes it unique
    new = "ends * k + 1"
    tests = ["tests/test_eigen_krylov.py"]   # or with -k, as pytest takes it: "tests/test_x.py -k name"
    note = "a basis too short for a restart"
    equivalent = ""                     # why no test can notice, for a fault that changes nothing

A fault is killed when its tests fail or crash with each of three seeds; one that only some seeds notice survives. It is
stopped, and counts as killed, when a test runs out of time. The tests run in a copy of the working tree, in the order
given, and must pass there before a fault is planted. A fault in ``csrc/`` is compiled into the copy, for this machine's
instruction level only and with -O1. One that does not compile is an error in the list, as is a text that is not found.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import queue
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from mutant_trials import ROOT, Copy, Mutant, Outcome

LISTS = ROOT / "scripts" / "mutants"
GOAL = 0.95  # of the faults that are not equivalent
OUTCOMES = ("killed", "stopped", "survived", "equivalent", "error")


def read(areas: list[str]) -> list[Mutant]:
    """Read the lists of these areas; of all, if none is named.

    Raises:
        ValueError: a list has an unknown or a missing key, or a test file that is not there.
    """
    paths = [LISTS / f"{area}.toml" for area in areas] or sorted(LISTS.glob("*.toml"))
    return [_mutant(path.stem, entry) for path in paths for entry in tomllib.loads(path.read_text())["mutant"]]


def _mutant(area: str, entry: dict[str, Any]) -> Mutant:
    try:
        mutant = Mutant(area=area, **entry)
    except TypeError as error:
        raise ValueError(f"{area}.toml: an entry has other keys than it should, {error}: {entry}") from None
    missing = [test for test in mutant.tests if not (ROOT / test.split()[0].split("::")[0]).exists()]
    if missing or not mutant.tests:
        raise ValueError(f"{area}.toml: {mutant.note or mutant.old!r} has no test files, or none at {missing}.")
    return mutant


def tried(mutants: list[Mutant], jobs: int) -> Iterator[Outcome]:
    """Try all faults, each job in a copy of its own; give each outcome as it comes."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for i in range(jobs):
            (Path(folder) / str(i)).mkdir()
            copies.put(Copy(Path(folder) / str(i), compiled=any(mutant.compiled for mutant in mutants)))

        def one(mutant: Mutant) -> Outcome:
            copy = copies.get()
            try:
                return copy.try_fault(mutant)
            finally:
                copies.put(copy)

        for done in concurrent.futures.as_completed([pool.submit(one, mutant) for mutant in mutants]):
            yield done.result()
        for _ in range(jobs):
            copies.get().close()


def rows_of(outcomes: list[Outcome], out: Path | None) -> list[dict[str, Any]]:
    """Return the outcomes as rows, and with ``out`` those that stand there from earlier runs, in the lists' order."""
    listed = {_key(mutant): mutant for mutant in read([])}
    rows = {} if out is None or not out.exists() else {_key(row): row for row in json.loads(out.read_text())}
    for o in outcomes:
        m = o.mutant
        rows[_key(m)] = {
            "folder": str(Path(m.file).parent), "file": m.file, "note": m.note, "old": m.old, "new": m.new,
            "outcome": o.outcome, "detail": o.detail,
        }  # fmt: skip
    kept = [rows[key] for key in listed if key in rows]
    if out is not None:
        out.write_text(json.dumps(kept, indent=1) + "\n")
    return kept


def _key(fault: Mutant | dict[str, Any]) -> tuple[str, str, str]:
    if isinstance(fault, Mutant):
        return fault.file, fault.old, fault.new
    return fault["file"], fault["old"], fault["new"]


def report(rows: list[dict[str, Any]]) -> bool:
    """Print the table and what was not killed; say whether enough was killed and nothing was in error."""
    folders: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row in rows:
        folders[row["folder"]][row["outcome"]] += 1
    total = sum(folders.values(), collections.Counter())
    print(f"\n| folder | planted | {' | '.join(OUTCOMES)} | killed, of those that are not equivalent |")
    print("|---|---|---|---|---|---|---|---|")
    for folder, counts in [*sorted(folders.items()), ("all", total)]:
        cells = [folder, str(counts.total()), *(str(counts[name]) for name in OUTCOMES), f"{_share(counts):.1%}"]
        print(f"| {' | '.join(cells)} |")
    for row in rows:
        if row["outcome"] != "killed":
            print(f"\n{row['outcome']}: {row['file']}: {row['note']}\n  {row['detail']}")
    return not total["error"] and _share(total) >= GOAL


def _share(counts: collections.Counter[str]) -> float:
    killed = counts["killed"] + counts["stopped"]
    return killed / max(killed + counts["survived"], 1)


def main() -> int:
    """Parse the arguments and run; 0 if at least GOAL of the faults were killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("areas", nargs="*", metavar="AREA", help="names of lists in scripts/mutants; none for all")
    parser.add_argument("--only", default="", help="faults whose file or note holds this")
    parser.add_argument("--jobs", type=int, default=1, help="how many faults to try at a time")
    parser.add_argument("--out", type=Path, help="keep the outcomes in this JSON file, besides those of earlier runs")
    parser.add_argument("--left", action="store_true", help="only those that --out does not hold as killed already")
    given = parser.parse_args()
    try:
        mutants = [m for m in read(given.areas) if given.only in m.file or given.only in m.note]
        if given.left:
            done = {
                _key(row) for row in rows_of([], given.out) if row["outcome"] in ("killed", "stopped", "equivalent")
            }
            mutants = [m for m in mutants if _key(m) not in done]
        if not mutants:
            raise ValueError(f"no fault's file or note holds {given.only!r}.")
        outcomes = []
        for outcome in tried(mutants, given.jobs):
            print(
                f"{outcome.outcome:10} {outcome.seconds:5.0f} s  {outcome.mutant.file}: {outcome.mutant.note}",
                flush=True,
            )
            outcomes.append(outcome)
            rows = rows_of(outcomes, given.out)
    except (ValueError, OSError) as error:  # tomllib's own error is a ValueError
        parser.error(str(error))
    return 0 if report(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
