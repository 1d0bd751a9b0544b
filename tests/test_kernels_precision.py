"""TF32 for a while: torch's settings inside the block, and what they were after it."""

from __future__ import annotations

import pytest
import torch

from sharpkern.kernels.precision import allows_tf32, tf32_products, within_tf32_products


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
