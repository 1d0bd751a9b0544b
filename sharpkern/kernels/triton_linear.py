"""Triton version of ``kernels.linear``: one program per tile of one tangent's result, two K loops, one accumulator."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import interpreted


class Tiles(NamedTuple):
    """A launch configuration: the result's tile is m x n, the products advance by k."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# By precision of the products; none of these spills on sm_80, sm_90 or sm_100 (tests/kernels_triton).
CONFIGURATIONS = {
    "16bit": {
        "large": Tiles(128, 128, 64, 8, 3),
        "medium": Tiles(64, 64, 64, 4, 4),
        "few rows": Tiles(16, 128, 64, 4, 4),
        "few columns": Tiles(128, 16, 64, 4, 4),
    },
    "tf32": {
        "large": Tiles(128, 64, 32, 8, 3),
        "medium": Tiles(64, 64, 32, 4, 3),
        "few rows": Tiles(16, 64, 32, 4, 3),
        "few columns": Tiles(64, 16, 32, 4, 3),
    },
    # without tensor cores: larger tiles would need more registers than a thread has
    "ieee": {
        "large": Tiles(64, 64, 32, 4, 3),
        "medium": Tiles(64, 64, 32, 4, 3),
        "few rows": Tiles(16, 64, 32, 4, 3),
        "few columns": Tiles(64, 16, 32, 4, 3),
    },
}
GROUP = 8  # rows of tiles that are finished together, so that they find the same columns of b and d in the L2 cache
_BUSY = 256  # programs that keep a data-centre GPU, with 108 to 148 multiprocessors, busy


def tiles(k: int, M: int, N: int, dtype: torch.dtype) -> Tiles:
    """Choose the tiles for ``k`` results ``[M, N]``: large ones if that still leaves work for the whole GPU."""
    choice = CONFIGURATIONS[precision(dtype) if dtype == torch.float32 else "16bit"]
    if M <= 16:
        return choice["few rows"]
    if N <= 16:
        return choice["few columns"]
    large = choice["large"]
    programs = k * triton.cdiv(M, large.m) * triton.cdiv(N, large.n)
    return large if programs >= _BUSY else choice["medium"]


def precision(dtype: torch.dtype) -> str:
    """Return the ``input_precision`` of ``tl.dot``: TF32 exactly where torch's own products use it."""
    # unlike allow_tf32, this can be read whichever of torch's interfaces the user has set the precision with
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and dtype == torch.float32 and not interpreted() else "ieee"


@triton.jit
def _add_product(
    acc,  # [BM, BN]
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
    ks = tl.arange(0, BK)
    step = tl.full((), BK, tl.int64)
    a += row.to(tl.int64) * a_row
    b += col.to(tl.int64) * b_col
    i = tl.arange(0, BM)
    j = tl.arange(0, BN)
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
def _dual_gemm(
    a,  # [k, M, K], any strides
    b,  # [k, K, N], any strides
    c,  # [k, M, L], any strides
    d,  # [k, L, N], any strides
    bias,  # [k, N]
    slope,  # [M, N]
    curvature,  # [M, N]
    dz,  # [k, M, N]
    out,  # [k, M, N]
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
    HAS_SECOND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    CURVED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    INDEX: tl.constexpr,
    GROUP: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The tangents of one tile are neighbours, for they share the primal's tiles; then go the tiles of one group of
    # rows, column by column.
    at = tl.program_id(0)
    t = (at % k).to(tl.int64)
    tile = at // k
    group = GROUP * tl.cdiv(N, BN)
    first = tile // group * GROUP
    height = tl.minimum(tl.cdiv(M, BM) - first, GROUP)
    row = (first + tile % group % height) * BM
    col = tile % group // height * BN

    acc = tl.zeros((BM, BN), tl.float32)
    acc = _add_product(
        acc,
        a + t * a_k,
        a_row,
        a_col,
        b + t * b_k,
        b_row,
        b_col,
        row,
        col,
        M,
        N,
        K,
        BM,
        BN,
        BK,
        INDEX,
        WIDEN,
        PRECISION,
    )
    if HAS_SECOND:
        acc = _add_product(
            acc,
            c + t * c_k,
            c_row,
            c_col,
            d + t * d_k,
            d_row,
            d_col,
            row,
            col,
            M,
            N,
            L,
            BM,
            BN,
            BK,
            INDEX,
            WIDEN,
            PRECISION,
        )

    i = tl.arange(0, BM)
    j = tl.arange(0, BN)
    inside = (i < M - row)[:, None] & (j < N - col)[None, :]
    at = i.to(INDEX)[:, None] * N + j[None, :]
    tile = row.to(tl.int64) * N + col
    tile_k = t * M * N + tile
    if HAS_BIAS:
        acc += tl.load(bias + (t * N + col) + j, mask=j < N - col, other=0.0).to(tl.float32)[None, :]
    if HAS_SLOPE:
        acc *= tl.load(slope + tile + at, mask=inside, other=0.0).to(tl.float32)
    if CURVED:
        curve = tl.load(curvature + tile + at, mask=inside, other=0.0).to(tl.float32)
        acc += curve * tl.load(dz + tile_k + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + tile_k + at, acc.to(out.dtype.element_ty), mask=inside)


def dual_gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    d: Tensor | None = None,
    bias: Tensor | None = None,
    slope: Tensor | None = None,
    curvature: Tensor | None = None,
    dz: Tensor | None = None,
) -> Tensor:
    """See ``kernels.linear``."""
    k = (a if a.ndim == 3 else b).shape[0]
    (M, K), N = a.shape[-2:], b.shape[-1]
    second, curved = c is not None and d is not None, curvature is not None and dz is not None
    if not second:
        c, d = a, b  # never read, as the other operands that stand in for absent ones
    out = a.new_empty(k, M, N)
    size = tiles(k, M, N, a.dtype)
    _dual_gemm[(k * triton.cdiv(M, size.m) * triton.cdiv(N, size.n),)](
        a,
        b,
        c,
        d,
        a if bias is None else bias.contiguous(),
        a if slope is None else slope.contiguous(),
        curvature.contiguous() if curved else a,
        dz.contiguous() if curved else a,
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
        HAS_SECOND=second,
        HAS_BIAS=bias is not None,
        HAS_SLOPE=slope is not None,
        CURVED=curved,
        BM=size.m,
        BN=size.n,
        BK=size.k,
        INDEX=tl.int32,
        GROUP=GROUP,
        WIDEN=interpreted(),
        PRECISION=precision(a.dtype),
        num_warps=size.warps,
        num_stages=size.stages,
    )
    return out


def _strides(t: Tensor) -> tuple[int, ...]:
    """Return the strides by tangent, row and column; all tangents read the same shared operand."""
    return t.stride() if t.ndim == 3 else (0, *t.stride())
