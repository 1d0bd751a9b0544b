"""Every kernel that Triton has, at sizes of zero and one, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from kernel_shapes import check, registered

from sharpkern.kernels import dispatch


@pytest.mark.parametrize("kernel", [name for name in registered() if "triton" in dispatch._versions[name]])
def test_sizes_of_zero_and_one(device: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device != "cpu":
        pytest.skip("the cases are on the CPU")
    monkeypatch.setenv("SHARPKERN_BACKEND", "triton")
    assert check(kernel, torch.float32, few=True) >= 3
