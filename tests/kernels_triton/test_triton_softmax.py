"""``triton_softmax`` in the interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sharpkern.kernels import reference
from sharpkern.kernels.triton import softmax as triton_softmax

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def close(got: Tensor, want: Tensor, size: float, dtype: torch.dtype) -> None:
    """Equal to the rounding of the result and of float32 sums, of terms of a given size."""
    assert got.dtype == dtype
    assert got.is_contiguous()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=2 * eps, atol=8 * eps * size)


def check(device: str, rows: int, C: int, k: int, dtype: torch.dtype) -> None:
    """Each kernel, with and without weight, on operands that are not contiguous where they need not be."""
    p = torch.randn(rows, C, dtype=torch.float64).softmax(1).to(device, dtype)
    size = float(p.max())
    u, dg = torch.randn(2, k, C, rows).to(device, dtype).mT
    dp = (torch.randn(k, C, rows).to(device, dtype) * p.mT).mT
    inner = torch.randn(C, rows).to(device, dtype).mT
    weight = torch.rand(rows, 2).to(device, dtype)[:, 0]
    for rest in ((), (weight,)):
        out, mean = triton_softmax.softmax_jacobian(p, u, *rest)
        want_out, want_mean = reference.softmax_jacobian(p.double(), u.double(), *(t.double() for t in rest))
        close(out, want_out, size, dtype)
        close(mean, want_mean, 1, dtype)
    got = triton_softmax.softmax_backward_tangent(p, dp, inner, dg)
    want = reference.softmax_backward_tangent(p.double(), dp.double(), inner.double(), dg.double())
    close(got, want, size, dtype)
    dl = triton_softmax.log_softmax_jacobian(p, u)
    close(dl, reference.log_softmax_jacobian(p.double(), u.double()), float(u.abs().max()), dtype)
    got = triton_softmax.log_softmax_backward_tangent(p, u, weight, dg)
    want = reference.log_softmax_backward_tangent(p.double(), u.double(), weight.double(), dg.double())
    # terms of the size of dg, and p times a sum of all of them
    close(got, want, float(dg.abs().max()) + size * float(dg.double().abs().sum(-1).max()), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 63), (63, 7), (65, 130), (130, 65), (3, 1024)])
@pytest.mark.parametrize("k", [1, 3])
def test_rows_held(device: str, k: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(device, *shape, k, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [65, 128, 130])
def test_long_rows(device: str, C: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_softmax, "HELD", {"aligned": 64, "ragged": 64})
    monkeypatch.setattr(triton_softmax, "LONG_BLOCK", 64)
    check(device, 3, C, 2, dtype)


def test_a_vocabulary(device: str) -> None:
    """As many classes as the largest vocabularies have, with the blocks that ship."""
    check(device, 1, 262144, 1, torch.float32)


def test_no_rows(device: str) -> None:
    p = torch.ones(0, 5, device=device)
    out, mean = triton_softmax.softmax_jacobian(p, p.expand(2, 0, 5))
    assert (out.shape, mean.shape) == ((2, 0, 5), (2, 0))
