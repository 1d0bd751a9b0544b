"""What the attention kernels are made of: a program's place, blocks of rows, products of blocks, the mask.

Operands are read anew, CHUNK columns at a time; see ``attention_kernels``.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def padded(width):
    """What tl.arange and tl.dot take instead of a head width."""
    return max(16, triton.next_power_of_2(width))


@triton.constexpr_function
def divides(part, width):
    """Whether blocks of columns end where the width does."""
    return width % part == 0


@triton.jit
def place(length, tangents, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Head, first row, tangent and part of a program: what reads the same primal runs at about the same time."""
    pid = tl.program_id(0)
    part, pid = pid % PARTS, pid // PARTS
    tangent, pid = pid % tangents, pid // tangents
    blocks = (length + BLOCK - 1) // BLOCK
    return (pid // blocks).to(tl.int64), (pid % blocks) * BLOCK, tangent.to(tl.int64), part


@triton.jit
def rows(x, first, length, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """A block of ``[length, WIDTH]``, zero outside. WIDE: in float32, since the interpreter cannot compute in bf16."""
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = i < length - first
    if not divides(COLUMNS, WIDTH):
        inside = inside & (j < WIDTH - column)
    # 64 bits in the scalar part alone: address registers are what these kernels run out of
    tile = tl.load(x + tl.full([], first, tl.int64) * WIDTH + column + (i * WIDTH + j), mask=inside, other=0.0)
    if WIDE:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_rows(x, tile, first, length, column, WIDTH: tl.constexpr):
    """Write a block of ``[length, WIDTH]``, in x's dtype; nothing outside."""
    i, j = tl.arange(0, tile.shape[0])[:, None], tl.arange(0, tile.shape[1])[None, :]
    to = x + first.to(tl.int64) * WIDTH + column + (i * WIDTH + j)
    tl.store(to, tile.to(x.dtype.element_ty), mask=(i < length - first) & (j < WIDTH - column))


@triton.jit
def row_numbers(x, first, length, other, ROWS: tl.constexpr):
    """A number for each row, ``other`` past the last one."""
    i = tl.arange(0, ROWS)
    return tl.load(x + first + i, mask=i < length - first, other=other)


@triton.jit
def products(
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
            tile_b = tl.trans(rows(b, first_b, rows_b, column, WIDTH, B, CHUNK, WIDE))
        if AB or DB:
            tile_a = rows(a, first_a, rows_a, column, WIDTH, A, CHUNK, WIDE)
        if AB:
            ab = tl.dot(tile_a, tile_b, ab, input_precision=PRECISION)
        if DA:
            tile_da = rows(da, first_a, rows_a, column, WIDTH, A, CHUNK, WIDE)
            dab = tl.dot(tile_da, tile_b, dab, input_precision=PRECISION)
        if DB:
            tile_db = tl.trans(rows(db, first_b, rows_b, column, WIDTH, B, CHUNK, WIDE))
            dab = tl.dot(tile_a, tile_db, dab, input_precision=PRECISION)
    return ab, dab


@triton.jit
def gather(p, x, first, length, column, total, WIDTH: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """``total + p x`` over a block of rows of x, for the columns that total has."""
    tile = rows(x, first, length, column, WIDTH, p.shape[1], total.shape[1], WIDE)
    return tl.dot(p.to(tile.dtype), tile, total, input_precision=PRECISION)


@triton.jit
def seen(s, first_i, i, first_j, j, T, S, mask, mt, ms, MASKED: tl.constexpr, CAUSAL: tl.constexpr):
    """Add the mask; -inf where query i does not see key j or either is not there. i and j count from their firsts."""
    inside = (i < T - first_i) & (j < S - first_j)
    if CAUSAL:
        inside = inside & (j - i <= first_i - first_j)
    if MASKED:
        block = mask + tl.full([], first_i, tl.int64) * mt + tl.full([], first_j, tl.int64) * ms
        s += tl.load(block + (i * mt + j * ms), mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, s, float("-inf"))
