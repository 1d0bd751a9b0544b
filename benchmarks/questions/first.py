"""How long from a fresh Python to the first product? ``python -m questions.first WORKLOAD PEER THREADS`` answers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STAGES = ("import", "prepare", "first product", "second product")


def ask(workload: str, names: list[str]) -> dict[str, Any]:
    """One fresh process a contender."""
    import torch

    stages = {}
    for name in names:
        done = subprocess.run(
            [sys.executable, "-m", "questions.first", workload, name, str(torch.get_num_threads())],
            cwd=Path(__file__).parents[1], capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode == 0:
            stages[name] = json.loads(done.stdout.splitlines()[-1])
    return {"question": "first", "workload": workload, "stages": stages}


def main(workload: str, name: str, threads: int) -> None:
    """Print the seconds of every stage."""
    seconds = []
    start = time.perf_counter()
    import torch
    from peers import load

    torch.set_num_threads(threads)
    cls = load([name])[0][name]
    seconds.append(time.perf_counter() - start)
    from workloads import WORKLOADS

    torch.manual_seed(0)
    work = WORKLOADS[workload]()
    V = torch.randn(sum(p.numel() for p in work.model.parameters()), 1)
    start = time.perf_counter()
    peer = cls(work)
    peer.prepare()
    vectors = peer.native(V)
    seconds.append(time.perf_counter() - start)
    for _ in range(2):
        start = time.perf_counter()
        peer.multiply(vectors)
        seconds.append(time.perf_counter() - start)
    peer.close()
    print(json.dumps(dict(zip(STAGES, seconds, strict=True))))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
