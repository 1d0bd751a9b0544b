"""Triton version of ``kernels.embedding``: tokens gather their rows; rows add up their tokens, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 16  # read at a time, so that enough loads are under way
COLUMNS = 128


def columns(D: int) -> int:
    """Return the width of a tile; wider rows have several programs."""
    return min(COLUMNS, triton.next_power_of_2(D))


def warps(width: int) -> int:
    """Return the warps for a tile so wide: 16 numbers a thread."""
    return max(1, TOKENS * width // 512)


@triton.jit
def _gather(
    tables,  # [k, rows, D]
    index,  # [tokens]
    out,  # [k, tokens, D]
    k,
    rows,
    tokens,
    D,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    across = tl.cdiv(D, BLOCK)
    token = tl.cast(tl.program_id(0) // across, tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (token < tokens) & (column < D)
    source = tl.load(index + token, mask=token < tokens, other=0) * D + column
    target = token * D + column
    for _ in range(k):
        tl.store(out + target, tl.load(tables + source, mask=inside), mask=inside)
        tables += tl.cast(rows, tl.int64) * D
        out += tl.cast(tokens, tl.int64) * D


@triton.jit
def _add_up(
    g,  # [k, tokens, D]
    order,  # [tokens]: the tokens, row by row of the table, and those of a row in their order
    starts,  # [rows + 1]: where each row's tokens start in order
    out,  # [k, rows, D]
    k,
    rows,
    tokens,
    D,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    across = tl.cdiv(D, BLOCK)
    row = tl.cast(tl.program_id(0) // across, tl.int64)
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)[None, :]
    start, end = tl.load(starts + row), tl.load(starts + row + 1)
    to = out + row * D + column
    for _ in range(k):
        sums = tl.zeros((TOKENS, BLOCK), tl.float32)
        at = start
        while at < end:
            place = at + tl.arange(0, TOKENS)[:, None]
            token = tl.load(order + place, mask=place < end, other=0)
            inside = (place < end) & (column < D)
            sums += tl.load(g + token * D + column, mask=inside, other=0.0).to(tl.float32)
            at += TOKENS
        tl.store(to, tl.sum(sums, 0)[None, :].to(out.dtype.element_ty), mask=column < D)
        g += tl.cast(tokens, tl.int64) * D
        to += tl.cast(rows, tl.int64) * D


def embedding(tables: Tensor, index: Tensor) -> Tensor:
    """See ``kernels.embedding``."""
    k, rows, D = tables.shape
    tokens, block = index.numel(), columns(D)
    out = tables.new_empty(k, tokens, D)
    _gather[(triton.cdiv(tokens, TOKENS) * triton.cdiv(D, block),)](
        tables.contiguous(),
        index.contiguous(),
        out,
        k,
        rows,
        tokens,
        D,
        TOKENS=TOKENS,
        BLOCK=block,
        num_warps=warps(block),
    )
    return out


def embedding_backward(g: Tensor, index: Tensor, rows: int) -> Tensor:
    """See ``kernels.embedding``."""
    k, tokens, D = g.shape
    block = columns(D)
    sorted_index, order = torch.sort(index, stable=True)
    starts = torch.searchsorted(sorted_index, torch.arange(rows + 1, device=g.device))
    out = g.new_empty(k, rows, D)
    _add_up[(rows * triton.cdiv(D, block),)](
        g.contiguous(),
        order,
        starts,
        out,
        k,
        rows,
        tokens,
        D,
        TOKENS=TOKENS,
        BLOCK=block,
        num_warps=warps(block),
    )
    return out
