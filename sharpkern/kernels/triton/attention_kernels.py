"""Triton kernels of attention: a program owns a block of queries or of keys and loops over the other side.

Letters as in ``kernels.attention``. Sums, lse and m are float32; P and its like are rounded to the operands' dtype in
front of a dot. A query outside the matrix has lse = +inf, hence P = 0; a key outside has S = -inf.

What keeps the registers of a thread within bounds: products over the head width (S, dS and those with g) read their
operands anew, CHUNK columns at a time, rather than keep up to four blocks of a whole width over the loop; and a program
sums PART columns of a result, so that a wider head is PARTS programs which each form the scores.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def padded(width):
    """What tl.arange and tl.dot take instead of a head width."""
    return max(16, triton.next_power_of_2(width))


@triton.constexpr_function
def _divides(part, width):
    return width % part == 0


@triton.jit
def _place(length, tangents, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Head, first row, tangent and part of a program: what reads the same primal runs at about the same time."""
    pid = tl.program_id(0)
    part, pid = pid % PARTS, pid // PARTS
    tangent, pid = pid % tangents, pid // tangents
    blocks = (length + BLOCK - 1) // BLOCK
    return (pid // blocks).to(tl.int64), (pid % blocks) * BLOCK, tangent.to(tl.int64), part


@triton.jit
def _rows(x, first, length, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """A block of ``[length, WIDTH]``, zero outside. WIDE: in float32, since the interpreter cannot compute in bf16."""
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = i < length - first
    if not _divides(COLUMNS, WIDTH):
        inside = inside & (j < WIDTH - column)
    # 64 bits in the scalar part alone: address registers are what these kernels run out of
    tile = tl.load(x + tl.full([], first, tl.int64) * WIDTH + column + (i * WIDTH + j), mask=inside, other=0.0)
    if WIDE:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _store_rows(x, tile, first, length, column, WIDTH: tl.constexpr):
    i, j = tl.arange(0, tile.shape[0])[:, None], tl.arange(0, tile.shape[1])[None, :]
    to = x + first.to(tl.int64) * WIDTH + column + (i * WIDTH + j)
    tl.store(to, tile.to(x.dtype.element_ty), mask=(i < length - first) & (j < WIDTH - column))


@triton.jit
def _row_numbers(x, first, length, other, ROWS: tl.constexpr):
    i = tl.arange(0, ROWS)
    return tl.load(x + first + i, mask=i < length - first, other=other)


@triton.jit
def _products(
    a,  # [rows_a, WIDTH]
    da,  # [rows_a, WIDTH]
    b,  # [rows_b, WIDTH]
    db,  # [rows_b, WIDTH]
    first_a,
    first_b,
    rows_a,
    rows_b,
    AB: tl.constexpr,
    DA: tl.constexpr,
    DB: tl.constexpr,
    WIDTH: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``a b'`` (zero without AB) and ``da b' + a db'`` of A rows of a and B rows of b."""
    ab = tl.zeros([A, B], tl.float32)
    dab = tl.zeros([A, B], tl.float32)
    for column in range(0, WIDTH, CHUNK):
        if AB or DA:
            tile_b = tl.trans(_rows(b, first_b, rows_b, column, WIDTH, B, CHUNK, WIDE))
        if AB or DB:
            tile_a = _rows(a, first_a, rows_a, column, WIDTH, A, CHUNK, WIDE)
        if AB:
            ab = tl.dot(tile_a, tile_b, ab, input_precision=PRECISION)
        if DA:
            tile_da = _rows(da, first_a, rows_a, column, WIDTH, A, CHUNK, WIDE)
            dab = tl.dot(tile_da, tile_b, dab, input_precision=PRECISION)
        if DB:
            tile_db = tl.trans(_rows(db, first_b, rows_b, column, WIDTH, B, CHUNK, WIDE))
            dab = tl.dot(tile_a, tile_db, dab, input_precision=PRECISION)
    return ab, dab


@triton.jit
def _gather(p, x, first, length, column, total, WIDTH: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """``total + p x`` over a block of rows of x, for the columns that total has."""
    tile = _rows(x, first, length, column, WIDTH, p.shape[1], total.shape[1], WIDE)
    return tl.dot(p.to(tile.dtype), tile, total, input_precision=PRECISION)


@triton.jit
def _seen(s, first_i, i, first_j, j, T, S, mask, mt, ms, MASKED: tl.constexpr, CAUSAL: tl.constexpr):
    """Add the mask; -inf where query i does not see key j or either is not there. i and j count from their firsts."""
    inside = (i < T - first_i) & (j < S - first_j)
    if CAUSAL:
        inside = inside & (j - i <= first_i - first_j)
    if MASKED:
        block = mask + tl.full([], first_i, tl.int64) * mt + tl.full([], first_j, tl.int64) * ms
        s += tl.load(block + (i * mt + j * ms), mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, s, float("-inf"))


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
    head, first, _, part = _place(T, 1, M, PARTS)
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
        s, _ds = _products(q, q, k, k, first, start, T, S, True, False, False, WQ, M, N, CHUNK, WIDE, PRECISION)
        s = _seen(scale * s, first, i[:, None], start, j[None, :], T, S, mask + head * mb, mt, ms, MASKED, CAUSAL)
        higher = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # a row that saw nothing yet: -inf - -inf is NaN
        p = tl.exp(s - shift[:, None])
        shrink = tl.exp(top - shift)
        total = total * shrink + tl.sum(p, 1)
        sum_o *= shrink[:, None]
        sum_o = _gather(p, v, start, S, column, sum_o, WV, WIDE, PRECISION)
        top = higher
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    _store_rows(o + head * T * WV, sum_o / total[:, None], first, T, column, WV)
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
    head, first, tangent, part = _place(T, tangents, M, PARTS)
    moved = tangent * B + head
    q, dq = q + head * T * WQ, dq + moved * T * WQ
    k, dk = k + head * S * WQ, dk + moved * S * WQ
    i, j = tl.arange(0, M), tl.arange(0, N)
    row_lse = _row_numbers(lse + head * T, first, T, float("inf"), M)
    row_m = tl.zeros([M], tl.float32)
    column = part * PART
    sum_do = tl.zeros([M, PART], tl.float32)
    end = tl.minimum(S, first + M) if CAUSAL else S
    for start in range(0, end, N):
        s, ds = _products(q, dq, k, dk, first, start, T, S, True, DQ, DK, WQ, M, N, CHUNK, WIDE, PRECISION)
        s = _seen(scale * s, first, i[:, None], start, j[None, :], T, S, mask + head * mb, mt, ms, MASKED, CAUSAL)
        p = tl.exp(s - row_lse[:, None])
        if DQ or DK:
            pds = p * (scale * ds)
            row_m += tl.sum(pds, 1)
            sum_do = _gather(pds, v + head * S * WV, start, S, column, sum_do, WV, WIDE, PRECISION)
        if DV:
            sum_do = _gather(p, dv + moved * S * WV, start, S, column, sum_do, WV, WIDE, PRECISION)
    if DQ or DK:
        tile_o = _rows(o + head * T * WV, first, T, column, WV, M, PART, WIDE)
        sum_do -= row_m[:, None] * tile_o.to(tl.float32)
    _store_rows(do + moved * T * WV, sum_do, first, T, column, WV)
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
    head, first, tangent, part = _place(T, tangents, M, PARTS)
    moved = tangent * B + head
    q, dq = q + head * T * WQ, dq + moved * T * WQ
    k, dk = k + head * S * WQ, dk + moved * S * WQ
    v, dv = v + head * S * WV, dv + moved * S * WV
    g, dg = g + head * T * WV, dg + moved * T * WV
    i, j = tl.arange(0, M), tl.arange(0, N)
    row_lse = _row_numbers(lse + head * T, first, T, float("inf"), M)
    row_dD = _row_numbers(dD + moved * T, first, T, 0.0, M)
    if DQ or DK:
        row_m = _row_numbers(m + moved * T, first, T, 0.0, M)
        row_D = _row_numbers(D + head * T, first, T, 0.0, M)
    column = part * PART
    sum_dgq = tl.zeros([M, PART], tl.float32)
    end = tl.minimum(S, first + M) if CAUSAL else S
    for start in range(0, end, N):
        s, ds = _products(q, dq, k, dk, first, start, T, S, True, DQ, DK, WQ, M, N, CHUNK, WIDE, PRECISION)
        s = _seen(scale * s, first, i[:, None], start, j[None, :], T, S, mask + head * mb, mt, ms, MASKED, CAUSAL)
        p = tl.exp(s - row_lse[:, None])
        gv, dgv = _products(g, dg, v, dv, first, start, T, S, DQ or DK, True, DV, WV, M, N, CHUNK, WIDE, PRECISION)
        dgs = p * (dgv - row_dD[:, None])
        if DQ or DK:
            gs = p * (gv - row_D[:, None])
            dgs += gs * (scale * ds - row_m[:, None])
            if DK:
                sum_dgq = _gather(gs, dk, start, S, column, sum_dgq, WQ, WIDE, PRECISION)
        sum_dgq = _gather(dgs, k, start, S, column, sum_dgq, WQ, WIDE, PRECISION)
    _store_rows(dgq + moved * T * WQ, scale * sum_dgq, first, T, column, WQ)


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
    head, first, tangent, part = _place(S, tangents, N, PARTS)
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
        s, ds = _products(k, dk, q, dq, first, start, S, T, True, DK, DQ, WQ, N, M, CHUNK, WIDE, PRECISION)
        s = _seen(scale * s, start, i[None, :], first, j[:, None], T, S, mask + head * mb, mt, ms, MASKED, CAUSAL)
        row_lse = _row_numbers(lse + head * T, start, T, float("inf"), M)
        p = tl.exp(s - row_lse[None, :])
        vg, dvg = _products(v, dv, g, dg, first, start, S, T, DQ or DK, DV, True, WV, N, M, CHUNK, WIDE, PRECISION)
        row_dD = _row_numbers(dD + moved * T, start, T, 0.0, M)
        dgs = p * (dvg - row_dD[None, :])
        if DQ or DK:
            row_m = _row_numbers(m + moved * T, start, T, 0.0, M)
            row_D = _row_numbers(D + head * T, start, T, 0.0, M)
            gs = p * (vg - row_D[None, :])
            dgs += gs * (scale * ds - row_m[None, :])
            if DQ:
                sum_dgk = _gather(gs, dq, start, T, column, sum_dgk, WQ, WIDE, PRECISION)
        sum_dgk = _gather(dgs, q, start, T, column, sum_dgk, WQ, WIDE, PRECISION)
    _store_rows(dgk + moved * S * WQ, scale * sum_dgk, first, S, column, WQ)


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
    head, first, tangent, part = _place(S, tangents, N, PARTS)
    moved = tangent * B + head
    q, dq = q + head * T * WQ, dq + moved * T * WQ
    k, dk = k + head * S * WQ, dk + moved * S * WQ
    i, j = tl.arange(0, M), tl.arange(0, N)
    column = part * PART
    sum_dgv = tl.zeros([N, PART], tl.float32)
    begin = first // M * M if CAUSAL else 0
    for start in range(begin, T, M):
        s, ds = _products(k, dk, q, dq, first, start, S, T, True, DK, DQ, WQ, N, M, CHUNK, WIDE, PRECISION)
        s = _seen(scale * s, start, i[None, :], first, j[:, None], T, S, mask + head * mb, mt, ms, MASKED, CAUSAL)
        row_lse = _row_numbers(lse + head * T, start, T, float("inf"), M)
        p = tl.exp(s - row_lse[None, :])
        sum_dgv = _gather(p, dg + moved * T * WV, start, T, column, sum_dgv, WV, WIDE, PRECISION)
        if DQ or DK:
            row_m = _row_numbers(m + moved * T, start, T, 0.0, M)
            dp = p * (scale * ds - row_m[None, :])
            sum_dgv = _gather(dp, g + head * T * WV, start, T, column, sum_dgv, WV, WIDE, PRECISION)
    _store_rows(dgv + moved * S * WV, sum_dgv, first, S, column, WV)


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
    _, first, tangent, _part = _place(rows, tangents, M, 1)
    total = _inner(a + tangent * rows * W, b, first, rows, W, M)
    if PAIRS == 2:
        total += _inner(c + tangent * rows * W, d, first, rows, W, M)
    i = first + tl.arange(0, M)
    tl.store(out + tangent * rows + i, total, mask=i < rows)


@triton.jit
def _inner(a, b, first, rows, W: tl.constexpr, M: tl.constexpr):
    tile_a = _rows(a, first, rows, 0, W, M, padded(W), True)
    return tl.sum(tile_a * _rows(b, first, rows, 0, W, M, padded(W), True), 1)
