"""``triton_pointwise`` in the interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch

from sharpkern.kernels import reference
from sharpkern.kernels.triton import pointwise as triton_pointwise

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7,), (63,), (65, 3), (130, 17)])
@pytest.mark.parametrize("k", [1, 3])
def test_slope_product(device: str, k: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    slope, curvature = torch.randn(2, *shape).to(device, dtype)
    d, dz = torch.randn(2, k, *shape, 2).to(device, dtype)[..., 0]  # not contiguous
    eps = torch.finfo(dtype).eps
    for rest in ((), (curvature, dz)):
        got = triton_pointwise.slope_product(slope, d, *rest)
        want = reference.slope_product(slope.double(), d.double(), *(t.double() for t in rest))
        assert got.dtype == dtype
        assert got.is_contiguous()
        torch.testing.assert_close(got.double(), want, rtol=2 * eps, atol=8 * eps)
