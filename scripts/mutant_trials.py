"""A copy of the repository in which one fault after another is planted and tried; see scripts/mutants.py."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_SEEDS = ("20260", "1", "7")  # of the tests: a fault that only some seeds notice is not killed
UNSURE = 10  # exit code of pytest_forks.py for a test that fails with the first seed and passes with another
_NOT_RUN = (3, 4, 5)  # exit codes of pytest: its own error, wrong arguments, no test found


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One fault, see scripts/mutants.py."""

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

    @property
    def compiled(self) -> bool:
        """Whether the fault is in the compiled module."""
        return self.file.startswith("csrc/")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one fault: one of OUTCOMES, the seconds it took, and the first test that noticed, or the error."""

    mutant: Mutant
    outcome: str
    seconds: float = 0.0
    detail: str = ""


class Copy:
    """A copy of the working tree, with its compiled module.

    Args:
        folder: an empty one.
        compiled: faults in ``csrc/`` are to be tried too: the copy gets a compiled module of its own.
    """

    def __init__(self, folder: Path, *, compiled: bool) -> None:
        self.folder = folder
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
        modules = [] if compiled else [str(path.relative_to(ROOT)) for path in (ROOT / "sharpkern").glob("_C*.so")]
        for name in {*listed, *modules} - {""}:
            if (ROOT / name).is_file():  # a file deleted but not committed is listed, too
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        # Bytecode by the hash of its source, as two faults of one length may be planted within a second.
        command = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash", "sharpkern"]
        subprocess.run(command, cwd=folder, check=True)
        self._native = _Native(folder) if compiled else None
        self._limits: dict[str, float] = {}
        environment = {
            **os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }  # fmt: skip
        self._forks = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "pytest_forks.py")], cwd=folder, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def close(self) -> None:
        """End the process that runs the tests."""
        self._forks.communicate()

    def test(self, test: str, limit: float, *seeds: str) -> tuple[int | None, str]:
        """Run one entry of ``tests`` as pytest_forks.py does.

        Returns:
            The exit code, None where the run had to be stopped, and the first failure, or the end of the output.
        """
        output = self.folder / "output.txt"
        request = {
            "arguments": shlex.split(test), "seeds": seeds or _SEEDS, "limit": limit, "output": str(output),
        }  # fmt: skip
        assert self._forks.stdin is not None
        assert self._forks.stdout is not None
        self._forks.stdin.write(json.dumps(request) + "\n")
        self._forks.stdin.flush()
        code = json.loads(self._forks.stdout.readline())
        if code is None:
            return None, f"{test} stopped after {limit:.0f} s"
        text = output.read_text(errors="replace")
        failures = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR", "Fatal"))]
        return code, failures[0] if failures else text[-400:].strip()

    def _limit(self, test: str) -> float:
        """Return how long an entry of ``tests`` may take with a fault; at its first use, run it without one.

        Raises:
            ValueError: it fails already, so that its failing with a fault would say nothing.
        """
        if test not in self._limits:
            start = time.monotonic()
            code, detail = self.test(test, 1800, _SEEDS[0])
            if code != 0:
                raise ValueError(f"{test} does not pass without any fault: {detail}")
            self._limits[test] = 60 + 4 * (time.monotonic() - start)
        return self._limits[test]

    def try_fault(self, mutant: Mutant) -> Outcome:
        """Plant a fault, run its tests until one notices, and take the fault out again."""
        start, path = time.monotonic(), self.folder / mutant.file
        text = path.read_text()
        try:
            planted = mutant.planted(text)
            for test in mutant.tests:
                self._limit(test)
            if path.suffix == ".py":
                compile(planted, mutant.file, "exec")  # a fault that is no Python would be noticed by anything
            path.write_text(planted)
            if mutant.compiled:
                assert self._native is not None
                self._native.build(path)
            outcome, detail = self._noticed(mutant)
        except (ValueError, SyntaxError, OSError) as error:
            outcome, detail = "error", str(error)
        finally:
            path.write_text(text)
            if mutant.compiled and self._native is not None:
                self._native.put_back()
        return Outcome(mutant, outcome, time.monotonic() - start, detail)

    def _noticed(self, mutant: Mutant) -> tuple[str, str]:
        outcome, detail = self._run_all(mutant)
        if outcome == "survived" and mutant.equivalent:
            return "equivalent", mutant.equivalent
        if outcome != "unsure":
            return outcome, detail
        # With another seed another test may notice.
        for seed in _SEEDS:
            again, other = self._run_all(mutant, seed)
            if again != "killed":
                return again, other or f"with seed {seed}, unlike: {detail}"
        return "killed", detail

    def _run_all(self, mutant: Mutant, *seeds: str) -> tuple[str, str]:
        """Run a fault's tests until one notices."""
        for test in mutant.tests:
            code, detail = self.test(test, self._limit(test), *seeds)
            if code in _NOT_RUN:
                return "error", f"{test} did not run: {detail}"
            if code is None:
                return "stopped", detail
            if code != 0:
                return "unsure" if code == UNSURE else "killed", detail
        return "survived", ""


class _Native:
    """The compiled module of a copy: one instruction level, that of this machine, with little optimisation.

    A fault in the source is the same fault in each level. So only the files that hold it are compiled again.
    """

    _FLAGS = ("-std=c++17", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-march=native", "-DLEVEL=any")

    def __init__(self, folder: Path) -> None:
        import sysconfig

        import pybind11

        self._csrc = folder / "csrc"
        self._includes = ["-I", str(self._csrc), "-I", pybind11.get_include(), "-I", sysconfig.get_paths()["include"]]
        self._objects, self._faulty = folder / "build" / "objects", folder / "build" / "faulty"
        self._objects.mkdir(parents=True)
        self._faulty.mkdir()
        self._module = folder / "sharpkern" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        self._whole = folder / "build" / "whole.so"
        self._sources = [*sorted((self._csrc / "cpu").glob("*.cpp")), self._csrc / "bindings.cpp"]
        self._link([self._compile(source, self._objects) for source in self._sources])
        shutil.copy2(self._module, self._whole)

    def build(self, changed: Path) -> None:
        """Build the module with a file that has changed.

        Raises:
            ValueError: it does not compile, or no source includes it.
        """
        again = [source for source in self._sources if changed in self._read_by(source)]
        if not again:
            raise ValueError(f"no source of the CPU module includes {changed.name}.")
        self._link(
            [self._compile(s, self._faulty) if s in again else self._objects / f"{s.stem}.o" for s in self._sources]
        )

    def put_back(self) -> None:
        """Put the module without a fault back."""
        self._replace(self._whole)

    def _read_by(self, source: Path) -> set[Path]:
        found, waiting = set[Path](), [source]
        while waiting:
            if (path := waiting.pop()) not in found and path.exists():
                found.add(path)
                waiting += [self._csrc / name for name in re.findall(r'#include "(.+?)"', path.read_text())]
        return found

    def _compile(self, source: Path, into: Path) -> Path:
        target = into / f"{source.stem}.o"
        self._run([*self._FLAGS, *self._includes, "-c", str(source), "-o", str(target)])
        return target

    def _link(self, objects: list[Path]) -> None:
        linked = self._faulty / "linked.so"
        self._run(["-shared", "-fopenmp", *map(str, objects), "-o", str(linked)])
        self._replace(linked)

    def _replace(self, module: Path) -> None:
        # A new file: a process may still have the old one in its memory.
        self._module.unlink(missing_ok=True)
        shutil.copy2(module, self._module)

    @staticmethod
    def _run(arguments: list[str]) -> None:
        done: Any = subprocess.run([os.environ.get("CXX", "g++"), *arguments], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"does not compile: {done.stderr[-400:]}")
