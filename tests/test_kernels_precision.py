"""TF32 for a while: torch's settings inside the block, and what they were after it. 16-bit floats in float32."""

from __future__ import annotations

import pytest
import torch

from sharpkern.kernels.precision import allows_tf32, tf32_products, wide, within_tf32_products


def settings() -> list[str]:
    return [torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision]


def fail_inside() -> None:
    with tf32_products():
        with tf32_products():
            pass
        assert settings() == ["tf32", "tf32"] and allows_tf32() and within_tf32_products()
        raise KeyError


@pytest.mark.parametrize("before", ["ieee", "tf32"])
def test_settings_hold_in_the_block_and_come_back(before: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = before
    try:
        outside = settings()
        with pytest.raises(KeyError):
            fail_inside()
        assert settings() == outside and not within_tf32_products() and allows_tf32() == (before == "tf32")
        with tf32_products(on=False):
            assert settings() == outside and not within_tf32_products()
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_only_16_bit_floats_are_widened(dtype: torch.dtype) -> None:
    t = torch.randn(5, dtype=torch.float64).to(dtype)
    wider = wide(t)
    assert torch.equal(wider.double(), t.double())
    assert wider.dtype == torch.float32 if dtype.itemsize == 2 else wider is t
