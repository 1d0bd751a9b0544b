"""How long from a fresh Python to the first product? ``python -m questions.first WORKLOAD PEER THREADS`` answers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STAGES = ("import", "prepare", "first product", "second product")


def ask(workload: str, names: list[str], rounds: int) -> dict[str, Any]:
    """One fresh process a contender and round."""
    import torch

    stages: dict[str, dict[str, float]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for name in names:
            done = subprocess.run(
                [sys.executable, "-m", "questions.first", workload, name, str(torch.get_num_threads())],
                cwd=Path(__file__).parents[1], capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:
                failed[name] = done.stderr.strip().splitlines()[-1]
            else:
                stage = json.loads(done.stdout.splitlines()[-1])
                total = sum(stage[s] for s in STAGES[:-1])
                if total < min(seconds[name], default=float("inf")):
                    stages[name] = stage
                seconds[name].append(total)
    return {
        "question": "first", "workload": workload, "base": "autograd, graph kept", "stages": stages,
        "seconds": {name: s for name, s in seconds.items() if name not in failed}, "errors": {}, "failed": failed,
    }  # fmt: skip


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
