"""Losses in closed form: cross-entropy, mean squared error, binary cross-entropy with logits.

cross-entropy of one position with logits z, p = softmax(z), soft target t and weight w = sum t:
    loss = -<t, log p>       gz = w p - t            d(gz) = w (p dz - p <p, dz>)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.precision import wide
from ...kernels.softmax import softmax_jacobian
from ..rule import Rule, align, reduce_to, rule
from .fallback import UnsupportedOpError

aten = torch.ops.aten
NONE, MEAN, SUM = 0, 1, 2


class _Reduced(Rule):
    """A loss reduced to a mean, a sum, or not at all: ``scale`` turns the reduced cotangent into one per entry."""

    reduction: int
    shape: torch.Size  # unreduced
    count: float | Tensor

    def _reduce(self, loss: Tensor) -> Tensor:
        if self.reduction == NONE:
            return loss
        return self._scaled(wide(loss).sum()).to(loss.dtype)

    def _reduce_tangent(self, d: Tensor) -> Tensor:
        if self.reduction == NONE:
            return d
        return self._scaled(wide(d).reshape(d.shape[0], -1).sum(1)).to(d.dtype)

    def _scaled(self, total: Tensor) -> Tensor:
        # Of a sum that is still wide: in float16 the sum of many rows is infinite, where their mean is not.
        return total / self.count if self.reduction == MEAN else total

    def _spread(self, g: Tensor) -> Tensor:
        """Return the cotangent of the unreduced loss, ``[k, *shape]`` or broadcastable to it."""
        if self.reduction == NONE:
            return g
        # count may be a tensor (weights of the classes that occur), and does not depend on the parameters.
        g = g / self.count if self.reduction == MEAN else g
        return g.reshape(g.shape[0], *([1] * len(self.shape)))


@rule(aten.cross_entropy_loss.default)
class CrossEntropy(_Reduced):
    """Cross-entropy of logits with class indices or class probabilities."""

    can_end_program = True
    freed_after_reverse = ("dz",)

    def forward(
        self,
        z: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        reduction: int = MEAN,
        ignore_index: int = -100,
        smoothing: float = 0.0,
    ) -> Tensor:
        """Save the probabilities and the (soft) targets, classes last."""
        if any(self.needs[1:]):
            raise UnsupportedOpError(
                "cross_entropy_loss whose target or weight depends on the parameters: write it out."
            )
        self.reduction = reduction
        self.class_dim = 0 if z.ndim == 1 else 1
        self.lead = z.shape[: self.class_dim] + z.shape[self.class_dim + 1 :]
        # Classes last: a row is then contiguous for the kernels.
        rows = z.movedim(self.class_dim, -1).reshape(-1, z.shape[self.class_dim])
        # From the logarithm: log(softmax) would lose small probabilities to underflow.
        log_p = F.log_softmax(rows, -1)
        self.p = log_p.exp()
        classes = rows.shape[1]
        self.soft = target.is_floating_point()
        if self.soft:
            t = target.movedim(self.class_dim, -1).reshape(-1, classes)
            t = t * (1 - smoothing) + smoothing / classes if smoothing else t
            self.t: Tensor | None = t if weight is None else t * weight
            # The gradient is sum_c t_c (p - e_c) = mass p - t. Targets need not sum to one, with weights or as given.
            self.mass = self.t.sum(1, keepdim=True)
            # torch divides by the number of rows here, with class weights too.
            self.count: float | Tensor = float(len(rows))
            loss = -(self.t * log_p).sum(1)
        else:
            index = target.reshape(-1, 1)
            kept = index != ignore_index
            # An ignored index may lie outside of the classes; its row has weight zero instead.
            self.index = torch.where(kept, index, 0)
            self.hard = kept.to(rows.dtype) if weight is None else kept * weight[self.index]
            # A weighted mean: by the weights of the targets that count. Smoothing does not change it.
            self.count = wide(self.hard).sum()
            loss = -(self.hard * log_p.gather(1, self.index)).sum(1)
            self.mass, self.t = self.hard, None
            if smoothing:
                spread = torch.full((classes,), 1.0, dtype=rows.dtype, device=z.device) if weight is None else weight
                even = kept * spread * (smoothing / classes)
                loss = (1 - smoothing) * loss - (even * log_p).sum(1)
                # Smoothed targets have no zeros: from here on as soft ones.
                self.t = even.scatter_add(1, self.index, (1 - smoothing) * self.hard)
                self.mass = self.t.sum(1, keepdim=True)
        self.shape = torch.Size(self.lead)
        return self._reduce(loss.reshape(self.lead))

    def _rows(self, z: Tensor) -> Tensor:
        """``[k, *z]`` to ``[k, rows, classes]``."""
        return z.movedim(self.class_dim + 1, -1).reshape(z.shape[0], *self.p.shape)

    def _unrows(self, z: Tensor) -> Tensor:
        return z.reshape(z.shape[0], *self.lead, -1).movedim(-1, self.class_dim + 1)

    def per_row(self, g: Tensor) -> Tensor:
        """Return the cotangent of each row's loss, ``[k, rows or 1, 1]``."""
        g = self._spread(g)
        return g.reshape(g.shape[0], -1, 1)

    def slope(self, rows: slice = slice(None)) -> Tensor:
        """Return ``mass p - t``, the gradient of the unreduced loss, for some rows."""
        # Fresh memory, so that the target is subtracted in place.
        slope = self.mass[rows] * self.p[rows]
        if self.t is not None:
            return slope.sub_(self.t[rows])
        return slope.scatter_add_(1, self.index[rows], -self.hard[rows])

    def curve(self, dz: Tensor, rows: slice = slice(None)) -> Tensor:
        """Return ``g mass p (dz - <p, dz>)`` for some rows, ``[k, rows, classes]``."""
        return softmax_jacobian(self.p[rows], dz, self.weight[rows])[0]

    def tangent(self, dz: Tensor, *_: None) -> Tensor | None:
        """Return ``<mass p - t, dz>``."""
        self.dz = self._rows(dz)
        # Nobody reads the tangent of the last op, and it would cost a pass over the logits.
        if self.ends_program:
            return None
        mean = (self.p * self.dz).sum(2, keepdim=True)
        if self.t is not None:
            d = self.mass * mean - (self.t * self.dz).sum(2, keepdim=True)
        else:
            d = self.mass * mean - self.hard * self.dz.gather(2, self.index.expand(dz.shape[0], *self.index.shape))
        return self._reduce_tangent(d.reshape(dz.shape[0], *self.lead))

    def backward(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``g (mass p - t)``."""
        return self._unrows(self.per_row(g) * self.slope()), None, None

    def prepare(self, g: Tensor) -> None:
        """Weigh each row's second derivative."""
        # One number a row, contiguous, as the kernel takes it.
        self.weight = (self.per_row(g) * self.mass).reshape(-1)

    def backward_tangent(self, dg: Tensor | None, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``dg (mass p - t) + g mass p (dz - <p, dz>)``."""
        curved = self.curve(self.dz)
        if dg is not None:
            # In place: the kernel's result is fresh.
            curved += self.per_row(dg) * self.slope()
        return self._unrows(curved), None, None


@rule(aten.mse_loss.default)
class MSE(_Reduced):
    """``(x - y)^2``; both may depend on the parameters."""

    can_end_program = True
    freed_after_reverse = ("de",)

    def forward(self, x: Tensor, y: Tensor, reduction: int = MEAN) -> Tensor:
        """Save the difference."""
        self.reduction, self.shapes = reduction, (x.shape, y.shape)
        self.e = x - y
        self.shape, self.count = self.e.shape, float(max(1, self.e.numel()))
        return self._reduce(self.e.square())

    def tangent(self, dx: Tensor | None, dy: Tensor | None) -> Tensor | None:
        """Return ``2 e (dx - dy)``."""
        parts = [None if d is None else align(d, len(self.shape)) for d in (dx, dy)]
        de = parts[0] if parts[1] is None else -parts[1] if parts[0] is None else parts[0] - parts[1]
        assert de is not None
        self.de = de
        if self.ends_program:
            return None
        # Expanded in front of the sum: an argument that was broadcast counts as often as it was used.
        return self._reduce_tangent((2 * self.e * de).expand(de.shape[0], *self.shape))

    def backward(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``2 g e`` and its negative."""
        return self._both(2 * self._spread(g) * self.e)

    def backward_tangent(self, dg: Tensor | None, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``2 (dg e + g de)`` and its negative."""
        curved = 2 * self._spread(g) * self.de
        return self._both(curved if dg is None else curved.addcmul(2 * self._spread(dg), self.e))

    def _both(self, ge: Tensor) -> tuple[Tensor | None, ...]:
        # x and y may have been broadcast against each other.
        gx = reduce_to(ge, self.shapes[0]) if self.needs[0] else None
        return gx, -reduce_to(ge, self.shapes[1]) if self.needs[1] else None


@rule(aten.binary_cross_entropy_with_logits.default)
class BinaryCrossEntropy(_Reduced):
    """``w [(1 - t) z + (1 + (q - 1) t) softplus(-z)]``, q the weight of positives.

    With s = sigmoid(z): slope ``w [(1 - t) s - q t (1 - s)]``, second derivative ``w (1 + (q - 1) t) s (1 - s)``.
    """

    freed_after_reverse = ("dz",)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        weight: Tensor | None = None,
        q: Tensor | None = None,
        reduction: int = MEAN,
    ) -> Tensor:
        """Save first and second derivative."""
        if any(self.needs[1:]):
            raise UnsupportedOpError(
                "binary_cross_entropy_with_logits whose target or weights depend on the parameters."
            )
        self.reduction = reduction
        s = torch.sigmoid(z)
        positive = t if q is None else q * t
        w: Any = 1.0 if weight is None else weight
        # Both from one sigmoid, per parameter value; a product is then two multiplications.
        self.slope = w * ((1 - t) * s - positive * (1 - s))
        self.curve = w * (1 - t + positive) * s * (1 - s)
        # torch's own value, by a form that does not overflow. Unreduced, so that the reduction is the same as the
        # tangents'.
        loss = aten.binary_cross_entropy_with_logits.default(z, t, weight, q, NONE)
        self.shape, self.count = loss.shape, float(max(1, loss.numel()))
        return self._reduce(loss)

    def tangent(self, dz: Tensor, *_: None) -> Tensor:
        """Return ``slope dz``."""
        self.dz = dz
        return self._reduce_tangent(self.slope * dz)

    def backward(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``g slope``."""
        return self._spread(g) * self.slope, None, None, None

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``dg slope + g curve dz``."""
        return (
            (self._spread(g) * self.curve * self.dz).addcmul(self._spread(dg), self.slope),
            None,
            None,
            None,
        )
