"""Triton kernels of norms: tangent and backward tangent, and the sums over long rows that both need.

A row of D numbers is ``[C, P]``: C channels of P = inner numbers, so layer norm has P = 1 and batch norm C = 1. Row n
of a group is row ``n groups + group`` of x. A tile is ``[ROWS, CB, PB]``: some rows of one group, some of their
channels, some of the numbers of each.
"""

import triton
import triton.language as tl

from ..saved import CENTRED, FIXED

_FIXED, _CENTRED = tl.constexpr(FIXED), tl.constexpr(CENTRED)


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
def tangent(
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
    """``y = J dx w + xhat dw + db``, ``dxhat = J dx`` and ``along = mean(xhat dx)``."""
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
def row_sums(
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
    """The sums over long rows: a program adds up SPLIT tiles of one."""
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
def _projected(
    du,
    u,
    x,
    moved,
    rho,  # r mean(xhat dx), of each row
    sums,  # the rows' places in the first of the sums
    each,  # from one sum to the next
    numbers,
    exists,
    MODE: tl.constexpr,
    MOVED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """``(J du + dJ u) / r``: du without its projections on what the statistics take out of a row."""
    m_du = _total(du) if WHOLE else _read(sums, exists)
    m_xdu = _total(x * du) if WHOLE else _read(sums + each, exists)
    if MOVED:
        m_u = _total(u) if WHOLE else _read(sums + 2 * each, exists)
        m_xu = _total(x * u) if WHOLE else _read(sums + 3 * each, exists)
        m_mu = _total(moved * u) if WHOLE else _read(sums + 4 * each, exists)
        du -= rho * u + moved * (m_xu / numbers)
        m_du -= rho * m_u
        m_xdu += m_mu - rho * m_xu
    du -= x * (m_xdu / numbers)
    if MODE == _CENTRED:
        du -= m_du / numbers
    return du


@triton.jit
def backward_tangent(
    xhat,  # [rows, D]
    r,  # [rows]
    w,  # [channels]
    dw,  # [k, channels]
    dxhat,  # [k, rows, D]
    along,  # [k, rows]
    g,  # [rows, D]
    dg,  # [k, rows, D]
    sums,  # [5, k, rows], as from row_sums; read unless WHOLE
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
    """``out = J (dg w + g dw) + dJ (g w)``, and each stretch's part of the sums dgw and dgb."""
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
        u, moved = x, x  # stand in for what is absent; never used
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
            rho = scale
            if MOVED:
                if HAS_W:
                    u *= weight
                rho = scale * _read(along + t * rows + first + row, exists)
            if MODE != _FIXED:
                at_sum = sums + t * rows + first + row
                du = _projected(du, u, x, moved, rho, at_sum, k * rows, C * P, exists, MODE, MOVED, WHOLE)
            tl.store(out + this + here, (scale * du).to(out.dtype.element_ty), mask=there)

    part = ((t * stretches + stretch) * wide + at % wide) * groups * C + channel
    if NEEDS_W:
        tl.store(dgw + part, tl.sum(tl.sum(total_w, 2)[:, :, None], 0)[None], mask=known)
    if NEEDS_B:
        tl.store(dgb + part, tl.sum(tl.sum(total_b, 2)[:, :, None], 0)[None], mask=known)
