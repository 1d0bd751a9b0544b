"""Layer, RMS, group, instance and batch norm, from one core: standardise over some dimensions, then scale and shift.

xhat = (x - mu) r,  r = (var + eps)^-1/2
J u  = r (u - mean u - xhat mean(xhat u))                     the Jacobian of x -> xhat, symmetric
dJ u = -r [mean(xhat dx) J u + dxhat mean(xhat u) + xhat mean(dxhat u)],   dxhat = J dx
RMS norm is the same without mu and mean u. Means run over the standardised dimensions; all statistics are float32 or
wider.

y = xhat w + b:   dy = dxhat w + xhat dw + db       gx = J (g w)     gw = sum g xhat           gb = sum g
                  d(gx) = J (dg w + g dw) + dJ (g w)                 d(gw) = sum dg xhat + g dxhat
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .rule import Rule, rule

aten = torch.ops.aten


class Standardise:
    """``xhat`` and its derivatives over the trailing ``dims`` dimensions of a view of x."""

    def __init__(self, x: Tensor, dims: tuple[int, ...], eps: float, *, centre: bool) -> None:
        self.dims, self.centre = dims, centre
        x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        if centre:
            x = x - x.mean(dims, keepdim=True)
        self.r = torch.rsqrt(x.square().mean(dims, keepdim=True).add_(eps))
        self.xhat = x.mul_(self.r) if centre else x * self.r

    def _mean(self, u: Tensor) -> Tensor:
        return u.mean(self.dims, keepdim=True)

    def jacobian(self, u: Tensor) -> Tensor:
        """Return ``J u`` for u ``[k, *view]``."""
        along = self._mean(self.xhat * u)
        v = u - self._mean(u) if self.centre else u.clone()
        return v.addcmul_(self.xhat, along, value=-1).mul_(self.r)

    def tangent(self, dx: Tensor) -> Tensor:
        """Return ``dxhat``; keep what ``jacobian_tangent`` needs."""
        along = self._mean(self.xhat * dx)
        v = dx - self._mean(dx) if self.centre else dx.clone()
        self.dxhat = v.addcmul_(self.xhat, along, value=-1).mul_(self.r)
        self.along = along
        return self.dxhat

    def backward_tangent(self, du: Tensor, u: Tensor) -> Tensor:
        """Return ``J du + dJ u``.

        J du + dJ u = J (du - r mean(xhat dx) u) - r (dxhat mean(xhat u) + xhat mean(dxhat u)).
        """
        inner = torch.addcmul(du, self.r * self.along, u, value=-1)
        result = self.jacobian(inner)
        result.addcmul_(self.dxhat, self.r * self._mean(self.xhat * u), value=-1)
        return result.addcmul_(self.xhat, self.r * self._mean(self.dxhat * u), value=-1)
