"""Triton version of ``kernels.softmax``: a program holds whole rows for all k tangents, or reads a long row twice.

Softmax's two are one formula, ``weight (p (u - s) + dp inner)`` with ``s = <p, u> + <dp, inner>``: the Jacobian has no
second term, and the backward tangent no weight. Log-softmax's two have little in common but the rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# The longest (padded) row that is held in registers. Rows whose numbers do not come in 16s need an address for each
# number, not for each four.
HELD = {"aligned": 8192, "ragged": 1024}
LONG_BLOCK = 4096  # numbers of a longer row at a time


class Tile(NamedTuple):
    """A launch configuration: ``[rows, c]`` numbers in a program of so many warps; whole if it spans a row."""

    rows: int
    c: int
    warps: int
    whole: bool


def tile(rows: int, C: int) -> Tile:
    """Choose the tile for rows of C numbers: 1024 numbers or more, of short rows together."""
    c = triton.next_power_of_2(C)
    if c > HELD["ragged" if C % 16 else "aligned"]:
        return Tile(1, LONG_BLOCK, warps(LONG_BLOCK), False)
    together = max(1, min(1024 // c, triton.next_power_of_2(rows)))
    return Tile(together, c, warps(together * c), True)


def warps(numbers: int) -> int:
    """Return the warps for a tile: 16 numbers a thread, for with fewer ptxas saves registers to the point of spills."""
    return max(1, numbers // 512)


@triton.jit
def _read(
    pointer,  # any shape
    mask,
):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _held(
    p,  # [rows, C]
    u,  # [k, rows, C]
    weight,  # [rows]
    dp,  # [k, rows, C]
    inner,  # [rows, C]
    out,  # [k, rows, C]
    mean,  # [k, rows]
    k,
    size,  # rows C
    rows,
    C,
    WEIGHTED: tl.constexpr,
    CURVED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.cast(tl.program_id(0), tl.int64) * ROWS
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    exists = first + r < rows
    at, inside = r * C + c, exists & (c < C)
    # absolute positions are added to the pointers, which are scalars
    p += first * C
    u += first * C
    dp += first * C
    inner += first * C
    out += first * C
    mean += first
    probability = _read(p + at, inside)
    if WEIGHTED:
        factor = _read(weight + first + r, exists)
    if CURVED:
        away = _read(inner + at, inside)
    for _ in range(k):
        value = _read(u + at, inside)
        if CURVED:
            other = _read(dp + at, inside) * away
            total = tl.sum(probability * value + other, 1)[:, None]
            value = probability * (value - total) + other
        else:
            total = tl.sum(probability * value, 1)[:, None]
            value = probability * (value - total)
            tl.store(mean + r, total.to(mean.dtype.element_ty), mask=exists)
        if WEIGHTED:
            value *= factor
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
        u += size
        dp += size
        out += size
        mean += rows


@triton.jit
def _long(
    p,  # [rows, C]
    u,  # [k, rows, C]
    weight,  # [rows]
    dp,  # [k, rows, C]
    inner,  # [rows, C]
    out,  # [k, rows, C]
    mean,  # [k, rows]
    k,
    size,  # rows C
    rows,
    C,
    WEIGHTED: tl.constexpr,
    CURVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.cast(tl.program_id(0) % k, tl.int64)  # tangents are neighbours, so that they find p in the cache
    row = tl.cast(tl.program_id(0) // k, tl.int64)
    p += row * C
    inner += row * C
    u += t * size + row * C
    dp += t * size + row * C
    out += t * size + row * C
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, C, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += _read(p + at, at < C) * _read(u + at, at < C)
        if CURVED:
            sums += _read(dp + at, at < C) * _read(inner + at, at < C)
    total = tl.sum(sums, 0)
    factor = 1.0
    if WEIGHTED:
        factor = tl.load(weight + row).to(tl.float32)
    for back in range(0, C, BLOCK):  # from the end, which is still in the cache
        at = (C - 1) // BLOCK * BLOCK - back + tl.arange(0, BLOCK)
        value = _read(p + at, at < C) * (_read(u + at, at < C) - total)
        if CURVED:
            value += _read(dp + at, at < C) * _read(inner + at, at < C)
        tl.store(out + at, (factor * value).to(out.dtype.element_ty), mask=at < C)
    if not CURVED:
        tl.store(mean + t * rows + row, total.to(mean.dtype.element_ty))


@triton.jit
def _log_held(
    p,  # [rows, C]
    u,  # [k, rows, C]
    dl,  # [k, rows, C]
    total,  # [rows]
    out,  # [k, rows, C]
    k,
    size,  # rows C
    rows,
    C,
    CURVED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.cast(tl.program_id(0), tl.int64) * ROWS
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    exists = first + r < rows
    at, inside = r * C + c, exists & (c < C)
    p += first * C
    u += first * C
    dl += first * C
    out += first * C
    probability = _read(p + at, inside)
    if CURVED:
        factor = _read(total + first + r, exists)
    for _ in range(k):
        value = _read(u + at, inside)
        if CURVED:
            value -= probability * (tl.sum(value, 1)[:, None] + factor * _read(dl + at, inside))
        else:
            value -= tl.sum(probability * value, 1)[:, None]
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
        u += size
        dl += size
        out += size


@triton.jit
def _log_long(
    p,  # [rows, C]
    u,  # [k, rows, C]
    dl,  # [k, rows, C]
    total,  # [rows]
    out,  # [k, rows, C]
    k,
    size,  # rows C
    C,
    CURVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.cast(tl.program_id(0) % k, tl.int64)
    row = tl.cast(tl.program_id(0) // k, tl.int64)
    p += row * C
    u += t * size + row * C
    dl += t * size + row * C
    out += t * size + row * C
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, C, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = _read(u + at, at < C)
        if CURVED:
            sums += value
        else:
            sums += value * _read(p + at, at < C)
    mean = tl.sum(sums, 0)
    factor = 0.0
    if CURVED:
        factor = tl.load(total + row).to(tl.float32)
    for back in range(0, C, BLOCK):
        at = (C - 1) // BLOCK * BLOCK - back + tl.arange(0, BLOCK)
        value = _read(u + at, at < C)
        if CURVED:
            value -= _read(p + at, at < C) * (mean + factor * _read(dl + at, at < C))
        else:
            value -= mean
        tl.store(out + at, value.to(out.dtype.element_ty), mask=at < C)


def softmax_jacobian(p: Tensor, u: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See ``kernels.softmax``."""
    u = u.contiguous()
    out, mean = torch.empty_like(u), u.new_empty(u.shape[:2])
    _launch(p, u, weight, None, None, out, mean)
    return out, mean


def softmax_backward_tangent(p: Tensor, dp: Tensor, inner: Tensor, dg: Tensor) -> Tensor:
    """See ``kernels.softmax``."""
    dg = dg.contiguous()
    out = torch.empty_like(dg)
    _launch(p, dg, None, dp.contiguous(), inner.contiguous(), out, None)
    return out


def _launch(
    p: Tensor,
    u: Tensor,
    weight: Tensor | None,
    dp: Tensor | None,
    inner: Tensor | None,
    out: Tensor,
    mean: Tensor | None,
) -> None:
    p, (k, rows, C) = p.contiguous(), u.shape
    size = tile(rows, C)
    weight = None if weight is None else weight.contiguous()
    operands = [p if t is None else t for t in (p, u, weight, dp, inner, out, mean)]  # never read where absent
    flags = {"WEIGHTED": weight is not None, "CURVED": dp is not None, "BLOCK": size.c, "num_warps": size.warps}
    if size.whole:
        _held[(triton.cdiv(rows, size.rows),)](*operands, k, rows * C, rows, C, ROWS=size.rows, **flags)
    else:
        _long[(k * rows,)](*operands, k, rows * C, rows, C, **flags)


def log_softmax_jacobian(p: Tensor, u: Tensor) -> Tensor:
    """See ``kernels.softmax``."""
    return _launch_log(p, u, None, None)


def log_softmax_backward_tangent(p: Tensor, dl: Tensor, total: Tensor, dg: Tensor) -> Tensor:
    """See ``kernels.softmax``."""
    return _launch_log(p, dg, dl.contiguous(), total.contiguous())


def _launch_log(p: Tensor, u: Tensor, dl: Tensor | None, total: Tensor | None) -> Tensor:
    p, u, (k, rows, C) = p.contiguous(), u.contiguous(), u.shape
    out, size = torch.empty_like(u), tile(rows, C)
    operands = [p if t is None else t for t in (p, u, dl, total, out)]  # never read where absent
    flags = {"CURVED": dl is not None, "BLOCK": size.c, "num_warps": size.warps}
    if size.whole:
        _log_held[(triton.cdiv(rows, size.rows),)](*operands, k, rows * C, rows, C, ROWS=size.rows, **flags)
    else:
        _log_long[(k * rows,)](*operands, k, rows * C, C, **flags)
    return out
