"""Plant faults one at a time, and see whether the tests that belong to them notice.

    python scripts/mutants.py                                # every fault of scripts/mutants/*.toml
    python scripts/mutants.py eigen kernels                  # the faults of these areas
    python scripts/mutants.py eigen --only krylov --jobs 2   # those whose file or note holds "krylov"
    python scripts/mutants.py --out docs/mutants.json        # keep the outcomes

Each area is a TOML file with a list of faults:

    [[mutant]]
    file = "sharpkern/eigen/krylov.py"
    old = "ends * k + 2"                # must stand in the file exactly once; give as much as makes it unique
    new = "ends * k + 1"
    tests = ["tests/test_eigen_krylov.py"]   # or with -k, as pytest takes it: "tests/test_x.py -k name"
    note = "a basis too short for a restart"
    equivalent = ""                     # why no test can notice, for a fault that changes nothing

A fault is killed when its tests fail, crash, or run out of time; it survives when they pass. The tests run in a copy of
the working tree, in the order given, and must pass there before any fault is planted. A fault in ``csrc/`` is compiled
into the copy, and one that does not compile is an error in the list, as is a text that is not found.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
LISTS = ROOT / "scripts" / "mutants"
GOAL = 0.95  # of the faults that are not equivalent
SEED = "20260"  # of every test: a fault that only some seeds notice must not change from run to run
_NOT_RUN = (3, 4, 5)  # exit codes of pytest: its own error, wrong arguments, no test found
OUTCOMES = ("killed", "survived", "equivalent", "error")


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One fault, see the page's head."""

    area: str
    file: str
    old: str
    new: str
    tests: list[str]
    note: str = ""
    equivalent: str = ""

    def planted(self, text: str) -> str:
        """Return the file's text with the fault.

        Raises:
            ValueError: the old text does not stand there exactly once, or nothing would change.
        """
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"the old text stands {count} times in {self.file}, not once: {self.old!r}")
        if self.old == self.new:
            raise ValueError(f"old and new text are the same in {self.file}: {self.old!r}")
        return text.replace(self.old, self.new)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one fault: one of OUTCOMES, the seconds it took, and the first test that noticed, or the error."""

    mutant: Mutant
    outcome: str
    seconds: float = 0.0
    detail: str = ""


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


class Copy:
    """A copy of the working tree, with its compiled module, in which faults are planted one after another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
        self.modules = [str(path.relative_to(ROOT)) for path in (ROOT / "sharpkern").glob("_C*.so")]
        for name in {*listed, *self.modules} - {""}:
            if (ROOT / name).is_file():  # a file deleted but not committed is listed, too
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)

    def run(self, arguments: list[str], limit: float) -> tuple[int | None, str]:
        """Run Python in the copy; return its exit code, None if it had to be stopped, and its output."""
        environment = {
            **os.environ, "PYTHONPATH": str(self.folder), "SHARPKERN_SEED": SEED, "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=self.folder, env=environment, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the session: tests start processes of their own
            process.communicate()
            return None, f"stopped after {limit:.0f} s"
        return process.returncode, output

    def test(self, test: str, limit: float) -> tuple[int | None, str]:
        """Run one entry of ``tests``; return as ``run``, the output cut to the first failure."""
        code, output = self.run(["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(test)], limit)
        failures = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR", "Fatal", "stopped"))]
        return code, failures[0] if failures else output[-400:].strip()

    def try_fault(self, mutant: Mutant, limits: dict[str, float]) -> Outcome:
        """Plant a fault, run its tests until one notices, and take the fault out again."""
        start, path = time.monotonic(), self.folder / mutant.file
        text = path.read_text()
        compiled = mutant.file.startswith("csrc/") and not mutant.file.startswith("csrc/cuda/")
        try:
            planted = mutant.planted(text)
            if path.suffix == ".py":
                compile(planted, mutant.file, "exec")  # a fault that is no Python would be noticed by anything
            path.write_text(planted)
            if compiled:
                self._build()
            outcome, detail = self._noticed(mutant, limits)
        except (ValueError, SyntaxError, OSError) as error:
            outcome, detail = "error", str(error)
        finally:
            path.write_text(text)
            if compiled:
                for name in self.modules:
                    shutil.copy2(ROOT / name, self.folder / name)
        return Outcome(mutant, outcome, time.monotonic() - start, detail)

    def _noticed(self, mutant: Mutant, limits: dict[str, float]) -> tuple[str, str]:
        for test in mutant.tests:
            code, detail = self.test(test, limits[test])
            if code in _NOT_RUN:
                return "error", f"{test} did not run: {detail}"
            if code != 0:
                return "killed", detail
        return ("equivalent", mutant.equivalent) if mutant.equivalent else ("survived", "")

    def _build(self) -> None:
        code, output = self.run(["setup.py", "build_ext", "--inplace"], 1800)
        if code != 0:
            raise ValueError(f"does not compile: {output[-400:]}")


def limits_of(copy: Copy, tests: set[str]) -> dict[str, float]:
    """Run the tests without a fault; return how long each entry may take with one.

    Raises:
        ValueError: one fails already, so that its failing later would say nothing.
    """
    limits = {}
    for test in sorted(tests):
        start = time.monotonic()
        code, detail = copy.test(test, 1800)
        if code != 0:
            raise ValueError(f"{test} fails without any fault: {detail}")
        limits[test] = 30 + 4 * (time.monotonic() - start)
    return limits


def tried(mutants: list[Mutant], jobs: int) -> list[Outcome]:
    """Try all faults, each job in a copy of its own, and print each outcome as it comes."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for i in range(jobs):
            copies.put(Copy(Path(folder) / str(i)))
        limits = limits_of(first := copies.get(), {test for mutant in mutants for test in mutant.tests})
        copies.put(first)

        def one(mutant: Mutant) -> Outcome:
            copy = copies.get()
            try:
                outcome = copy.try_fault(mutant, limits)
            finally:
                copies.put(copy)
            print(f"{outcome.outcome:10} {outcome.seconds:5.0f} s  {mutant.file}: {mutant.note}", flush=True)
            return outcome

        return list(pool.map(one, mutants))


def report(outcomes: list[Outcome], out: Path | None) -> bool:
    """Print the table and what survived; write the JSON; say whether enough was killed and nothing was in error."""
    areas: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for outcome in outcomes:
        areas[outcome.mutant.area][outcome.outcome] += 1
    total = sum(areas.values(), collections.Counter())
    print(f"\n| area | planted | {' | '.join(OUTCOMES)} | killed, of those that are not equivalent |")
    print("|---|---|---|---|---|---|---|")
    for area, counts in [*sorted(areas.items()), ("all", total)]:
        row = [area, str(counts.total()), *(str(counts[name]) for name in OUTCOMES), f"{_share(counts):.1%}"]
        print(f"| {' | '.join(row)} |")
    for outcome in outcomes:
        if outcome.outcome != "killed":
            print(f"\n{outcome.outcome}: {outcome.mutant.file}: {outcome.mutant.note}\n  {outcome.detail}")
    if out is not None:
        rows = [
            {"area": o.mutant.area, "file": o.mutant.file, "note": o.mutant.note, "outcome": o.outcome,
             "detail": o.detail, "seconds": round(o.seconds, 1)}
            for o in outcomes
        ]  # fmt: skip
        out.write_text(json.dumps(rows, indent=1) + "\n")
    return not total["error"] and _share(total) >= GOAL


def _share(counts: collections.Counter[str]) -> float:
    return counts["killed"] / max(counts["killed"] + counts["survived"], 1)


def main() -> int:
    """Parse the arguments and run; 0 if at least GOAL of the faults were killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("areas", nargs="*", metavar="AREA", help="names of lists in scripts/mutants; none for all")
    parser.add_argument("--only", default="", help="faults whose file or note holds this")
    parser.add_argument("--jobs", type=int, default=1, help="how many faults to try at a time")
    parser.add_argument("--out", type=Path, help="write the outcomes to this JSON file")
    given = parser.parse_args()
    try:
        mutants = [m for m in read(given.areas) if given.only in m.file or given.only in m.note]
        if not mutants:
            raise ValueError(f"no fault's file or note holds {given.only!r}.")
        outcomes = tried(mutants, given.jobs)
    except (ValueError, OSError) as error:  # tomllib's own error is a ValueError
        parser.error(str(error))
    return 0 if report(outcomes, given.out) else 1


if __name__ == "__main__":
    sys.exit(main())
