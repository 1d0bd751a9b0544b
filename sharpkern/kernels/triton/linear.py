"""Triton version of ``kernels.linear``: one program per tile of one tangent's result, two K loops, one accumulator."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import interpreted
from ..precision import allows_tf32


class Tiles(NamedTuple):
    """A launch configuration: the result's tile is m x n, the products advance by k."""

    m: int
    n: int
    k: int
    warps: int


# By precision of the products. They spill on none of sm_80, sm_90 and sm_100; no GPU has measured them yet.
CONFIGURATIONS = {
    "16bit": {
        "large": Tiles(128, 128, 64, 8),
        "medium": Tiles(64, 64, 64, 8),
        "few rows": Tiles(16, 64, 32, 4),
        "few columns": Tiles(64, 16, 64, 4),
    },
    "tf32": {
        "large": Tiles(128, 64, 32, 8),
        "medium": Tiles(64, 64, 32, 4),
        "few rows": Tiles(16, 64, 32, 4),
        "few columns": Tiles(64, 16, 32, 4),
    },
    "ieee": {  # no tensor cores
        "large": Tiles(64, 128, 16, 8),  # of 64 x 64, ptxas aims at occupancy, and spills on sm_90
        "medium": Tiles(32, 64, 16, 4),
        "few rows": Tiles(16, 64, 32, 4),
        "few columns": Tiles(64, 16, 32, 4),
    },
}
GROUP = 8  # rows of tiles that are finished together, so that they find the same columns of b and d in the L2 cache
_BUSY = 256  # programs that keep a data-centre GPU, with 108 to 148 multiprocessors, busy
# Below this length, offsets within any of the tiles above fit in 32 bits; 64 bits would cost large tiles a spill.
_SHORT_STRIDE = 2**23


def tiles(k: int, M: int, N: int, dtype: torch.dtype, copied: bool) -> Tiles:
    """Choose the tiles of ``k`` results ``[M, N]``.

    They are large if that leaves work for the whole GPU and the operands can be copied to shared memory in vectors;
    if not, operands pass through registers, of which a large tile has none to spare.
    """
    choice = CONFIGURATIONS[precision(dtype) if dtype == torch.float32 else "16bit"]
    if M <= 16:
        return choice["few rows"]
    if N <= 16:
        return choice["few columns"]
    large = choice["large"]
    programs = k * triton.cdiv(M, large.m) * triton.cdiv(N, large.n)
    return large if copied and programs >= _BUSY else choice["medium"]


def precision(dtype: torch.dtype) -> str:
    """Return the ``input_precision`` of ``tl.dot``: TF32 exactly where torch's own products use it."""
    return "tf32" if dtype == torch.float32 and not interpreted() and allows_tf32() else "ieee"


@triton.jit
def _add_product(
    acc,  # [BM, BN], the tile from (row, col)
    a,  # [M, K], of this program's tangent
    a_row,
    a_col,
    b,  # [K, N], of this program's tangent
    b_row,
    b_col,
    row,
    col,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    INDEX: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # one 64-bit pointer to the tile and short offsets in it: a pointer to each entry would cost registers
    a += row.to(tl.int64) * a_row
    b += col.to(tl.int64) * b_col
    step = tl.full((), BK, tl.int64)
    i = tl.arange(0, BM)
    j = tl.arange(0, BN)
    ks = tl.arange(0, BK)
    a_at = i.to(INDEX)[:, None] * a_row + ks.to(INDEX)[None, :] * a_col
    b_at = ks.to(INDEX)[:, None] * b_row + j.to(INDEX)[None, :] * b_col
    in_a = (i < M - row)[:, None]
    in_b = (j < N - col)[None, :]
    for start in range(0, K, BK):
        inside = ks < K - start
        x = tl.load(a + a_at, mask=in_a & inside[None, :], other=0.0)
        y = tl.load(b + b_at, mask=inside[:, None] & in_b, other=0.0)
        if WIDEN:  # the interpreter cannot multiply bfloat16
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
        a += step * a_col
        b += step * b_row
    return acc


@triton.jit
def _place(k, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """A program's tangent, and the row and column at which its tile begins."""
    # The tangents of one tile are neighbours, for they share the primal's tiles; then go the tiles of one group of
    # rows, column by column.
    program = tl.program_id(0)
    tile = program // k
    group = GROUP * tl.cdiv(N, BN)
    first = tile // group * GROUP
    height = tl.minimum(tl.cdiv(M, BM) - first, GROUP)
    return (program % k).to(tl.int64), (first + tile % group % height) * BM, tile % group // height * BN


@triton.jit
def _dual_gemm(
    a,  # [k, M, K], any strides
    b,  # [k, K, N], any strides
    c,  # [k, M, L], any strides
    d,  # [k, L, N], any strides
    bias,  # [k, N]
    out,  # [k, M, N], any stride by tangent
    k,
    M,
    N,
    K,
    L,
    a_k,
    a_row,
    a_col,
    b_k,
    b_row,
    b_col,
    c_k,
    c_row,
    c_col,
    d_k,
    d_row,
    d_col,
    out_k,
    HAS_SECOND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    INDEX: tl.constexpr,
    GROUP: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    t, row, col = _place(k, M, N, BM, BN, GROUP)
    acc = tl.zeros((BM, BN), tl.float32)
    acc = _add_product(
        acc, a + t * a_k, a_row, a_col, b + t * b_k, b_row, b_col, row, col, M, N, K,
        BM, BN, BK, INDEX, WIDEN, PRECISION,
    )  # fmt: skip
    if HAS_SECOND:
        acc = _add_product(
            acc, c + t * c_k, c_row, c_col, d + t * d_k, d_row, d_col, row, col, M, N, L,
            BM, BN, BK, INDEX, WIDEN, PRECISION,
        )  # fmt: skip

    i = tl.arange(0, BM)
    j = tl.arange(0, BN)
    inside = (i < M - row)[:, None] & (j < N - col)[None, :]
    entry = i.to(INDEX)[:, None] * N + j[None, :]
    start = row.to(tl.int64) * N + col
    if HAS_BIAS:
        acc += tl.load(bias + (t * N + col) + j, mask=j < N - col, other=0.0).to(tl.float32)[None, :]
    tl.store(out + (t * out_k + start) + entry, acc.to(out.dtype.element_ty), mask=inside)


def dual_gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    d: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See ``kernels.linear``."""
    k = (a if a.ndim == 3 else b).shape[0]
    (M, K), N = a.shape[-2:], b.shape[-1]
    second = c is not None and d is not None
    if c is None or d is None:
        c, d = a, b  # never read, as the other operands that stand in for absent ones
    out = a.new_empty(k, M, N) if out is None else out
    factors = (a, b, c, d)
    short = max(N, *(s for f in factors for s in f.stride())) < _SHORT_STRIDE
    size = tiles(k, M, N, a.dtype, all(_copied(f) for f in factors))
    _dual_gemm[(k * triton.cdiv(M, size.m) * triton.cdiv(N, size.n),)](
        a,
        b,
        c,
        d,
        a if bias is None else bias.contiguous(),
        out,
        k,
        M,
        N,
        K,
        c.shape[-1],
        *_strides(a),
        *_strides(b),
        *_strides(c),
        *_strides(d),
        out.stride(0),
        HAS_SECOND=second,
        HAS_BIAS=bias is not None,
        BM=size.m,
        BN=size.n,
        BK=size.k,
        INDEX=tl.int32 if short else tl.int64,
        GROUP=GROUP,
        WIDEN=interpreted(),
        PRECISION=precision(a.dtype),
        num_warps=size.warps,
    )
    return out


def _strides(t: Tensor) -> tuple[int, ...]:
    """Return the strides by tangent, row and column; all tangents read the same shared operand."""
    return t.stride() if t.ndim == 3 else (0, *t.stride())


def _copied(t: Tensor) -> bool:
    """Whether a tile can be copied in vectors: Triton can tell that its rows or columns are contiguous and aligned."""
    row, col = t.stride()[-2:]
    along, across = (t.shape[-1], row) if col == 1 else (t.shape[-2], col)
    tangents = t.stride(0) if t.ndim == 3 else 0
    return 1 in (row, col) and all(n % 16 == 0 for n in (along, across, tangents, t.data_ptr()))
