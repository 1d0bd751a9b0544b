"""Triton kernels of attention: a program owns a block of queries or of keys and loops over the other side.

Letters as in ``kernels.attention``. Sums, lse and m are float32; P and its like are rounded to the operands' dtype in
front of a dot. A query outside the matrix has lse = +inf, hence P = 0; a key outside has S = -inf.

What keeps the registers of a thread within bounds: products over the head width (S, dS and those with g) read their
operands anew, CHUNK columns at a time, rather than keep up to four blocks of a whole width over the loop; and a program
sums PART columns of a result, so that a wider head is PARTS programs which each form the scores.
"""

import triton
import triton.language as tl

from . import attention_tiles as tiles


@triton.jit
def forward(
    q,  # [B, T, WQ]
    k,  # [B, S, WQ]
    v,  # [B, S, WV]
    mask,  # [B, T, S] with strides mb, mt, ms
    o,  # [B, T, WV]
    lse,  # [B, T]
    T,
    S,
    mb,
    mt,
    ms,
    scale,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    WQ: tl.constexpr,
    WV: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
):
    """``o`` and ``lse``; the softmax is rescaled whenever a higher score appears."""
    head, first, _, part = tiles.place(T, 1, M, PARTS)
    q += head * T * WQ
    k += head * S * WQ
    v += head * S * WV
    i, j = tl.arange(0, M), tl.arange(0, N)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    column = part * PART
    sum_o = tl.zeros([M, PART], tl.float32)
    end = tl.minimum(S, first + M) if CAUSAL else S
    for start in range(0, end, N):
        s, _ds = tiles.products(q, q, k, k, first, start, T, S, True, False, False, WQ, M, N, CHUNK, WIDE, PRECISION)
        s = tiles.seen(scale * s, first, i[:, None], start, j[None, :], T, S, mask + head * mb, mt, ms, MASKED, CAUSAL)
        higher = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # a row that saw nothing yet: -inf - -inf is NaN
        p = tl.exp(s - shift[:, None])
        shrink = tl.exp(top - shift)
        total = total * shrink + tl.sum(p, 1)
        sum_o *= shrink[:, None]
        sum_o = tiles.gather(p, v, start, S, column, sum_o, WV, WIDE, PRECISION)
        top = higher
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    tiles.store_rows(o + head * T * WV, sum_o / total[:, None], first, T, column, WV)
    if part == 0:
        row_lse = tl.where(nothing, float("inf"), top + tl.log(total))
        tl.store(lse + head * T + first + i, row_lse, mask=i < T - first)


@triton.jit
def tangent(
    q,  # [B, T, WQ]
    dq,  # [k, B, T, WQ]
    k,  # [B, S, WQ]
    dk,  # [k, B, S, WQ]
    v,  # [B, S, WV]
    dv,  # [k, B, S, WV]
    o,  # [B, T, WV]
    lse,  # [B, T]
    mask,  # [B, T, S] with strides mb, mt, ms
    do,  # [k, B, T, WV]
    m,  # [k, B, T]
    tangents,
    B,
    T,
    S,
    mb,
    mt,
    ms,
    scale,
    DQ: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    WQ: tl.constexpr,
    WV: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
):
    """``do`` and ``m``."""
    head, first, tangent, part = tiles.place(T, tangents, M, PARTS)
    moved = tangent * B + head
    q, dq = q + head * T * WQ, dq + moved * T * WQ
    k, dk = k + head * S * WQ, dk + moved * S * WQ
    i, j = tl.arange(0, M), tl.arange(0, N)
    row_lse = tiles.row_numbers(lse + head * T, first, T, float("inf"), M)
    row_m = tl.zeros([M], tl.float32)
    column = part * PART
    sum_do = tl.zeros([M, PART], tl.float32)
    end = tl.minimum(S, first + M) if CAUSAL else S
    for start in range(0, end, N):
        s, ds = tiles.products(q, dq, k, dk, first, start, T, S, True, DQ, DK, WQ, M, N, CHUNK, WIDE, PRECISION)
        s = tiles.seen(scale * s, first, i[:, None], start, j[None, :], T, S, mask + head * mb, mt, ms, MASKED, CAUSAL)
        p = tl.exp(s - row_lse[:, None])
        if DQ or DK:
            pds = p * (scale * ds)
            row_m += tl.sum(pds, 1)
            sum_do = tiles.gather(pds, v + head * S * WV, start, S, column, sum_do, WV, WIDE, PRECISION)
        if DV:
            sum_do = tiles.gather(p, dv + moved * S * WV, start, S, column, sum_do, WV, WIDE, PRECISION)
    if DQ or DK:
        tile_o = tiles.rows(o + head * T * WV, first, T, column, WV, M, PART, WIDE)
        sum_do -= row_m[:, None] * tile_o.to(tl.float32)
    tiles.store_rows(do + moved * T * WV, sum_do, first, T, column, WV)
    if part == 0:
        tl.store(m + moved * T + first + i, row_m, mask=i < T - first)


@triton.jit
def by_queries(
    q,  # [B, T, WQ]
    dq,  # [k, B, T, WQ]
    k,  # [B, S, WQ]
    dk,  # [k, B, S, WQ]
    v,  # [B, S, WV]
    dv,  # [k, B, S, WV]
    g,  # [B, T, WV]
    dg,  # [k, B, T, WV]
    lse,  # [B, T]
    m,  # [k, B, T]
    D,  # [B, T]
    dD,  # [k, B, T]
    mask,  # [B, T, S] with strides mb, mt, ms
    dgq,  # [k, B, T, WQ]
    tangents,
    B,
    T,
    S,
    mb,
    mt,
    ms,
    scale,
    DQ: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    WQ: tl.constexpr,
    WV: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
):
    """``dgq``."""
    head, first, tangent, part = tiles.place(T, tangents, M, PARTS)
    moved = tangent * B + head
    q, dq = q + head * T * WQ, dq + moved * T * WQ
    k, dk = k + head * S * WQ, dk + moved * S * WQ
    v, dv = v + head * S * WV, dv + moved * S * WV
    g, dg = g + head * T * WV, dg + moved * T * WV
    i, j = tl.arange(0, M), tl.arange(0, N)
    row_lse = tiles.row_numbers(lse + head * T, first, T, float("inf"), M)
    row_dD = tiles.row_numbers(dD + moved * T, first, T, 0.0, M)
    if DQ or DK:
        row_m = tiles.row_numbers(m + moved * T, first, T, 0.0, M)
        row_D = tiles.row_numbers(D + head * T, first, T, 0.0, M)
    column = part * PART
    sum_dgq = tl.zeros([M, PART], tl.float32)
    end = tl.minimum(S, first + M) if CAUSAL else S
    for start in range(0, end, N):
        s, ds = tiles.products(q, dq, k, dk, first, start, T, S, True, DQ, DK, WQ, M, N, CHUNK, WIDE, PRECISION)
        s = tiles.seen(scale * s, first, i[:, None], start, j[None, :], T, S, mask + head * mb, mt, ms, MASKED, CAUSAL)
        p = tl.exp(s - row_lse[:, None])
        gv, dgv = tiles.products(g, dg, v, dv, first, start, T, S, DQ or DK, True, DV, WV, M, N, CHUNK, WIDE, PRECISION)
        dgs = p * (dgv - row_dD[:, None])
        if DQ or DK:
            gs = p * (gv - row_D[:, None])
            dgs += gs * (scale * ds - row_m[:, None])
            if DK:
                sum_dgq = tiles.gather(gs, dk, start, S, column, sum_dgq, WQ, WIDE, PRECISION)
        sum_dgq = tiles.gather(dgs, k, start, S, column, sum_dgq, WQ, WIDE, PRECISION)
    tiles.store_rows(dgq + moved * T * WQ, scale * sum_dgq, first, T, column, WQ)


@triton.jit
def by_keys(
    q,  # [B, T, WQ]
    dq,  # [k, B, T, WQ]
    k,  # [B, S, WQ]
    dk,  # [k, B, S, WQ]
    v,  # [B, S, WV]
    dv,  # [k, B, S, WV]
    g,  # [B, T, WV]
    dg,  # [k, B, T, WV]
    lse,  # [B, T]
    m,  # [k, B, T]
    D,  # [B, T]
    dD,  # [k, B, T]
    mask,  # [B, T, S] with strides mb, mt, ms
    dgk,  # [k, B, S, WQ]
    tangents,
    B,
    T,
    S,
    mb,
    mt,
    ms,
    scale,
    DQ: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    WQ: tl.constexpr,
    WV: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
):
    """``dgk``. Blocks are [keys, queries], so that P and its like are left operands as they stand."""
    head, first, tangent, part = tiles.place(S, tangents, N, PARTS)
    moved = tangent * B + head
    q, dq = q + head * T * WQ, dq + moved * T * WQ
    k, dk = k + head * S * WQ, dk + moved * S * WQ
    v, dv = v + head * S * WV, dv + moved * S * WV
    g, dg = g + head * T * WV, dg + moved * T * WV
    i, j = tl.arange(0, M), tl.arange(0, N)
    column = part * PART
    sum_dgk = tl.zeros([N, PART], tl.float32)
    begin = first // M * M if CAUSAL else 0
    for start in range(begin, T, M):
        s, ds = tiles.products(k, dk, q, dq, first, start, S, T, True, DK, DQ, WQ, N, M, CHUNK, WIDE, PRECISION)
        s = tiles.seen(scale * s, start, i[None, :], first, j[:, None], T, S, mask + head * mb, mt, ms, MASKED, CAUSAL)
        row_lse = tiles.row_numbers(lse + head * T, start, T, float("inf"), M)
        p = tl.exp(s - row_lse[None, :])
        vg, dvg = tiles.products(v, dv, g, dg, first, start, S, T, DQ or DK, DV, True, WV, N, M, CHUNK, WIDE, PRECISION)
        row_dD = tiles.row_numbers(dD + moved * T, start, T, 0.0, M)
        dgs = p * (dvg - row_dD[None, :])
        if DQ or DK:
            row_m = tiles.row_numbers(m + moved * T, start, T, 0.0, M)
            row_D = tiles.row_numbers(D + head * T, start, T, 0.0, M)
            gs = p * (vg - row_D[None, :])
            dgs += gs * (scale * ds - row_m[None, :])
            if DQ:
                sum_dgk = tiles.gather(gs, dq, start, T, column, sum_dgk, WQ, WIDE, PRECISION)
        sum_dgk = tiles.gather(dgs, q, start, T, column, sum_dgk, WQ, WIDE, PRECISION)
    tiles.store_rows(dgk + moved * S * WQ, scale * sum_dgk, first, S, column, WQ)


@triton.jit
def by_values(
    q,  # [B, T, WQ]
    dq,  # [k, B, T, WQ]
    k,  # [B, S, WQ]
    dk,  # [k, B, S, WQ]
    g,  # [B, T, WV]
    dg,  # [k, B, T, WV]
    lse,  # [B, T]
    m,  # [k, B, T]
    mask,  # [B, T, S] with strides mb, mt, ms
    dgv,  # [k, B, S, WV]
    tangents,
    B,
    T,
    S,
    mb,
    mt,
    ms,
    scale,
    DQ: tl.constexpr,
    DK: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    WQ: tl.constexpr,
    WV: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
):
    """``dgv``, in a kernel of its own: beside ``dgk`` its sums would spill. Blocks are as in ``by_keys``."""
    head, first, tangent, part = tiles.place(S, tangents, N, PARTS)
    moved = tangent * B + head
    q, dq = q + head * T * WQ, dq + moved * T * WQ
    k, dk = k + head * S * WQ, dk + moved * S * WQ
    i, j = tl.arange(0, M), tl.arange(0, N)
    column = part * PART
    sum_dgv = tl.zeros([N, PART], tl.float32)
    begin = first // M * M if CAUSAL else 0
    for start in range(begin, T, M):
        s, ds = tiles.products(k, dk, q, dq, first, start, S, T, True, DK, DQ, WQ, N, M, CHUNK, WIDE, PRECISION)
        s = tiles.seen(scale * s, start, i[None, :], first, j[:, None], T, S, mask + head * mb, mt, ms, MASKED, CAUSAL)
        row_lse = tiles.row_numbers(lse + head * T, start, T, float("inf"), M)
        p = tl.exp(s - row_lse[None, :])
        sum_dgv = tiles.gather(p, dg + moved * T * WV, start, T, column, sum_dgv, WV, WIDE, PRECISION)
        if DQ or DK:
            row_m = tiles.row_numbers(m + moved * T, start, T, 0.0, M)
            dp = p * (scale * ds - row_m[None, :])
            sum_dgv = tiles.gather(dp, g + head * T * WV, start, T, column, sum_dgv, WV, WIDE, PRECISION)
    tiles.store_rows(dgv + moved * S * WV, sum_dgv, first, S, column, WV)


@triton.jit
def row_sums(
    a,  # [k, rows, W]
    b,  # [rows, W]
    c,  # [k, rows, W]
    d,  # [rows, W]
    out,  # [k, rows]
    tangents,
    rows,
    PAIRS: tl.constexpr,
    W: tl.constexpr,
    M: tl.constexpr,
):
    """<a, b>, and + <c, d> with two PAIRS, over each row."""
    _, first, tangent, _part = tiles.place(rows, tangents, M, 1)
    total = _inner(a + tangent * rows * W, b, first, rows, W, M)
    if PAIRS == 2:
        total += _inner(c + tangent * rows * W, d, first, rows, W, M)
    i = first + tl.arange(0, M)
    tl.store(out + tangent * rows + i, total, mask=i < rows)


@triton.jit
def _inner(a, b, first, rows, W: tl.constexpr, M: tl.constexpr):
    tile_a = tiles.rows(a, first, rows, 0, W, M, tiles.padded(W), True)
    return tl.sum(tile_a * tiles.rows(b, first, rows, 0, W, M, tiles.padded(W), True), 1)
