"""Scaled dot-product attention with the probabilities kept.

S = scale q k' + mask,  P = softmax(S) (times dropout's mask D),  o = P v
tangent:           dS = scale (dq k' + q dk'),  dP = P (dS - <P, dS>),  do = dP v + P dv
backward:          gP = g v',  gS = P (gP - <P, gP>),  gq = scale gS k,  gk = scale gS' q,  gv = P' g
backward tangent:  the product rule on each, with d(gS) = dP (gP - <P, gP>) + P (dgP - <dP, gP> - <P, dgP>)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .fallback import UnsupportedOpError
from .rule import Rule, reduce_to, rule

aten = torch.ops.aten


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
        """Save q, k, v and the probabilities."""
        if len(self.needs) > 3 and self.needs[3]:
            raise UnsupportedOpError("scaled_dot_product_attention with a mask that depends on the parameters.")
        self.scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        self.groups = q.shape[-3] // k.shape[-3] if grouped else 1
        self.shapes = (q.shape, k.shape, v.shape)
        self.q, self.k, self.v = q, self._repeat(k), self._repeat(v)
        scores = torch.matmul(self.q * self.scale, self.k.mT)
        if causal:
            keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
            scores.masked_fill_(~keep, -math.inf)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        P = torch.softmax(scores, -1)
        if mask is not None:
            P = torch.nan_to_num(P, nan=0.0)  # a row that may attend to nothing gives zero
        self.P = P
        self.D = None
        if dropout > 0.0:
            self.D = (torch.rand_like(P) >= dropout).to(P.dtype) / (1 - dropout)
        self.g_seen: Tensor | None = None
        return torch.matmul(self._drop(P), self.v)

    def _drop(self, P: Tensor) -> Tensor:
        return P if self.D is None else P * self.D

    def _repeat(self, t: Tensor) -> Tensor:
        return t if self.groups == 1 else t.repeat_interleave(self.groups, -3)

    def _shrink(self, g: Tensor, position: int) -> Tensor:
        """Sum over the queries of a group and over broadcast dimensions."""
        if position and self.groups > 1:
            g = g.unflatten(-3, (-1, self.groups)).sum(-3)
        return reduce_to(g, self.shapes[position])

    def _along(self, P: Tensor, u: Tensor) -> Tensor:
        return (P * u).sum(-1, keepdim=True)

    def tangent(self, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, *_: None) -> Tensor:
        """Return ``dP v + P dv``."""
        self.dq, self.dk = dq, None if dk is None else self._repeat(dk)
        self.dv = None if dv is None else self._repeat(dv)
        dS = None if dq is None else torch.matmul(dq * self.scale, self.k.mT)
        if self.dk is not None:
            other = torch.matmul(self.q * self.scale, self.dk.mT)
            dS = other if dS is None else dS.add_(other)
        self.dP = None if dS is None else dS.sub_(self._along(self.P, dS)).mul_(self.P)
        do = None if self.dP is None else torch.matmul(self._drop(self.dP), self.v)
        if self.dv is not None:
            other = torch.matmul(self._drop(self.P), self.dv)
            do = other if do is None else do.add_(other)
        assert do is not None
        return do

    def _inner(self, g: Tensor) -> Tensor:
        """Return ``gP - <P, gP>``, so that ``gS = P`` times it."""
        gP = self._drop(torch.matmul(g, self.v.mT))
        return gP - self._along(self.P, gP)

    def backward(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the cotangents of q, k, v."""
        gq = gk = gv = None
        if self.needs[0] or self.needs[1]:
            gS = self._inner(g).mul_(self.P).mul_(self.scale)
            gq = self._shrink(torch.matmul(gS, self.k), 0) if self.needs[0] else None
            gk = self._shrink(torch.matmul(gS.mT, self.q), 1) if self.needs[1] else None
        if self.needs[2]:
            gv = self._shrink(torch.matmul(self._drop(self.P).mT, g), 2)
        return (gq, gk, gv, None)[: len(self.needs)]

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the tangents of the cotangents."""
        dgq = dgk = dgv = None
        if self.needs[0] or self.needs[1]:
            if self.g_seen is not g:  # constant between the products of a step
                self.g_seen, self.inner = g, self._inner(g)
                self.gS = self.inner * self.P * self.scale
            dgP = torch.matmul(dg, self.v.mT)
            if self.dv is not None:
                dgP.add_(torch.matmul(g, self.dv.mT))
            dgP = self._drop(dgP)
            dgS = dgP - self._along(self.P, dgP)
            if self.dP is not None:
                # <dP, gP> = <dP, inner>, for the rows of dP sum to zero
                pair = self.dP * self.inner
                dgS = dgS.sub_(pair.sum(-1, keepdim=True)).mul_(self.P).add_(pair)
            else:
                dgS.mul_(self.P)
            dgS.mul_(self.scale)
            if self.needs[0]:
                dgq = torch.matmul(dgS, self.k)
                dgq = self._shrink(dgq if self.dk is None else dgq.add_(torch.matmul(self.gS, self.dk)), 0)
            if self.needs[1]:
                dgk = torch.matmul(dgS.mT, self.q)
                dgk = self._shrink(dgk if self.dq is None else dgk.add_(torch.matmul(self.gS.mT, self.dq)), 1)
        if self.needs[2]:
            dgv = torch.matmul(self._drop(self.P).mT, dg)
            if self.dP is not None:
                dgv.add_(torch.matmul(self._drop(self.dP).mT, g))
            dgv = self._shrink(dgv, 2)
        return (dgq, dgk, dgv, None)[: len(self.needs)]
