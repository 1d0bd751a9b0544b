"""The example under torchrun: DDP and fully_shard print what one process with all of the data prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sharpkern as sk

ROOT = Path(__file__).parent.parent


def printed(*options: str) -> list[float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += [str(ROOT / "examples" / "distributed.py"), *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(x) for x in re.findall(r"\d+\.\d+", done.stdout)]


def alone() -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tracker = sk.SharpnessTracker(model, nn.functional.cross_entropy, optimizer)
    generators = [torch.Generator().manual_seed(rank) for rank in range(2)]
    patterns = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    found = []
    for _ in range(20):
        parts = []
        for g in generators:
            y = torch.randint(0, 4, (32,), generator=g)
            parts.append((patterns[y] + torch.randn(32, 8, generator=g), y))
        batch = tuple(torch.cat(t) for t in zip(*parts, strict=True))
        record = tracker.step(batch)
        optimizer.step()
        found += [record.loss, record.sharpness]
    return [*found, sk.sharpness(model, nn.functional.cross_entropy, batch, tol=1e-4).value]


@pytest.mark.slow
def test_example_prints_what_one_process_finds() -> None:
    want = alone()
    for options in ([], ["--shard"]):
        got = printed(*options)
        assert len(got) == len(want) == 41
        assert got == pytest.approx(want, rel=0.01, abs=2e-3)  # the tracker's tol, and three printed decimals
