"""Scaled dot-product attention: the probabilities are kept where they are small, and formed block by block elsewhere.

S = scale q k' + mask,  P = softmax(S) (times dropout's mask D),  o = P v
tangent:           dS = scale (dq k' + q dk'),  dP = P (dS - <P, dS>),  do = dP v + P dv
backward:          gP = g v',  gS = P (gP - <P, gP>),  gq = scale gS k,  gk = scale gS' q,  gv = P' g
backward tangent:  the product rule on each, with d(gS) = dP (gP - <P, gP>) + P (dgP - <dP, gP> - <P, dgP>)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...kernels.attention import attention, attention_backward, attention_backward_tangent, attention_tangent
from ..rule import Rule, align, reduce_to, rule
from .fallback import UnsupportedOpError

aten = torch.ops.aten
Cotangents = tuple[Tensor | None, Tensor | None, Tensor | None]

# On the CPU, scores of a head up to which keeping them is faster than forming them again: the point where one vector
# loses as much as a block of four gains. Blocks skip what causal attention masks. All heads: 64 MiB of float32.
MAX_KEPT_OF_HEAD = 512 * 512
MAX_KEPT_OF_CAUSAL_HEAD = 256 * 256
MAX_KEPT = 1 << 24


@rule(aten.scaled_dot_product_attention.default)
class Attention(Rule):
    """Attention over ``[..., T, d]`` queries, keys and values; boolean, float and causal masks, grouped queries."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        dropout: float = 0.0,
        causal: bool = False,
        scale: float | None = None,
        grouped: bool = False,
    ) -> Tensor:
        """Choose a way, and let it save what it needs."""
        if len(self.needs) > 3 and self.needs[3]:
            # Programs do not get here: ``decompositions`` takes such attention apart.
            raise UnsupportedOpError("scaled_dot_product_attention with a mask that depends on the parameters.")
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        self.groups = q.shape[-3] // k.shape[-3] if grouped else 1
        self.shapes = (q.shape, k.shape, v.shape)
        # Copied per query head: the products below are then plain batched ones. The group is summed in ``_shrink``.
        k, v = self._repeat(k), self._repeat(v)
        self.rank = max(q.ndim, k.ndim, v.ndim)
        q, k, v = (t[(None,) * (self.rank - t.ndim)] for t in (q, k, v))  # batch dimensions may broadcast
        self.way: Kept | Blocked
        # Blocks would have to draw the same mask again in every sweep, so dropout keeps its probabilities.
        if dropout > 0.0 or _small(q, k, causal):
            self.way = Kept(scale, self.needs)
            o = self.way.forward(q, k, v, mask, dropout, causal)
        else:
            self.way = Blocked(scale)
            o = self.way.forward(q, k, v, mask, causal)
        return o

    def _repeat(self, t: Tensor) -> Tensor:
        return t if self.groups == 1 else t.repeat_interleave(self.groups, -3)

    def _shrink(self, gs: Cotangents) -> tuple[Tensor | None, ...]:
        """Sum over the queries of a group and over broadcast dimensions."""
        results: list[Tensor | None] = []
        for position, g in enumerate(gs):
            if g is not None and position and self.groups > 1:
                # The adjoint of ``repeat_interleave``: the queries of a group are neighbours.
                g = g.unflatten(-3, (-1, self.groups)).sum(-3)
            results.append(None if g is None else reduce_to(g, self.shapes[position]))
        return (*results, None)[: len(self.needs)]

    def tangent(self, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, *_: None) -> Tensor:
        """Return ``dP v + P dv``."""
        dk, dv = (None if d is None else self._repeat(d) for d in (dk, dv))
        return self.way.tangent(*(None if d is None else align(d, self.rank) for d in (dq, dk, dv)))

    def backward(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the cotangents of q, k, v."""
        return self._shrink(self.way.backward(g))

    def prepare(self, g: Tensor) -> None:
        """Compute what depends on g alone."""
        self.way.prepare(g)

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the tangents of the cotangents."""
        return self._shrink(self.way.backward_tangent(dg, g))

    def forget_tangents(self) -> None:
        """Free what the way in use has saved."""
        # They are attributes of the way, not of the rule, whose own list is empty.
        for name in self.way.freed_after_reverse:
            setattr(self.way, name, None)


def _small(q: Tensor, k: Tensor, causal: bool) -> bool:
    """Whether keeping the probabilities is faster; never on a GPU, where forming them costs no traffic."""
    scores = q.shape[-2] * k.shape[-2]
    heads = math.prod(torch.broadcast_shapes(q.shape[:-2], k.shape[:-2]))
    limit = MAX_KEPT_OF_CAUSAL_HEAD if causal else MAX_KEPT_OF_HEAD
    return not q.is_cuda and scores <= limit and heads * scores <= MAX_KEPT


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a mask adds to the scores: 0 or -inf for a boolean one."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)


class Kept:
    """Keeps P, dP and ``gP - <P, gP>``, ``[..., T, S]``: the fewest operations, and most memory."""

    freed_after_reverse = ("dq", "dk", "dv", "dP")

    def __init__(self, scale: float, needs: tuple[bool, ...]) -> None:
        self.scale, self.needs = scale, needs

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool) -> Tensor:
        """Return o ``[..., T, e]`` and keep P, dropout's mask and the operands."""
        self.q, self.k, self.v = q, k, v
        # q is scaled and not the scores: d numbers for each query instead of one for each key.
        scores = torch.matmul(q * self.scale, k.mT)
        if causal:
            keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
            scores.masked_fill_(~keep, -math.inf)
        if mask is None:
            # Every query sees at least one key, also in causal attention.
            self.P = P = torch.softmax(scores, -1)
        else:
            # Added and not filled in, as torch does: a NaN stays one, also where it is hidden.
            scores = scores + _added(mask, q.dtype)
            # A row that may attend to nothing gives zero. One with a NaN is no such row: its maximum is NaN.
            hidden = scores.amax(-1, keepdim=True) == -math.inf
            self.P = P = torch.softmax(scores, -1).masked_fill_(hidden, 0)
        self.D = None
        if dropout > 0.0:
            # Drawn as torch's own attention draws it, so that one seed gives both the same mask.
            self.D = torch.empty_like(P).bernoulli_(1 - dropout).div_(1 - dropout)
        return torch.matmul(self._drop(P), v)

    def _drop(self, P: Tensor) -> Tensor:
        return P if self.D is None else P * self.D

    def _along(self, P: Tensor, u: Tensor) -> Tensor:
        return (P * u).sum(-1, keepdim=True)

    def tangent(self, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None) -> Tensor:
        """Return ``dP v + P dv`` ``[k, ..., T, e]``; None where nothing moves."""
        self.dq, self.dk, self.dv = dq, dk, dv
        dS = None if dq is None else torch.matmul(dq * self.scale, self.k.mT)
        if dk is not None:
            other = torch.matmul(self.q * self.scale, dk.mT)
            # In place here and below: the results of a product are fresh.
            dS = other if dS is None else dS.add_(other)
        # dP = P (dS - <P, dS>), in the memory of dS. The scores themselves are not needed again.
        self.dP = None if dS is None else dS.sub_(self._along(self.P, dS)).mul_(self.P)
        do = None if self.dP is None else torch.matmul(self._drop(self.dP), self.v)
        if dv is not None:
            other = torch.matmul(self._drop(self.P), dv)
            do = other if do is None else do.add_(other)
        assert do is not None
        return do

    def _inner(self, g: Tensor) -> Tensor:
        """Return ``gP - <P, gP>``, so that ``gS = P`` times it."""
        # Dropout scales P behind the softmax, so its mask comes with the cotangent of the dropped P.
        gP = self._drop(torch.matmul(g, self.v.mT))
        return gP - self._along(self.P, gP)

    def backward(self, g: Tensor) -> Cotangents:
        """Return the cotangents of q, k and v where needed, for g ``[k, ..., T, e]``."""
        gq = gk = gv = None
        if self.needs[0] or self.needs[1]:
            gS = self._inner(g).mul_(self.P).mul_(self.scale)
            gq = torch.matmul(gS, self.k) if self.needs[0] else None
            gk = torch.matmul(gS.mT, self.q) if self.needs[1] else None
        if self.needs[2]:
            gv = torch.matmul(self._drop(self.P).mT, g)
        return gq, gk, gv

    def prepare(self, g: Tensor) -> None:
        """Keep ``gP - <P, gP>`` ``[1, ..., T, S]``."""
        if self.needs[0] or self.needs[1]:
            # Once for all products: it depends on g, v and P alone.
            self.inner = self._inner(g)

    def backward_tangent(self, dg: Tensor, g: Tensor) -> Cotangents:
        """Return the tangents of the cotangents of q, k and v where needed."""
        dgq = dgk = dgv = None
        if self.needs[0] or self.needs[1]:
            dgS = self._score_cotangent_tangent(dg, g)
            gS = self.inner * self.P * self.scale  # one pass each time, to keep one tensor less
            if self.needs[0]:
                dgq = torch.matmul(dgS, self.k)
                dgq = dgq if self.dk is None else dgq.add_(torch.matmul(gS, self.dk))
            if self.needs[1]:
                dgk = torch.matmul(dgS.mT, self.q)
                dgk = dgk if self.dq is None else dgk.add_(torch.matmul(gS.mT, self.dq))
        if self.needs[2]:
            dgv = torch.matmul(self._drop(self.P).mT, dg)
            dgv = dgv if self.dP is None else dgv.add_(torch.matmul(self._drop(self.dP).mT, g))
        return dgq, dgk, dgv

    def _score_cotangent_tangent(self, dg: Tensor, g: Tensor) -> Tensor:
        """Return ``d(gS)``, scaled."""
        dgP = torch.matmul(dg, self.v.mT)
        if self.dv is not None:
            dgP.add_(torch.matmul(g, self.dv.mT))
        # The mask is a constant of the primal, so it passes through the tangent.
        dgP = self._drop(dgP)
        dgS = dgP - self._along(self.P, dgP)
        if self.dP is None:
            return dgS.mul_(self.P).mul_(self.scale)
        # <dP, gP> = <dP, inner>, for the rows of dP sum to zero
        pair = self.dP * self.inner
        return dgS.sub_(pair.sum(-1, keepdim=True)).mul_(self.P).add_(pair).mul_(self.scale)


class Blocked:
    """Keeps one number per query, and forms the probabilities again in each sweep: ``kernels.attention``."""

    freed_after_reverse = ("dq", "dk", "dv", "do", "m")

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Return o ``[..., T, e]`` and keep it, the operands and ``lse`` of each query."""
        # The kernels have one batch dimension B: batch, heads and what broadcasts are folded into it.
        shapes = [t.shape[:-2] for t in (q, k, v, mask) if t is not None]
        self.batch = torch.broadcast_shapes(*shapes)
        q, k, v = (self._fold(t[None])[0] for t in (q, k, v))
        self.heads = attention(q, k, v, None if mask is None else self._mask(mask, q.dtype), causal, self.scale)
        return self._unfold(self.heads.o[None])[0]

    def _fold(self, t: Tensor) -> Tensor:
        """``[k, *broadcast, T, d]`` to ``[k, B, T, d]``."""
        t = align(t, len(self.batch) + 2)
        # Contiguous: a head is then a plain matrix. It costs a copy where the model transposes heads.
        return t.expand(t.shape[0], *self.batch, *t.shape[-2:]).reshape(t.shape[0], -1, *t.shape[-2:]).contiguous()

    def _unfold(self, t: Tensor) -> Tensor:
        return t.view(t.shape[0], *self.batch, *t.shape[-2:])

    def _mask(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a float mask ``[B or 1, T or 1, S or 1]``; one that varies over some batch dimensions is copied."""
        mask = _added(mask, dtype)
        if math.prod(mask.shape[:-2]) == 1:
            # One mask for all heads is not copied B times.
            return mask.reshape(1, *mask.shape[-2:])
        return self._fold(mask[None])[0]

    def tangent(self, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None) -> Tensor:
        """Return ``do`` ``[k, ..., T, e]``, and keep it with ``m = <P, dS>``."""
        self.dq, self.dk, self.dv = (None if d is None else self._fold(d) for d in (dq, dk, dv))
        self.do, self.m = attention_tangent(self.heads, self.dq, self.dk, self.dv)
        return self._unfold(self.do)

    def backward(self, g: Tensor) -> Cotangents:
        """Return the cotangents of q, k and v for g ``[k, ..., T, e]``."""
        # All three, whatever is needed: they share the scores, and the contract lets the others be ignored.
        gq, gk, gv = attention_backward(self.heads, self._fold(g))
        return self._unfold(gq), self._unfold(gk), self._unfold(gv)

    def prepare(self, g: Tensor) -> None:
        """Keep g as heads ``[B, T, e]``."""
        # Folded once for all products.
        self.g = self._fold(g)[0]

    def backward_tangent(self, dg: Tensor, g: Tensor) -> Cotangents:
        """Return the tangents of the cotangents of q, k and v."""
        dgq, dgk, dgv = attention_backward_tangent(
            self.heads, self.dq, self.dk, self.dv, self.do, self.m, self.g, self._fold(dg)
        )
        return self._unfold(dgq), self._unfold(dgk), self._unfold(dgv)
