"""A large vocabulary's linear head and its cross-entropy as one op, chunked over tokens in the tangent sweeps.

With logits z = x W' + b, probabilities p (kept by the primal, as torch does), and gz = g (mass p - t):
    dz = dx W' + x dW' + db          d(gz) = g mass p (dz - <p, dz>)
    d(gx) = d(gz) W + gz dW          d(gW) = d(gz)' x + gz' dx          d(gb) = sum d(gz)
Only a chunk of dz, gz and d(gz) exists at a time: a tangent of all logits would be as large as all of p, k times.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..rule import RULES, Selective, inner
from ..step import NOTHING, Step, flat_slots
from .linear import Linear
from .loss import CrossEntropy

aten = torch.ops.aten
LARGE = 1 << 22  # logits from which chunks pay: their tangents no longer fit into a cache
_CHUNK = 1 << 21  # logits in a chunk, for all k together
_PARTS = 8  # at least as many chunks, where each then has _ROWS tokens
_ROWS = 256  # but no smaller chunks: W, dW and d(gW) pass through memory once a chunk; 16 rows take three times as long
_RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints}


def linear_cross_entropy(x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, *options: Any) -> Tensor:
    """Return the cross-entropy of the logits ``x W' + b``, rows of classes."""
    rows = aten.linear.default(x, w, b).reshape(-1, w.shape[0])
    loss: Tensor = aten.cross_entropy_loss.default(rows, target, *options)
    return loss


class LinearCrossEntropy(Selective):
    """``cross_entropy(x W' + b, target)`` at the end of a loss."""

    can_end_program = True
    freed_after_reverse = ("dx", "dw", "db")

    def __init__(self, op: Any, needs: tuple[Any, ...]) -> None:
        super().__init__(op, needs)
        self.linear = Linear(aten.linear.default, needs[:3])
        # To the loss the logits are an argument that moves, whatever moves them.
        self.loss = CrossEntropy(aten.cross_entropy_loss.default, (True, *needs[3:]))

    def write_to(self, position: int, place: Tensor | None) -> None:
        """The linear layer's results go there."""
        self.linear.write_to(position, place)

    def forward(self, x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, *options: Any) -> Tensor:
        """Save what linear and cross-entropy save."""
        z = self.linear.forward(x, w, b)
        self.logits_shape = z.shape
        return self.loss.forward(z.reshape(-1, w.shape[0]), target, *options)

    def tangent(self, dx: Tensor | None, dw: Tensor | None, db: Tensor | None, *_: None) -> None:
        """Save the tangents; the loss's own is not needed."""
        rows = self.linear.x
        # Saved as they came; nothing of the size of the logits is formed before the chunks.
        self.dx = None if dx is None else dx.reshape(dx.shape[0], *rows.shape)
        self.dw, self.db = dw, db

    def backward(self, g: Tensor, wanted: tuple[Any, ...] | None = None) -> tuple[Tensor | None, ...]:
        """Return the cotangents of x, W and b."""
        gz = self.loss.backward(g)[0]
        assert gz is not None
        gz = gz.view(g.shape[0], *self.logits_shape)
        return *self.linear.backward(gz, (wanted or self.needs)[:3]), None, None

    def prepare(self, g: Tensor) -> None:
        """Spread g over the tokens."""
        self.loss.prepare(g)
        # A mean's cotangent is one number; expanded, it is cut into chunks like any other.
        self.per_row = self.loss.per_row(g)[0].expand(len(self.loss.p), 1)

    def backward_tangent(self, dg: Tensor | None, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the tangents of the cotangents, a chunk of tokens at a time."""
        x, w = self.linear.x, self.linear.w
        k = next(d for d in (self.dx, self.dw, self.db) if d is not None).shape[0]
        dgx = x.new_empty(k, *x.shape) if self.needs[0] else None
        # Not cleared: the first chunk overwrites, by beta = 0 below.
        dgw = self.linear.result(1, (k, *w.shape), x) if self.needs[1] else None
        dgb = self.linear.result(2, (k, w.shape[0]), x).zero_() if self.needs[2] else None
        for rows in self._chunks(k):
            dx = None if self.dx is None else self.dx[:, rows]
            dgz = self.loss.curve(self._logits_tangent(rows, dx, k), rows)
            # Formed again for each product: keeping it would double the memory of p.
            gz = self.loss.slope(rows).mul_(self.per_row[rows])
            if dgx is not None:
                part = dgx[:, rows]
                # For k > 1 the part has gaps between its vectors, and ``matmul`` refuses such an ``out``.
                torch.matmul(dgz, w, out=part) if k == 1 else part.copy_(dgz @ w)
                if self.dw is not None:
                    part.baddbmm_(gz.expand(k, *gz.shape), self.dw)
            if dgw is not None:
                dgw.baddbmm_(dgz.mT, x[rows].expand(k, *x[rows].shape), beta=float(rows.start > 0))
                if dx is not None:
                    dgw.baddbmm_(gz.mT.expand(k, *gz.mT.shape), dx)
            if dgb is not None:
                dgb += dgz.sum(1)
        if dgx is not None:
            dgx = dgx.view(k, *self.logits_shape[:-1], x.shape[1])
        return dgx, dgw, dgb, None, None

    def second_order(self, dargs: tuple[Any, ...], g: Tensor) -> Tensor:
        """Return ``<g mass p (dz - <p, dz>), dz> + 2 <gz, dx dW'>``, a chunk of tokens at a time."""
        k = next(d for d in (self.dx, self.dw, self.db) if d is not None).shape[0]
        total = torch.zeros(k, dtype=torch.float64, device=self.linear.x.device)
        for rows in self._chunks(k):
            dx = None if self.dx is None else self.dx[:, rows]
            dz = self._logits_tangent(rows, dx, k)
            total += inner(self.loss.curve(dz, rows), dz)
            if dx is not None and self.dw is not None:
                gz = self.loss.slope(rows).mul_(self.per_row[rows])
                # v'' of z = x W' along v is 2 dx dW', which meets the loss's slope.
                total += 2 * inner(gz[None], dx @ self.dw.mT)
        return total

    def _chunks(self, k: int) -> Iterator[slice]:
        """Split the tokens."""
        tokens, classes = len(self.linear.x), len(self.linear.w)
        size = max(_ROWS, min(-(-tokens // _PARTS), _CHUNK // (k * classes)))
        return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))

    def _logits_tangent(self, rows: slice, dx: Tensor | None, k: int) -> Tensor:
        x, w = self.linear.x[rows], self.linear.w
        dz = x.new_zeros(k, len(x), len(w)) if dx is None else dx @ w.t()
        if self.dw is not None:
            dz.baddbmm_(x.expand(k, *x.shape), self.dw.mT)
        return dz if self.db is None else dz.add_(self.db[:, None])


RULES[linear_cross_entropy] = LinearCrossEntropy


def fuse_head(steps: list[Step], loss_slot: int, shapes: Mapping[int, tuple[int, ...]]) -> list[Step]:
    """Make one step of a large linear layer and the cross-entropy that alone uses its result, perhaps reshaped.

    Args:
        steps: of the program, in order.
        loss_slot: of the loss.
        shapes: slot -> shape.

    Returns:
        The steps, with the pair replaced where there is one.
    """
    producer = {slot: step for step in steps for slot in step.outputs}
    # Logits that anything else reads must exist: then nothing is fused.
    uses = Counter(slot for step in steps for slot in flat_slots(step.inputs) if slot != NOTHING)
    loss = producer.get(loss_slot)
    if loss is None or loss.op is not aten.cross_entropy_loss.default:
        return steps
    gone, before = [loss], producer.get(loss.inputs[0])
    while before is not None and before.op in _RESHAPES and uses[before.outputs[0]] == 1:
        gone.append(before)
        before = producer.get(before.inputs[0])
    if before is None or before.op is not aten.linear.default or uses[before.outputs[0]] != 1:
        return steps
    rows, logits = shapes[loss.inputs[0]], shapes[before.outputs[0]]
    # A reshape that merges classes and tokens would make other rows than the linear layer's.
    if len(rows) != 2 or rows[1] != logits[-1] or math.prod(rows) < LARGE:
        return steps
    moved = len(before.template) - 1  # linear's arguments take the place of the logits
    fused = Step(
        name=before.name,
        op=linear_cross_entropy,
        template=[*before.template, *loss.template[1:]],
        # The loss's first argument, the logits, is gone; its others move up behind the linear layer's.
        refs=[*before.refs, *((position + moved, slot) for position, slot in loss.refs if position)],
        list_refs=[],
        inputs=[*before.inputs, *loss.inputs[1:]],
        outputs=loss.outputs,
    )
    # By identity: steps are dataclasses, which compare by value.
    gone_ids = {id(step) for step in (*gone, before)}
    # Last, where the loss stood: all that the linear layer reads has been computed by then.
    return [*(step for step in steps if id(step) not in gone_ids), fused]
