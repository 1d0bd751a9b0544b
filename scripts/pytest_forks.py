"""Run pytest many times with torch imported once: each run is a fork of this process.

Started by scripts/mutants.py. Each line of the input is a JSON object with pytest's ``arguments``, the ``environment``
to add, the ``limit`` in seconds and the file for the ``output``; each line of the answer is the exit code, a negative
signal where the run crashed, or null where it had to be stopped. The package under test is imported by the fork.
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


def _child(request: dict) -> None:
    os.setsid()  # tests start processes of their own, which must be stopped with them
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(request["environment"])
    code = 3
    try:
        code = int(pytest.main(request["arguments"]))
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
