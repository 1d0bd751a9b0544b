"""Ops that take each entry of their result from one of several arguments: where, masked_fill, maximum, clamp.

The primal fixes which; tangents and cotangents follow the same choice. What is not chosen is dropped, not multiplied by
zero: it may be infinite.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rule import LinearInArgs, rule
from . import pointwise
from .arithmetic import Kind

aten = torch.ops.aten


class Select(LinearInArgs):
    """A mask of what is dropped for each tensor argument, or its shares; None: the argument has no derivative."""

    def _start(self, y: Tensor, args: list[Any], drop: list[Tensor | None]) -> Tensor:
        tensors = [i for i, a in enumerate(self.op._schema.arguments) if "Tensor" in str(a.type)]
        self.kinds, self.kind = [Kind.of(args[i]) for i in tensors], Kind.of(y)
        # By position among the op's tensors: a number has no derivative and no entry.
        self.drop = [drop[i] for i in tensors]
        return y

    def _keep(self, d: Tensor, drop: Tensor) -> Tensor:
        if drop.dtype == torch.bool:
            return d.masked_fill(drop, 0)
        # A share of zero drops: times zero, an infinite number would be NaN.
        return (d * drop).masked_fill_(drop == 0, 0)

    def tangent(self, *dargs: Tensor | None) -> Tensor:
        """Sum what is kept of each tangent."""
        y: Tensor | None = None
        for d, drop in zip(dargs, self.drop, strict=True):
            if d is not None and drop is not None:
                # Broadcast first: the mask has the shape of the result.
                term = self._keep(self.kind.tangent(d), drop)
                y = term if y is None else y.add_(term)
        assert y is not None
        return y

    def backward(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """Give each argument its part of the cotangent."""
        return tuple(
            kind.cotangent(self._keep(g, drop)) if need and drop is not None else None
            for need, drop, kind in zip(self.needs, self.drop, self.kinds, strict=True)
        )


@rule(aten.where.self, aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf)
class Where(Select):
    """``y = condition ? a : b``."""

    def forward(self, condition: Tensor, a: Any, b: Any) -> Tensor:
        """Save the condition and its opposite."""
        self.condition = condition
        return self._start(self.op(condition, a, b), [condition, a, b], [None, ~condition, condition])

    def tangent(self, *dargs: Tensor | None) -> Tensor:
        """Choose between the tangents."""
        # Where both move, ``where`` is one pass instead of two masks and a sum.
        if sum(d is not None for d in dargs) < 2:
            return super().tangent(*dargs)
        da, db = (self.kind.tangent(d) for d in dargs if d is not None)
        return torch.where(self.condition, da, db)


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
class MaskedFill(Select):
    """``y = mask ? value : x``."""

    def forward(self, x: Tensor, mask: Tensor, value: Any) -> Tensor:
        """Save the mask and its opposite."""
        return self._start(self.op(x, mask, value), [x, mask, value], [mask, None, ~mask])


@rule(aten.maximum.default, aten.minimum.default)
class Extreme(Select):
    """``y = max(a, b)`` or min; a tie goes half to each, as in torch."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Save each argument's share, 0, 1/2 or 1."""
        y: Tensor = self.op(a, b)
        wins = a > b if self.op is aten.maximum.default else a < b
        # A share instead of a mask, since a tie gives half to each.
        share = _share(wins, a == b, torch.ones_like(y))
        return self._start(y, [a, b], [share, 1 - share])


@rule(aten.clamp.Tensor)
class Clamp(Select):
    """``y = min(max(x, low), high)``; where x equals a bound it passes, or shares with the bound, as in torch."""

    def forward(self, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
        """Save where x and where each bound is taken."""
        y: Tensor = self.op(x, low, high)
        # What torch does at a bound changed between versions, and is not what clamping by numbers does.
        if pointwise.CLAMP_SHARES_TIES:
            return self._start(y, [x, low, high], self._shares(x, low, high, y))
        below = torch.zeros_like(y, dtype=torch.bool) if low is None else (x < low).expand(y.shape)
        above = torch.zeros_like(y, dtype=torch.bool) if high is None else (x > high).expand(y.shape)
        outside = below | above
        if low is not None and high is not None:
            # Where the bounds cross, the upper one wins, as in torch.
            below, above = below & (low < high), above | (high < low)
        return self._start(y, [x, low, high], [outside, ~below, ~above])

    def _shares(self, x: Tensor, low: Tensor | None, high: Tensor | None, y: Tensor) -> list[Tensor | None]:
        """Return the shares of x, low and high in each entry of y: 0, 1 or, at a tie, 1/2."""
        one = torch.ones_like(y)
        of_x = one if low is None else _share(x > low, x == low, one)
        # In the order of min(max(x, low), high): a tie in the second splits what has passed the first.
        raised = x if low is None else torch.maximum(x, low)
        of_raised = one if high is None else _share(raised < high, raised == high, one)
        shares = [of_x * of_raised, (1 - of_x) * of_raised, 1 - of_raised]
        if low is not None and high is not None:
            # Equal bounds share nothing: all goes to x where it equals them, and else to the bound that it crosses.
            whole = (x == low, x < low, x > low)
            return [torch.where(low == high, one * w, s) for w, s in zip(whole, shares, strict=True)]
        return [*shares]


def _share(wins: Tensor, ties: Tensor, one: Tensor) -> Tensor:
    # ``one`` brings dtype and shape: the comparisons may be smaller than the result.
    return one * wins + one * ties * 0.5
