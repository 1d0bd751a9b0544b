"""Run a function on several processes: ``on_ranks(case, world, seed)`` in a test, this file as the launcher.

One interpreter imports everything and forks the ranks, which saves their imports. Each rank writes what its case
returns, or the error that it ended with; a rank that is still alive at the deadline is killed and reported as such.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

_DEADLINE = 150.0  # seconds for the ranks, imports apart


def on_ranks(case: Callable[[int, int], Any], world: int, seed: int, backend: str = "gloo") -> list[dict[str, Any]]:
    """Call ``case(rank, world)`` on every rank; return for each {"result": ...}, {"error": ..., "seconds"} or {}."""
    root = Path(__file__).parent.parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{root / 'tests'}"}
    env.pop("SHARPKERN_BACKEND", None)
    env["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking whether there is a GPU must not start CUDA before the fork
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, case.__module__, case.__name__, str(world), str(seed), folder, backend]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_DEADLINE + 150, check=False)
        files = [Path(folder) / f"{rank}.json" for rank in range(world)]
        told = [json.loads(f.read_text()) if f.exists() else {} for f in files]
    if not all("result" in t for t in told):
        print(done.stdout[-2000:], done.stderr[-6000:])
    return told


def results(case: Callable[[int, int], Any], world: int, seed: int, backend: str = "gloo") -> list[Any]:
    """Return what the case returned on each rank; fail with the error of one that did not."""
    told = on_ranks(case, world, seed, backend)
    bad = [t for t in told if "result" not in t]
    assert not bad, bad
    return [t["result"] for t in told]


def _rank(case: Callable[[int, int], Any], rank: int, world: int, seed: int, folder: str, backend: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(seed)  # the same on all: models and global batches are equal
    started = time.monotonic()
    try:
        limit = timedelta(seconds=_DEADLINE)
        dist.init_process_group(
            backend, init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=limit
        )
        told: dict[str, Any] = {"result": case(rank, world)}
    except BaseException as error:
        import traceback

        traceback.print_exc()
        told = {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - started}
    Path(folder, f"{rank}.part").write_text(json.dumps(told))
    Path(folder, f"{rank}.part").rename(Path(folder, f"{rank}.json"))


def _main(module: str, function: str, world: int, seed: int, folder: str, backend: str) -> None:
    case = getattr(importlib.import_module(module), function)
    alive = set()
    for rank in range(world):
        pid = os.fork()
        if not pid:
            _rank(case, rank, world, seed, folder, backend)
            sys.stderr.flush()
            os._exit(0)  # connections close with the process, as those of one that has ended do
        alive.add(pid)
    deadline = time.monotonic() + _DEADLINE
    while alive and time.monotonic() < deadline:
        alive -= {pid for pid in alive if os.waitpid(pid, os.WNOHANG)[0]}
        time.sleep(0.05)
    for pid in alive:
        os.kill(pid, 9)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
