"""Triton version of ``kernels.norm``: launches the kernels of ``norm_kernels``.

A program holds whole rows in registers, or tiles of a long row: ``tile`` chooses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..saved import FIXED, Standardised
from . import norm_kernels as kernels

# The longest (padded) rows that are held in registers, of which a block has 65536, with the backward tangent's eight
# tiles. Rows whose numbers do not come in 16s need an address for each number, not for each four.
HELD_TANGENT = {"aligned": 8192, "ragged": 1024}
HELD_BACKWARD = {"aligned": 4096, "ragged": 1024}
# Longer rows are read twice: one kernel adds them up, the next one uses the sums, both tile by tile.
LONG_TILE = 1024
SPLIT = 8  # tiles of a long row that one program adds up
# Programs that share the rows while parameter gradients are summed. Fixed, for the bits of the sums depend on it.
STRETCHES = 512


class Tile(NamedTuple):
    """A launch configuration: ``[rows, c, p]`` numbers in a program of so many warps; whole if it spans a row."""

    rows: int
    c: int
    p: int
    warps: int
    whole: bool

    def across(self, C: int, P: int) -> int:
        """Return how many tiles make up a row ``[C, P]``."""
        return triton.cdiv(C, self.c) * triton.cdiv(P, self.p)


def tile(N: int, C: int, P: int, held: dict[str, int]) -> Tile:
    """Choose the tile for N rows ``[C, P]`` a group: rows of up to ``held`` numbers whole, short ones together."""
    c, p = triton.next_power_of_2(C), triton.next_power_of_2(P)
    whole = c * p <= held["aligned" if (C if P == 1 else P) % 16 == 0 else "ragged"]
    if not whole:
        p = min(p, LONG_TILE)
        c = min(c, LONG_TILE // p)
    rows = max(1, min(1024 // (c * p), triton.next_power_of_2(N)))
    return Tile(rows, c, p, warps(rows * c * p), whole)


def warps(numbers: int) -> int:
    """Return the warps for a tile: 4 numbers a thread, then 8, then what 16 warps make of it."""
    return 16 if numbers > 2048 else max(1, min(8, numbers // 128))


def norm_tangent(
    s: Standardised, w: Tensor | None, dx: Tensor | None, dw: Tensor | None, db: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See ``kernels.norm.norm_tangent``."""
    k = next(d for d in (dx, dw, db) if d is not None).shape[0]
    (rows, D), x = s.xhat.shape, s.xhat.contiguous()
    N, C = rows // s.groups, D // s.inner
    y = x.new_empty(k, rows, D)
    dxhat = None if dx is None else torch.empty_like(y)
    along = None if dx is None else x.new_empty(k, rows)
    r, w, dx, dw, db = _contiguous(s.r, w, dx, dw, db)
    size = tile(N, C, s.inner, HELD_TANGENT)
    sums = None
    if dx is not None and s.mode != FIXED and not size.whole:
        sums = _sums(s, None, None, None, None, dx, size)
    kernels.tangent[(triton.cdiv(N, size.rows) * s.groups * size.across(C, s.inner),)](
        *_or(x, x, r, w, dx, dw, db, sums, y, dxhat, along),
        k,
        rows * D,
        rows,
        s.groups,
        N,
        C,
        s.inner,
        MODE=s.mode,
        HAS_W=w is not None,
        HAS_DX=dx is not None,
        HAS_DW=dw is not None,
        HAS_DB=db is not None,
        WHOLE=size.whole,
        ROWS=size.rows,
        CB=size.c,
        PB=size.p,
        num_warps=size.warps,
    )
    return y, dxhat, along


def norm_backward_tangent(
    s: Standardised,
    w: Tensor | None,
    dw: Tensor | None,
    dxhat: Tensor | None,
    along: Tensor | None,
    g: Tensor | None,
    dg: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See ``kernels.norm.norm_backward_tangent``."""
    # Without g these would be multiplied with it; the kernel then reads none of them.
    if g is None:  # the part linear in dg
        dw = dxhat = along = None
    k, (rows, D), x = dg.shape[0], s.xhat.shape, s.xhat.contiguous()
    N, C = rows // s.groups, D // s.inner
    r, w, dw, dxhat, along, g, dg = _contiguous(s.r, w, dw, dxhat, along, g, dg)
    size = tile(N, C, s.inner, HELD_BACKWARD)
    sums = None
    if needs[0] and s.mode != FIXED and not size.whole:
        sums = _sums(s, w, dw, dxhat, g, dg, size)
    tiles = triton.cdiv(N, size.rows)
    # Only for parameters' sums: without them every tile is its own program.
    together = max(1, triton.cdiv(tiles, STRETCHES)) if needs[1] or needs[2] else 1
    stretches = triton.cdiv(tiles, together)
    out = torch.empty_like(dg) if needs[0] else None
    parts = [
        x.new_empty(k, stretches * triton.cdiv(s.inner, size.p), s.channels, dtype=torch.float32) if need else None
        for need in needs[1:]
    ]
    kernels.backward_tangent[(k * size.across(C, s.inner) * s.groups * stretches,)](
        *_or(x, x, r, w, dw, dxhat, along, g, dg, sums, out, *parts),
        k,
        rows * D,
        rows,
        s.groups,
        N,
        stretches,
        together * size.rows,
        C,
        s.inner,
        MODE=s.mode,
        HAS_W=w is not None,
        HAS_DW=dw is not None,
        HAS_G=g is not None,
        MOVED=dxhat is not None,
        NEEDS_X=needs[0],
        NEEDS_W=needs[1],
        NEEDS_B=needs[2],
        WHOLE=size.whole,
        ROWS=size.rows,
        CB=size.c,
        PB=size.p,
        num_warps=size.warps,
    )
    # The second stage of the sums, by torch: in a fixed order, so the bits are the same every time.
    dgw, dgb = (None if part is None else part.sum(1).to(x.dtype) for part in parts)
    return out, dgw, dgb


def _sums(
    s: Standardised, w: Tensor | None, dw: Tensor | None, dxhat: Tensor | None, g: Tensor | None, dg: Tensor, size: Tile
) -> Tensor:
    """Return the sums ``[5 or 2, k, rows]`` over long rows that ``tangent`` and ``backward_tangent`` need."""
    k, (rows, D), x = dg.shape[0], s.xhat.shape, s.xhat.contiguous()
    C = D // s.inner
    splits = triton.cdiv(size.across(C, s.inner), SPLIT)
    sums = x.new_empty(2 if dxhat is None else 5, k, rows, splits, dtype=torch.float32)
    kernels.row_sums[(k * splits * rows,)](
        *_or(x, x, w, dw, dxhat, g, dg, sums),
        k,
        rows * D,
        rows,
        splits,
        s.groups,
        C,
        s.inner,
        HAS_W=w is not None,
        HAS_DW=dw is not None,
        MOVED=dxhat is not None,
        SPLIT=SPLIT,
        CB=size.c,
        PB=size.p,
        num_warps=size.warps,
    )
    # Few numbers are left: one for each SPLIT tiles of a row.
    return sums.sum(-1)


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


def _or(default: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Put a tensor that is never read in the place of absent ones."""
    return [default if t is None else t for t in tensors]
