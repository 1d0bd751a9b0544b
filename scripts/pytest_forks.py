"""Run pytest many times with torch imported once: each run is a fork of this process.

Started by scripts/mutants.py. Each line of the input is a JSON object with pytest's ``arguments``, the ``seeds`` of the
tests, the ``limit`` in seconds and the file for the ``output``. The tests run with the first seed, up to the first that
fails, and that one again with each of the others. Each line of the answer is the exit code of the first run, UNSURE
where the test that failed passes with another seed, a negative signal where the run crashed, or null where it had to be
stopped. The package under test is imported by the fork.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time

import hypothesis  # noqa: F401
import pytest
import torch._dynamo
import torch.export  # noqa: F401 - the imports are the point
from mutant_trials import UNSURE

_OPTIONS = ["-x", "-q", "-p", "no:cacheprovider"]


class _FirstFailure:
    """A plugin that notes which test failed first."""

    def __init__(self) -> None:
        self.test: str | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the test of a report."""
        if report.failed and self.test is None:
            self.test = report.nodeid


def _run(arguments: list[str], seeds: list[str]) -> int:
    os.environ["SHARPKERN_SEED"] = seeds[0]
    code = int(pytest.main([*_OPTIONS, *arguments], plugins=[failure := _FirstFailure()]))
    if code != 1 or failure.test is None:
        return code
    for seed in seeds[1:]:
        os.environ["SHARPKERN_SEED"] = seed
        if int(pytest.main([*_OPTIONS, failure.test])) == 0:
            return UNSURE
    return code


def _child(request: dict) -> None:
    os.setsid()  # tests start processes of their own, which must be stopped with them
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 3
    try:
        code = _run(request["arguments"], request["seeds"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, limit: float) -> int | None:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main() -> None:
    """Serve requests until the input ends."""
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "-q", "-c", os.devnull, __file__])  # imports what pytest needs
    for line in sys.stdin:
        request = json.loads(line)
        if (child := os.fork()) == 0:
            _child(request)
        print(json.dumps(_wait(child, request["limit"])), flush=True)


if __name__ == "__main__":
    main()
