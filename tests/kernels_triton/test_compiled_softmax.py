"""``triton_softmax``, as it ships, compiles for each chip without spills."""

from __future__ import annotations

import pytest
import torch
from launches import check_launches
from offline import CHIPS

from sharpkern.kernels.triton import softmax as triton_softmax


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("C", "kernel"),
    [(10, "_held"), (128, "_held"), (1000, "_held"), (2048, "_held"), (4096, "_held"), (8192, "_held")]
    + [(2047, "_long"), (50257, "_long"), (262144, "_long")],
)  # fmt: skip
@pytest.mark.parametrize("chip", CHIPS)
def test_softmax(chip: int, C: int, kernel: str, dtype: torch.dtype) -> None:
    p, weight, u = (torch.empty(*shape, dtype=dtype, device="meta") for shape in ((4096, C), (4096,), (3, 4096, C)))
    calls = (
        lambda: triton_softmax.softmax_jacobian(p, u, weight),
        lambda: triton_softmax.softmax_jacobian(p, u[:1]),
        lambda: triton_softmax.softmax_backward_tangent(p, u, p, u),
        lambda: triton_softmax.softmax_backward_tangent(p, u[:1], p, u[:1]),
    )
    for call in calls:
        assert check_launches(chip, triton_softmax, "_held", "_long", call=call) == [kernel]
    logarithms = (
        lambda: triton_softmax.log_softmax_jacobian(p, u),
        lambda: triton_softmax.log_softmax_backward_tangent(p, u, weight, u),
        lambda: triton_softmax.log_softmax_backward_tangent(p, u[:1], weight, u[:1]),
    )
    for call in logarithms:
        assert check_launches(chip, triton_softmax, "_log_held", "_log_long", call=call) == [f"_log{kernel}"]
