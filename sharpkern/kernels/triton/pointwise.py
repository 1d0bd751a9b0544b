"""Triton version of ``kernels.pointwise``: one program per stretch of numbers; the primal's are read once for all k."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Torch's own passes: they run once per parameter value, not once per product.
from ..reference import activation_curvature as activation_curvature
from ..reference import activation_slope as activation_slope

BLOCK = 1024


@triton.jit
def _slope_product(
    slope,  # [n]
    d,  # [k, n]
    curvature,  # [n]
    dz,  # [k, n]
    out,  # [k, n]
    k,
    n,
    CURVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    s = tl.load(slope + at, mask=inside).to(tl.float32)
    if CURVED:
        c = tl.load(curvature + at, mask=inside).to(tl.float32)
    for _ in range(k):
        y = s * tl.load(d + at, mask=inside).to(tl.float32)
        if CURVED:
            y += c * tl.load(dz + at, mask=inside).to(tl.float32)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)
        at += n


def slope_product(slope: Tensor, d: Tensor, curvature: Tensor | None = None, dz: Tensor | None = None) -> Tensor:
    """See ``kernels.pointwise``."""
    d = d.contiguous()
    out = torch.empty_like(d)
    n = slope.numel()
    _slope_product[(triton.cdiv(n, BLOCK),)](
        slope.contiguous(),
        d,
        slope if curvature is None else curvature.contiguous(),
        d if dz is None else dz.contiguous(),
        out,
        d.shape[0],
        n,
        CURVED=curvature is not None,
        BLOCK=BLOCK,
    )
    return out
