"""``triton_norm``, as it ships, compiles for each chip without spills."""

from __future__ import annotations

import pytest
import torch
from launches import check_launches
from offline import CHIPS

from sharpkern.kernels.saved import CENTRED, Standardised
from sharpkern.kernels.triton import norm as triton_norm
from sharpkern.kernels.triton import norm_kernels

KERNELS = ("tangent", "row_sums", "backward_tangent")
# rows, D, groups, inner
LAYOUTS = {
    "layer, short": (4096, 64, 1, 1),
    "layer, ragged": (4096, 999, 1, 1),
    "layer, backward's longest": (4096, 4096, 1, 1),
    "layer, tangent's longest": (4096, 8192, 1, 1),
    "layer, long and ragged": (512, 50257, 1, 1),
    "group": (2048, 8 * 256, 32, 256),
    "group, ragged": (2048, 16 * 49, 8, 49),
    "batch": (256, 4096, 256, 4096),
    "batch, long": (64, 1 << 20, 64, 1 << 20),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("chip", CHIPS)
def test_norm(chip: int, layout: tuple[int, ...], dtype: torch.dtype) -> None:
    rows, D, groups, inner = layout
    options = {"dtype": dtype, "device": "meta"}
    s = Standardised(torch.empty(rows, D, **options), torch.empty(rows, **options), groups, inner, CENTRED)
    w, dw, dx = (torch.empty(*shape, **options) for shape in ((s.channels,), (3, s.channels), (3, rows, D)))
    along = torch.empty(3, rows, **options)

    def heaviest() -> None:
        triton_norm.norm_tangent(s, w, dx, dw, dw)
        triton_norm.norm_backward_tangent(s, w, dw, dx, along, dx[0], dx, (True, True, True))

    def lightest() -> None:
        triton_norm.norm_tangent(s, None, dx[:1], None, None)
        triton_norm.norm_backward_tangent(s, None, None, None, None, None, dx[:1], (True, False, False))

    for call in (heaviest, lightest):
        assert set(check_launches(chip, norm_kernels, *KERNELS, call=call)) >= {"tangent", "backward_tangent"}
