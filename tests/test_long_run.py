"""The short form of scripts/long_run.py: what comes and goes in a run leaves nothing behind."""

from __future__ import annotations

import gc
import linecache
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import sharpkern as sk
from sharpkern.curvature import engines
from sharpkern.rop import ReplayedProgram

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, with more engines dropped in fewer steps."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import long_run

    monkeypatch.setattr(engines, "_MOST_ENGINES", 4)
    monkeypatch.setattr(long_run, "_OTHER_EVERY", 40)
    monkeypatch.setattr(long_run, "_BLOCKS_EVERY", 75)
    return long_run


def test_three_hundred_steps_leave_no_engine_recording_or_tensor_behind(script: Any, seed: int) -> None:
    gc.collect()
    before = script.tensors_alive()
    run, alive = script.Run(seed), weakref.WeakSet[Any]()
    rows = []
    for row in script.rows_of(run, 300):
        rows.append(row)
        alive.update(run.tracker.hessian._engines)
    assert sorted(row.error for row in rows)[len(rows) // 2] <= script.TOL
    gc.collect()
    kept = list(run.tracker.hessian._engines)
    assert rows[-1].made >= 10 and len(kept) == 4
    assert len(alive) == 4
    assert all(len(engine._recordings) <= 8 for engine in kept)
    assert max(len(engine._recordings) for engine in kept) == 8
    counts = run.tracker.hessian._engines
    assert {*counts._uses, *counts._noise} <= {id(engine) for engine in kept}
    # How many tensors an engine holds depends on its recordings. Without the engines, those of model, data, optimizer
    # and solvers are left, where one more at each step would be 300.
    assert rows[-1].objects >= before + 4 * 100
    del kept, counts
    run.tracker.hessian = None
    gc.collect()
    assert len(alive) == 0
    assert script.tensors_alive() <= before + 100


def test_what_has_grown_is_named(script: Any) -> None:
    def rows(memory: list[float], seconds: list[float], errors: list[float]) -> list[Any]:
        columns = enumerate(zip(memory, seconds, errors, strict=True), 1)
        return [script.Row(1000 * i, m, 900, t, 15.0, 8, 8 * i, e) for i, (m, t, e) in columns]

    flat = [100.0] * 20
    assert script.faults(rows(flat, flat, [0.001] * 20)) == []
    # Until a tenth of the run memory may grow: programs are made for the first time.
    assert script.faults(rows([50.0, *flat[1:]], flat, [0.001] * 20)) == []
    (found,) = script.faults(rows([*flat[:12], 102.1, *flat[13:]], flat, [0.001] * 20))
    assert found == "memory grew from 100.0 MiB at step 2000 to 102.1 MiB."
    (found,) = script.faults(rows(flat, [*flat[:15], *[110.1] * 5], [0.001] * 20))
    assert "110.10 ms in the last quarter, 100.00 ms in the first" in found
    (found,) = script.faults(rows(flat, flat, [*[0.001] * 19, 0.0111]))
    assert "1.1e-02 in the last quarter, 1.0e-03 in the first" in found


def test_an_export_leaves_no_source_texts_behind() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    kept = fx.graph_module._loader.eval_cache

    def texts() -> tuple[int, int]:
        return len(kept), sum("eval_with_key" in name for name in linecache.cache)

    before = texts()
    for rows in (5, 6):
        H = sk.HessianOperator(model, F.cross_entropy, (torch.randn(rows, 3), torch.zeros(rows, dtype=torch.long)))
        assert isinstance(H.engine, ReplayedProgram)
    assert texts() == before
    fx.symbolic_trace(model)  # others' stay
    assert texts() > before
