"""``triton_attention``, as it ships, compiles for each chip without spills."""

from __future__ import annotations

from typing import Any

import pytest
from offline import CHIPS, check

from sharpkern.kernels.triton import attention as triton_attention
from sharpkern.kernels.triton import attention_kernels as kernels

FLOAT32 = {"lse", "m", "D", "dD", "mask"}
INTEGERS = {"tangents", "B", "T", "S", "mb", "mt", "ms"}
PRECISIONS = {"ieee": "fp32", "tf32": "fp32", "16-bit": "bf16"}  # to the type of the operands
KERNELS = ("forward", "tangent", "by_queries", "by_keys", "by_values")


def compiles(chip: int, name: str, precision: str, width: int, flags: dict[str, bool], **fixed: Any) -> None:
    kernel = getattr(kernels, name)
    constants = flags | fixed | triton_attention.shape(name, width, width, precision)
    signature = dict.fromkeys(kernel.arg_names, f"*{PRECISIONS[precision]}") | dict.fromkeys(FLOAT32, "*fp32")
    signature |= dict.fromkeys(INTEGERS, "i32") | {"scale": "fp32"}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    check(chip, kernel, signature, constants, **triton_attention.OPTIONS)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("chip", CHIPS)
def test_widest_head_with_everything_moving(chip: int, name: str, precision: str) -> None:
    compiles(chip, name, precision, 128, dict.fromkeys(("DQ", "DK", "DV", "MASKED", "CAUSAL"), True))


@pytest.mark.parametrize("precision", ["ieee", "16-bit"])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("chip", CHIPS)
def test_odd_head_with_nothing_more_than_needed(chip: int, name: str, precision: str) -> None:
    # a length, a count or a stride of 1 is a constant to Triton
    flags = dict.fromkeys(("DQ", "DK", "DV", "MASKED", "CAUSAL"), False) | {"DV": name == "tangent"}
    compiles(chip, name, precision, 20, flags, tangents=1, B=1, T=1, S=1, ms=1)


@pytest.mark.parametrize("chip", CHIPS)
def test_row_sums(chip: int) -> None:
    signature = dict.fromkeys("abcd", "*bf16") | {"out": "*fp32", "tangents": "i32", "rows": "i32"}
    check(chip, kernels.row_sums, signature, {"PAIRS": 2, "W": 128, "M": triton_attention.ROWS})
