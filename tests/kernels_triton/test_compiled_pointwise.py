"""``triton_pointwise``, as it ships, compiles for each chip without spills."""

from __future__ import annotations

import pytest
from offline import CHIPS, check

from sharpkern.kernels.triton import pointwise as triton_pointwise


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("curved", [False, True])
@pytest.mark.parametrize("chip", CHIPS)
def test_slope_product(chip: int, curved: bool, dtype: str) -> None:
    signature = dict.fromkeys(("slope", "d", "curvature", "dz", "out"), f"*{dtype}") | {"k": "i32", "n": "i32"}
    check(
        chip, triton_pointwise._slope_product, signature, {"CURVED": curved, "BLOCK": triton_pointwise.BLOCK},
    )  # fmt: skip
