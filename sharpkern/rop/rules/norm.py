"""Layer, RMS, group, instance and batch norm, as rows of numbers that are standardised, scaled and shifted.

y = xhat w + b,  xhat = (x - mean) r,  J = d xhat / dx:
    dy = J dx w + xhat dw + db          gx = J (g w)         gw = sum g xhat         gb = sum g
    d(gx) = J (dg w + g dw) + dJ (g w)         d(gw) = sum dg xhat + g dxhat         d(gb) = sum dg
The formulas of J and dJ, and the code, are in ``kernels/norm.py``; this module brings each op's tensors into rows.
16-bit floats are standardised in float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...kernels.norm import CENTRED, FIXED, RMS, Standardised, norm_backward_tangent, norm_tangent
from ...kernels.precision import wide
from ..rule import Selective, rule

aten = torch.ops.aten


class _Norm(Selective):
    """The sweeps of a norm whose rows are a reshape of x (``channels_first``: of x with its channels in front)."""

    s: Standardised
    channels_first = False
    freed_after_reverse = ("dw", "dxhat", "along")

    def _save(self, x: Tensor, w: Tensor | None, s: Standardised) -> None:
        self.shape, self.dtype, self.s = x.shape, x.dtype, s
        self.w = None if w is None else wide(w).reshape(-1).contiguous()
        # A weight may have several dimensions (layer norm over some); the kernels know channels only.
        self.weight_shape = () if w is None else tuple(w.shape)

    def _rows(self, d: Tensor) -> Tensor:
        """``[k, *x]`` to ``[k, rows, D]``."""
        # Channels in front, k before them: a row is then all that one statistic is taken over.
        d = d.transpose(1, 2) if self.channels_first else d
        return wide(d.reshape(d.shape[0], *self.s.xhat.shape))

    def _back(self, d: Tensor) -> Tensor:
        """``[k, rows, D]`` to ``[k, *x]``."""
        if self.channels_first:
            n, c = self.shape[:2]
            d = d.view(d.shape[0], c, n, *self.shape[2:]).transpose(1, 2)
        return d.reshape(d.shape[0], *self.shape).to(self.dtype)

    def _channels(self, d: Tensor | None) -> Tensor | None:
        return None if d is None else wide(d).reshape(d.shape[0], -1)

    def _parameter(self, d: Tensor | None) -> Tensor | None:
        return None if d is None else d.reshape(d.shape[0], *self.weight_shape).to(self.dtype)

    def _three(self, wanted: tuple[Any, ...]) -> tuple[bool, bool, bool]:
        # Ops have one to five tensor arguments, of which x, w and b come first; a missing one is not wanted.
        x, w, b, *_ = (*wanted, False, False)
        return x, w, b

    def _results(self, gx: Tensor | None, gw: Tensor | None, gb: Tensor | None) -> tuple[Tensor | None, ...]:
        results = (None if gx is None else self._back(gx), self._parameter(gw), self._parameter(gb))
        return (*results, *[None] * len(self.needs))[: len(self.needs)]

    def tangent(self, dx: Tensor | None, dw: Tensor | None = None, db: Tensor | None = None, *_: None) -> Any:
        """Return ``J dx w + xhat dw + db``."""
        self.dw = self._channels(dw)
        dx = None if dx is None else self._rows(dx)
        dy, self.dxhat, self.along = norm_tangent(self.s, self.w, dx, self.dw, self._channels(db))
        return self._back(dy)

    def backward(self, g: Tensor, wanted: tuple[Any, ...] | None = None) -> tuple[Tensor | None, ...]:
        """Return ``J (g w), sum g xhat, sum g``."""
        three = self._three(wanted or self.needs)
        # The plain backward is what of its tangent is linear in dg, with g in the place of dg: one kernel for both.
        parts = norm_backward_tangent(self.s, self.w, None, None, None, None, self._rows(g), three)
        return self._results(*parts)

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the tangents of all three."""
        parts = norm_backward_tangent(
            self.s, self.w, self.dw, self.dxhat, self.along, self._rows(g)[0], self._rows(dg), self._three(self.needs)
        )
        return self._results(*parts)


def _standardised(x: Tensor, mean: Tensor, r: Tensor, groups: int, inner: int, mode: int) -> Standardised:
    """Rows ``[rows, D]`` with their mean and ``r`` ``[rows]``."""
    # torch's statistics may have another dtype than the rows, which are float32 at least.
    r = r.reshape(-1).to(x.dtype)
    # Kept instead of x, which no sweep needs but through xhat.
    return Standardised((x.contiguous() - mean.reshape(-1, 1).to(x.dtype)).mul_(r[:, None]), r, groups, inner, mode)


@rule(aten.layer_norm.default)
class LayerNorm(_Norm):
    """Standardise over the trailing dimensions."""

    def forward(
        self, x: Tensor, normalized: list[int], w: Tensor | None, b: Tensor | None, eps: float = 1e-5, *_: Any
    ) -> Tensor:
        """Save xhat and r, with torch's own statistics."""
        # The statistics that y was made of, so that loss and derivatives belong to the same numbers.
        y, mean, r = aten.native_layer_norm.default(x, normalized, w, b, eps)
        rows = wide(x).reshape(-1, math.prod(normalized))
        # A bias alone tells the shape that the parameters' cotangents get.
        self._save(x, b if w is None else w, _standardised(rows, mean, r, 1, 1, CENTRED))
        self.w = None if w is None else self.w
        result: Tensor = y
        return result


@rule(aten.rms_norm.default)
class RMSNorm(_Norm):
    """Divide by the root mean square over the trailing dimensions."""

    def forward(self, x: Tensor, normalized: list[int], w: Tensor | None = None, eps: float | None = None) -> Tensor:
        """Save xhat and r."""
        # A transposed x has rows with gaps, and what is computed from them keeps the strides: kernels need none.
        rows = wide(x).reshape(-1, math.prod(normalized)).contiguous()
        # torch's default is the rounding of the dtype of x, also where it computes in float32.
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        # By hand, for torch's op gives y alone.
        r = torch.rsqrt(rows.square().mean(1) + eps)
        self._save(x, w, Standardised(rows * r[:, None], r, 1, 1, RMS))
        y = self.s.xhat if self.w is None else self.s.xhat * self.w
        return y.reshape(x.shape).to(x.dtype)


@rule(aten.group_norm.default)
class GroupNorm(_Norm):
    """Standardise over each group of channels and all pixels."""

    def forward(
        self, x: Tensor, groups: int, w: Tensor | None = None, b: Tensor | None = None, eps: float = 1e-5, *_: Any
    ) -> Tensor:
        """Save xhat and r, with torch's own statistics."""
        n, c = x.shape[:2]
        pixels = x[0, 0].numel()
        # The groups' rows are then views of it; a channels-last tensor is copied here, once.
        x = x.contiguous()
        y, mean, r = aten.native_group_norm.default(x, w, b, n, c, pixels, groups, eps)
        rows = wide(x).reshape(n * groups, -1)
        self._save(x, w, _standardised(rows, mean, r, groups, pixels, CENTRED))
        result: Tensor = y
        return result


@rule(
    aten._native_batch_norm_legit_functional.default, aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_no_training.default,
)  # fmt: skip
class BatchNorm(_Norm):
    """Standardise each channel over batch and pixels, or with given statistics, which makes it affine in x."""

    differentiable = (0,)
    channels_first = True

    def forward(self, x: Tensor, w: Tensor | None, b: Tensor | None, *rest: Any) -> Any:
        """Save xhat and r."""
        result = self.op(x, w, b, *rest)
        if self.op is aten._native_batch_norm_legit.no_stats:
            mean = var = None
            training, _, eps = rest
        elif self.op is aten._native_batch_norm_legit_no_training.default:
            (mean, var, _, eps), training = rest, False
        else:
            mean, var, training, _, eps = rest
        c = x.shape[1]
        # A channel's numbers lie in N places, so this is a copy. In exchange all norms share their kernels.
        rows = wide(x.transpose(0, 1).reshape(c, -1))
        if training and result[1].dtype == rows.dtype:
            # The op's own: to form them again takes longer than the op itself.
            _, mean, r, *_ = result
        else:
            if training:
                # The op's have been rounded to 16 bits. Biased, as torch standardises; its running variance is not.
                var, mean = torch.var_mean(rows, 1, correction=0)
            assert var is not None
            r = torch.rsqrt(wide(var) + eps)
        assert mean is not None
        # With running statistics no number of xhat depends on the others: J is r times the identity.
        mode = CENTRED if training else FIXED
        s = _standardised(rows, wide(mean), r, c, rows.shape[1], mode)
        self._save(x, w, s)
        return result

    def tangent(self, dx: Tensor | None, dw: Tensor | None = None, db: Tensor | None = None, *_: None) -> Any:
        """Only the first output moves."""
        # The other outputs are statistics, which have no derivative.
        return (super().tangent(dx, dw, db), *[None] * (len(self.op._schema.returns) - 1))

    def backward(self, g: Any, wanted: tuple[Any, ...] | None = None) -> tuple[Tensor | None, ...]:
        """Use the first output's cotangent."""
        return super().backward(g[0], wanted)

    def backward_tangent(self, dg: Any, g: Any) -> tuple[Tensor | None, ...]:
        """Use the first output's cotangents."""
        return super().backward_tangent(dg[0], g[0])
