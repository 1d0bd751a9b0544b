"""``kernels.attention`` in plain torch, some heads and queries at a time: no tensor has T times S elements per head.

A constant of a row enters its products as one more column: [q, -lse] [k, 1]' = q k' - lse costs one part in d more
than q k', while subtracting lse afterwards would be a pass over the block. D, m and dD enter in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from ..precision import wide
from ..saved import Heads

ROWS = 128  # queries of a block: causal blocks reach that far over the diagonal
ELEMENTS = 1 << 19  # scores of a block, over its heads: a few such blocks fit into the caches


class Block(NamedTuple):
    """Some heads, some of their queries, and the keys that these may see."""

    heads: slice
    rows: slice
    keys: slice
    shape: tuple[int, int, int]


class Blocks:
    """The blocks of the scores ``q k'``, and the memory that all of them share.

    Args:
        q: ``[B, T, d]``, scaled; k ``[B, S, d]``.
        mask: added to the scores, broadcasting to ``[B, T, S]``; causal: and -inf above the diagonal.
        buffers: how many blocks are held at a time.
    """

    def __init__(self, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, buffers: int) -> None:
        (B, T, _), S = q.shape, k.shape[1]
        self._q, self._k, self._causal = q, k, causal
        # Expanded and not copied: a block adds a slice of it.
        self._mask = None if mask is None else mask.expand(B, T, S)
        # Whole rows of scores, so that sums over keys are complete within a block; heads are added while they fit.
        self._rows = max(1, min(ROWS, T))
        self._heads = max(1, min(B, ELEMENTS // max(1, self._rows * S)))
        # Allocated once: blocks are as large as caches, and fresh memory of that size costs page faults.
        self._memory = [q.new_empty(self._heads * self._rows * S) for _ in range(buffers)]
        # One triangle serves every block on the diagonal; all blocks but these are cut off by ``keys`` alone.
        self._future = q.new_full((self._rows, self._rows), -math.inf).triu_(1) if causal else None

    def __iter__(self) -> Iterator[Block]:
        (B, T, _), S = self._q.shape, self._k.shape[1]
        if not S:
            return
        for head in range(0, B, self._heads):
            for row in range(0, T, self._rows):
                heads, rows = slice(head, min(head + self._heads, B)), slice(row, min(row + self._rows, T))
                # Keys behind the block's last query are forbidden to all of it: nearly half of the work.
                stop = min(rows.stop, S) if self._causal else S
                yield Block(heads, rows, slice(0, stop), (heads.stop - head, rows.stop - row, stop))

    def product(self, buffer: int, block: Block, a: Tensor, b: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return the block of ``a b'`` in a buffer's memory, or add it to a block."""
        left, right = a[block.heads, block.rows], b[block.heads, block.keys].mT
        if onto is not None:
            return onto.baddbmm_(left, right)
        # A view of the front part: the last block and causal ones are smaller.
        return torch.bmm(left, right, out=self._memory[buffer][: math.prod(block.shape)].view(block.shape))

    def scores(self, buffer: int, block: Block) -> Tensor:
        """Return the block of the scores."""
        S = self.product(buffer, block, self._q, self._k)
        if self._mask is not None:
            S.add_(self._mask[block.heads, block.rows, block.keys])
        ahead = block.keys.stop - block.rows.start  # keys from the block's first query on
        if self._future is not None and ahead > 0:
            S[..., -ahead:].add_(self._future[: block.shape[1], :ahead])
        return S


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Heads:
    """See ``kernels.attention``."""
    values = wide(v)
    blocks = Blocks(wide(q) * scale, wide(k), mask, causal, 1)
    # as without keys, when there is no block
    o, lse = values.new_zeros(*q.shape[:2], v.shape[2]), values.new_full(q.shape[:2], math.inf)
    for block in blocks:
        heads, rows, keys, _ = block
        S = blocks.scores(0, block)
        # The maximum of the whole row is in the block, so that no running maximum has to be corrected.
        top = S.amax(-1, keepdim=True)
        top.masked_fill_(top == -math.inf, 0.0)  # a row that sees nothing: no inf - inf
        total = S.sub_(top).exp_().sum(-1, keepdim=True)
        blind = total == 0
        # Divided after the product: e columns instead of S.
        o[heads, rows].baddbmm_(S, values[heads, keys]).div_(total.masked_fill(blind, 1.0))
        lse[heads, rows] = total.log_().add_(top).masked_fill_(blind, math.inf)[..., 0]
    return Heads(q, k, v, o.to(q.dtype), lse, mask, causal, scale)


def attention_tangent(h: Heads, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``kernels.attention``."""
    count = next(d for d in (dq, dk, dv) if d is not None).shape[0]
    blocks = _probabilities(h, 2)
    # The scale goes into q and dq, and so comes with every product that they are in.
    q, k, v, o = wide(h.q) * h.scale, wide(h.k), wide(h.v), wide(h.o)
    vectors = _vectors(count, None if dq is None else wide(dq) * h.scale, dk, dv)
    do, m = o.new_zeros(count, *o.shape), o.new_zeros(count, *o.shape[:2])
    for block in blocks:
        heads, rows, keys, _ = block
        P = blocks.scores(0, block).exp_()
        # All vectors while P is in the cache: the exponentials are the expensive part.
        for i, (dqi, dki, dvi) in enumerate(vectors):
            part, along = do[i, heads, rows], m[i, heads, rows]
            dS = None if dqi is None else blocks.product(1, block, dqi, k)
            if dki is not None:
                dS = blocks.product(1, block, q, dki, onto=dS)
            if dS is not None:
                along.copy_(dS.mul_(P).sum(-1))
                # do = (P dS) v - m o + P dv: with o at hand, P (dS - m) needs no pass of its own.
                part.baddbmm_(dS, v[heads, keys]).addcmul_(o[heads, rows], along[..., None], value=-1)
            if dvi is not None:
                part.baddbmm_(P, dvi[heads, keys])
    return do.to(h.q.dtype), m


def attention_backward(h: Heads, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ``kernels.attention``."""
    blocks = _probabilities(h, 2)
    q, k, g = wide(h.q) * h.scale, wide(h.k), wide(g)
    # [g, -D] [v, 1]' = g v' - D
    v_1, g_D = _beside(wide(h.v), 1.0), _beside(g, -(g * wide(h.o)).sum(-1))
    gq, gk, gv = (g.new_zeros(g.shape[0], *t.shape) for t in (h.q, h.k, h.v))
    for block in blocks:
        heads, rows, keys, _ = block
        P = blocks.scores(0, block).exp_()
        for i in range(g.shape[0]):
            gS = blocks.product(1, block, g_D[i], v_1).mul_(P)
            # k is not scaled, so the factor stands here; the next line has it in q.
            gq[i, heads, rows].baddbmm_(gS, k[heads, keys], alpha=h.scale)
            gk[i, heads, keys].baddbmm_(gS.mT, q[heads, rows])
            gv[i, heads, keys].baddbmm_(P.mT, g[i, heads, rows])
    return gq.to(h.q.dtype), gk.to(h.q.dtype), gv.to(h.q.dtype)


def attention_backward_tangent(
    h: Heads,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    do: Tensor,
    m: Tensor,
    g: Tensor,
    dg: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``kernels.attention``. Of a block, with U = dS - m: dP = P U, dgS = P (dg v' + g dv' - dD) + U gS."""
    blocks = _probabilities(h, 4)
    q, k, v, o, g, dg = wide(h.q) * h.scale, wide(h.k), wide(h.v), wide(h.o), wide(g), wide(dg)
    dD = (dg * o).sum(-1).add_((g * wide(do)).sum(-1))
    k_1, v_1, g_D, dg_dD = _beside(k, 1.0), _beside(v, 1.0), _beside(g, -(g * o).sum(-1)), _beside(dg, -dD)
    moves = dq is not None or dk is not None  # else U = 0
    dq = None if dq is None else wide(dq) * h.scale
    dq_m = _beside(q.new_zeros(dg.shape[0], *q.shape) if dq is None else dq, -m) if moves else None
    vectors = _vectors(dg.shape[0], dq, dk, dv)
    dgq, dgk, dgv = (g.new_zeros(dg.shape[0], *t.shape) for t in (h.q, h.k, h.v))
    for block in blocks:
        heads, rows, keys, _ = block
        P = blocks.scores(0, block).exp_()
        # Without moving scores gS meets nothing; P stands in for it and is not read.
        gS = blocks.product(1, block, g_D, v_1).mul_(P) if moves else P
        for i, (dqi, dki, dvi) in enumerate(vectors):
            to_q, to_k, to_v = dgq[i, heads, rows], dgk[i, heads, keys], dgv[i, heads, keys]
            dgS = blocks.product(2, block, dg_dD[i], v_1)
            if dvi is not None:
                dgS = blocks.product(2, block, g, dvi, onto=dgS)
            dgS.mul_(P)
            if dq_m is not None:
                U = blocks.product(3, block, dq_m[i], k_1)
                if dki is not None:
                    U = blocks.product(3, block, q, dki, onto=U)
                    to_q.baddbmm_(gS, dki[heads, keys], alpha=h.scale)
                if dqi is not None:
                    to_k.baddbmm_(gS.mT, dqi[heads, rows])
                # dP (g v' - D) = P U (g v' - D) = U gS
                dgS.addcmul_(U, gS)
                # The last use of U: its memory becomes dP.
                to_v.baddbmm_(U.mul_(P).mT, g[heads, rows])
            to_q.baddbmm_(dgS, k[heads, keys], alpha=h.scale)
            to_k.baddbmm_(dgS.mT, q[heads, rows])
            to_v.baddbmm_(P.mT, dg[i, heads, rows])
    return dgq.to(h.q.dtype), dgk.to(h.q.dtype), dgv.to(h.q.dtype)


def _probabilities(h: Heads, buffers: int) -> Blocks:
    """Return blocks whose exponentials are the probabilities; of a row that sees nothing, zeros."""
    # Where lse is +inf, the scores are -inf and their exponentials zero, as they should be.
    return Blocks(_beside(wide(h.q) * h.scale, -h.lse), _beside(wide(h.k), 1.0), h.mask, h.causal, buffers)


def _beside(t: Tensor, column: Tensor | float) -> Tensor:
    """``[..., d]`` and ``[...]`` to ``[..., d + 1]``."""
    last = t.new_full(t.shape[:-1], column) if isinstance(column, float) else column
    return torch.cat([t, last[..., None]], -1)


def _vectors(count: int, *tangents: Tensor | None) -> list[tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Return one tuple of tangents for each vector."""
    return list(zip(*(repeat(None, count) if d is None else wide(d) for d in tangents), strict=True))
