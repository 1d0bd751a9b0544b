"""The definition of every kernel, in plain torch. Each backend must agree with it; sums are float64 for any dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def gram(V: Tensor, W: Tensor) -> Tensor:
    """``[k, n], [m, n] -> V W'``, float64 ``[k, m]``."""
    return V.double() @ W.double().t()


def power_step(V: Tensor, HV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``theta = v.Hv``, ``residual = |Hv - theta v|``, ``v <- Hv / |Hv|`` for each row; a zero row stays zero."""
    v, h = V.double(), HV.double()
    theta = (v * h).sum(1)
    residual = torch.linalg.vector_norm(h - theta[:, None] * v, dim=1)
    norm = torch.linalg.vector_norm(h, dim=1)
    following = torch.where(norm[:, None] > 0, h / norm[:, None], 0.0)
    return theta, residual, following.to(V.dtype)


def combine(C: Tensor, V: Tensor, out: Tensor | None = None) -> Tensor:
    """``[m, k], [k, n] -> C V``, ``[m, n]`` in V's dtype."""
    result = (C.double() @ V.double()).to(V.dtype)
    return result if out is None else out.copy_(result)


def scale(V: Tensor, d: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply each row of ``[k, n]`` by the diagonal d ``[n]``."""
    return torch.mul(V, d, out=out)


def inv_sqrt_adam(
    v: Tensor, *, bias_correction2: float, eps: float, factor: float, out: Tensor | None = None
) -> Tensor:
    """Adam's second moment ``[n]`` to ``P^-1/2 = (factor (sqrt(v / bias_correction2) + eps))^-1/2``."""
    result = (factor * ((v.double() / bias_correction2).sqrt() + eps)).rsqrt().to(v.dtype)
    return result if out is None else out.copy_(result)
