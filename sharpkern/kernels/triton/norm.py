"""Triton version of ``kernels.norm``: a program holds whole rows in registers, or tiles of a long row.

A row of D numbers is ``[C, P]``: C channels of P = inner numbers, so layer norm has P = 1 and batch norm C = 1. Row n
of a group is row ``n groups + group`` of x. A tile is ``[ROWS, CB, PB]``: some rows of one group, some of their
channels, some of the numbers of each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..saved import FIXED, Standardised

# The longest (padded) rows that are held in registers, of which a block has 65536, with the backward tangent's eight
# tiles. Rows whose numbers do not come in 16s need an address for each number, not for each four.
HELD_TANGENT = {"aligned": 8192, "ragged": 1024}
HELD_BACKWARD = {"aligned": 4096, "ragged": 1024}
# Longer rows are read twice: one kernel adds them up, the next one uses the sums, both tile by tile.
LONG_TILE = 1024
SPLIT = 8  # tiles of a long row that one program adds up
# Programs that share the rows while parameter gradients are summed. Fixed, for the bits of the sums depend on it.
STRETCHES = 512

_FIXED, _CENTRED = tl.constexpr(0), tl.constexpr(2)


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


@triton.jit
def _read(
    pointer,  # any shape
    mask,
):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _total(v):
    """``[ROWS, CB, PB]`` to ``[ROWS, 1, 1]``."""
    return tl.sum(tl.sum(v, 2), 1)[:, None, None]


@triton.jit
def _columns(at, C, P, CB: tl.constexpr, PB: tl.constexpr):
    """Channels ``[1, CB, 1]`` of a row's tile, the places in the row ``[1, CB, PB]``, and which of these exist."""
    wide = tl.cdiv(P, PB)
    c = (at // wide * CB + tl.arange(0, CB))[None, :, None]
    p = (at % wide * PB + tl.arange(0, PB))[None, None, :]
    return c, c * P + p, (c < C) & (p < P)


@triton.jit
def _rows(first, group, groups, N, D, ROWS: tl.constexpr):
    """A tile's first row, of x, as int64; from there its rows and their numbers ``[ROWS, 1, 1]``; which exist."""
    r = tl.arange(0, ROWS)[:, None, None]
    start = r if ROWS == 1 else r.to(tl.int64) * groups * D  # narrow where it can be, for it takes up registers
    return tl.cast(first, tl.int64) * groups + group, r * groups, start, first + r < N


@triton.jit
def _tangent(
    xhat,  # [rows, D]
    r,  # [rows]
    w,  # [channels]
    dx,  # [k, rows, D]
    dw,  # [k, channels]
    db,  # [k, channels]
    sums,  # [2, k, rows]: of dx, xhat dx; read unless WHOLE
    y,  # [k, rows, D]
    dxhat,  # [k, rows, D]
    along,  # [k, rows]
    k,
    size,  # rows D
    rows,
    groups,
    N,
    C,
    P,
    MODE: tl.constexpr,
    HAS_W: tl.constexpr,
    HAS_DX: tl.constexpr,
    HAS_DW: tl.constexpr,
    HAS_DB: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    CB: tl.constexpr,
    PB: tl.constexpr,
):
    at = tl.program_id(0)
    tiles = tl.cdiv(C, CB) * tl.cdiv(P, PB)
    group = at // tiles % groups
    first, row, start, exists = _rows(at // tiles // groups * ROWS, group, groups, N, C * P, ROWS)
    c, column, inside = _columns(at % tiles, C, P, CB, PB)
    channel, known = group * C + c, c < C
    here, inside = start + column, inside & exists
    # absolute positions are added to the pointers, which are scalars
    xhat += first * (C * P)
    dx += first * (C * P)
    y += first * (C * P)
    dxhat += first * (C * P)
    r += first
    sums += first
    along += first

    # read once for all tangents
    x = _read(xhat + here, inside)
    if HAS_DX:
        scale = _read(r + row, exists)
    for _ in range(k):
        value = tl.zeros((ROWS, CB, PB), tl.float32)
        if HAS_DX:
            value = _read(dx + here, inside)
            a = tl.zeros((ROWS, 1, 1), tl.float32)
            mean = a
            if MODE != _FIXED:
                a = (_total(x * value) if WHOLE else _read(sums + k * rows + row, exists)) / (C * P)
            if MODE == _CENTRED:
                mean = (_total(value) if WHOLE else _read(sums + row, exists)) / (C * P)
            value = scale * (value - mean - x * a)
            tl.store(dxhat + here, value.to(dxhat.dtype.element_ty), mask=inside)
            tl.store(along + row, a.to(along.dtype.element_ty), mask=exists)  # every tile stores the same
            if HAS_W:
                value *= _read(w + channel, known)
        if HAS_DW:
            value += x * _read(dw + channel, known)
        if HAS_DB:
            value += _read(db + channel, known)
        tl.store(y + here, value.to(y.dtype.element_ty), mask=inside)
        dx += size
        y += size
        dxhat += size
        sums += rows
        along += rows
        dw += groups * C
        db += groups * C


@triton.jit
def _row_sums(
    xhat,  # [rows, D]
    w,  # [channels]
    dw,  # [k, channels]
    dxhat,  # [k, rows, D]
    g,  # [rows, D]
    dg,  # [k, rows, D]
    sums,  # [5, k, rows, splits]: of du, xhat du, u, xhat u, dxhat u; the first two unless MOVED
    k,
    size,  # rows D
    rows,
    splits,
    groups,
    C,
    P,
    HAS_W: tl.constexpr,
    HAS_DW: tl.constexpr,
    MOVED: tl.constexpr,
    SPLIT: tl.constexpr,
    CB: tl.constexpr,
    PB: tl.constexpr,
):
    t = (tl.program_id(0) % k).to(tl.int64)  # tangents are neighbours, so that they find the primal's row in the cache
    split = tl.program_id(0) // k % splits
    row = (tl.program_id(0) // k // splits).to(tl.int64)
    one, this = row * (C * P), t * size + row * (C * P)
    total_du = tl.zeros((1, CB, PB), tl.float32)
    total_xdu, total_u, total_xu, total_mu = total_du, total_du, total_du, total_du
    for step in range(SPLIT):
        c, column, inside = _columns(split * SPLIT + step, C, P, CB, PB)
        channel, known = row % groups * C + c, c < C
        x = _read(xhat + one + column, inside)
        du = _read(dg + this + column, inside)
        if HAS_W:
            weight = _read(w + channel, known)
            du *= weight
        if HAS_DW:
            du += _read(g + one + column, inside) * _read(dw + t * groups * C + channel, known)
        total_du += du
        total_xdu += x * du
        if MOVED:
            u = _read(g + one + column, inside)
            if HAS_W:
                u *= weight
            total_u += u
            total_xu += x * u
            total_mu += _read(dxhat + this + column, inside) * u
    to = sums + (t * rows + row) * splits + split + tl.zeros((1, 1, 1), tl.int64)
    each = (t * 0 + rows) * splits * k
    tl.store(to, _total(total_du))
    tl.store(to + each, _total(total_xdu))
    if MOVED:
        tl.store(to + 2 * each, _total(total_u))
        tl.store(to + 3 * each, _total(total_xu))
        tl.store(to + 4 * each, _total(total_mu))


@triton.jit
def _backward_tangent(
    xhat,  # [rows, D]
    r,  # [rows]
    w,  # [channels]
    dw,  # [k, channels]
    dxhat,  # [k, rows, D]
    along,  # [k, rows]
    g,  # [rows, D]
    dg,  # [k, rows, D]
    sums,  # [5, k, rows], as from _row_sums; read unless WHOLE
    out,  # [k, rows, D]
    dgw,  # [k, stretches, wide, channels]
    dgb,  # [k, stretches, wide, channels]
    k,
    size,  # rows D
    rows,
    groups,
    N,
    stretches,
    each,  # rows of a group in a stretch
    C,
    P,
    MODE: tl.constexpr,
    HAS_W: tl.constexpr,
    HAS_DW: tl.constexpr,
    HAS_G: tl.constexpr,
    MOVED: tl.constexpr,
    NEEDS_X: tl.constexpr,
    NEEDS_W: tl.constexpr,
    NEEDS_B: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    CB: tl.constexpr,
    PB: tl.constexpr,
):
    t = (tl.program_id(0) % k).to(tl.int64)  # tangents are neighbours, so that they find the primal's rows in the cache
    wide = tl.cdiv(P, PB)
    tiles = tl.cdiv(C, CB) * wide
    at = tl.program_id(0) // k % tiles
    group = tl.program_id(0) // k // tiles % groups
    stretch = tl.program_id(0) // k // tiles // groups
    c, column, inside = _columns(at, C, P, CB, PB)
    channel, known = group * C + c, c < C
    if HAS_W:
        weight = _read(w + channel, known)
    if HAS_DW:
        dweight = _read(dw + t * groups * C + channel, known)
    if NEEDS_W:
        total_w = tl.zeros((ROWS, CB, PB), tl.float32)
    if NEEDS_B:
        total_b = tl.zeros((ROWS, CB, PB), tl.float32)

    for step in range(0, each, ROWS):
        first, row, start, exists = _rows(stretch * each + step, group, groups, N, C * P, ROWS)
        here, there = start + column, inside & exists
        one, this = first * (C * P), t * size + first * (C * P)  # the first number, of a primal and of this tangent
        x = _read(xhat + one + here, there)
        du = _read(dg + this + here, there)
        if HAS_G:
            u = _read(g + one + here, there)
        if MOVED:
            moved = _read(dxhat + this + here, there)
        if NEEDS_W:
            total_w += du * x
            if MOVED:
                total_w += u * moved
        if NEEDS_B:
            total_b += du
        if NEEDS_X:
            if HAS_W:
                du *= weight
            if HAS_DW:
                du += u * dweight
            scale = _read(r + first + row, exists)
            if MODE != _FIXED:
                at_sum = sums + t * rows + first + row
                m_du = _total(du) if WHOLE else _read(at_sum, exists)
                m_xdu = _total(x * du) if WHOLE else _read(at_sum + k * rows, exists)
                if MOVED:
                    if HAS_W:
                        u *= weight
                    rho = scale * _read(along + t * rows + first + row, exists)
                    m_u = _total(u) if WHOLE else _read(at_sum + 2 * k * rows, exists)
                    m_xu = _total(x * u) if WHOLE else _read(at_sum + 3 * k * rows, exists)
                    m_mu = _total(moved * u) if WHOLE else _read(at_sum + 4 * k * rows, exists)
                    du -= rho * u + moved * (m_xu / (C * P))
                    m_du -= rho * m_u
                    m_xdu += m_mu - rho * m_xu
                du -= x * (m_xdu / (C * P))
                if MODE == _CENTRED:
                    du -= m_du / (C * P)
            tl.store(out + this + here, (scale * du).to(out.dtype.element_ty), mask=there)

    part = ((t * stretches + stretch) * wide + at % wide) * groups * C + channel
    if NEEDS_W:
        tl.store(dgw + part, tl.sum(tl.sum(total_w, 2)[:, :, None], 0)[None], mask=known)
    if NEEDS_B:
        tl.store(dgb + part, tl.sum(tl.sum(total_b, 2)[:, :, None], 0)[None], mask=known)


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
    _tangent[(triton.cdiv(N, size.rows) * s.groups * size.across(C, s.inner),)](
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
    together = max(1, triton.cdiv(tiles, STRETCHES)) if needs[1] or needs[2] else 1
    stretches = triton.cdiv(tiles, together)
    out = torch.empty_like(dg) if needs[0] else None
    parts = [
        x.new_empty(k, stretches * triton.cdiv(s.inner, size.p), s.channels, dtype=torch.float32) if need else None
        for need in needs[1:]
    ]
    _backward_tangent[(k * size.across(C, s.inner) * s.groups * stretches,)](
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
    dgw, dgb = (None if part is None else part.sum(1).to(x.dtype) for part in parts)
    return out, dgw, dgb


def _sums(
    s: Standardised, w: Tensor | None, dw: Tensor | None, dxhat: Tensor | None, g: Tensor | None, dg: Tensor, size: Tile
) -> Tensor:
    """Return the sums ``[5 or 2, k, rows]`` over long rows that ``_tangent`` and ``_backward_tangent`` need."""
    k, (rows, D), x = dg.shape[0], s.xhat.shape, s.xhat.contiguous()
    C = D // s.inner
    splits = triton.cdiv(size.across(C, s.inner), SPLIT)
    sums = x.new_empty(2 if dxhat is None else 5, k, rows, splits, dtype=torch.float32)
    _row_sums[(k * splits * rows,)](
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
    return sums.sum(-1)


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


def _or(default: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Put a tensor that is never read in the place of absent ones."""
    return [default if t is None else t for t in tensors]
