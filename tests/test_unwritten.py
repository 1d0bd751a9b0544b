"""The fixture itself: what is not written holds NaN, also in a recording's pool and between its replays."""

from __future__ import annotations

import pytest
import torch
from problems import PROBLEMS, cast

import sharpkern as sk
from sharpkern import kernels
from sharpkern.kernels.cpu import native
from sharpkern.rop.recording import tape
from sharpkern.rop.recording.pool import Pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_new_memory_is_nan(dtype: torch.dtype) -> None:
    like = torch.ones(3, 5, dtype=dtype)
    made = [torch.empty(4, dtype=dtype), torch.empty_like(like), like.new_empty(2, 2), Pool().empty(7, dtype)]
    made += [torch.empty_strided((2, 3), (3, 1), dtype=dtype)]
    assert all(bool(t.isnan().all()) for t in made)


def test_block_that_is_free_again_is_nan() -> None:
    pool = Pool()
    t = pool.empty(100, torch.float32).fill_(1.0)
    alias = pool.alias(t)
    del t
    pool.empty(8, torch.float32)
    assert bool(alias[32:].isnan().all())


@pytest.mark.skipif(native.REASON is not None, reason=str(native.REASON))
def test_kernel_that_leaves_a_result_unwritten_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARPKERN_BACKEND", "cpu")
    monkeypatch.setattr(native, "_function", lambda kernel, dtype: lambda *arguments: None)
    V = torch.randn(2, 5)
    assert bool(kernels.gram(V, V).isnan().all())
    assert all(bool(t.isnan().all()) for t in kernels.power_step(V, V))


@pytest.mark.parametrize("large", [0, 1 << 40], ids=["used in place", "copied"])
def test_replay_that_leaves_out_a_call_is_seen(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever it is: what it should have written is NaN, or what another call has left."""
    monkeypatch.setattr(tape, "_LARGE", large)
    H = sk.HessianOperator(*cast(PROBLEMS["mlp"](), torch.float32))
    v = torch.randn(H.n)
    want = H @ v
    recording = H.engine._recordings["hvp", 1]
    calls, noticed = recording._calls, 0
    for i in range(len(calls)):
        recording._calls = calls[:i] + calls[i + 1 :]
        noticed += not torch.equal(H @ v, want)
        recording._calls = calls
        assert torch.equal(H @ v, want)
    assert noticed == len(calls)
