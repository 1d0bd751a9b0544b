"""Vector kernels: one public function each, which checks its arguments, chooses a backend, and calls it.

Blocks hold k vectors as rows, ``[k, n]``, contiguous, float32 or float64; sums are accumulated in float64.
``SHARPKERN_BACKEND`` (reference, cpu, triton, cuda) forces a backend, which then runs or raises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import BACKENDS as BACKENDS
from .dispatch import choose
from .dispatch import why_not as why_not


def gram(V: Tensor, W: Tensor) -> Tensor:
    """Return all inner products of the rows of two blocks, ``G = V W'``.

    Args:
        V: ``[k, n]``.
        W: ``[m, n]``, like V; may be V itself.

    Returns:
        ``[k, m]`` float64 on V's device.

    Raises:
        ValueError: shapes, dtypes, devices or memory layout do not fit.

    Cost: reads (k + m) n numbers.

    >>> gram(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 2.0]])).item()
    11.0
    """
    _check_blocks("W", W, V)
    return choose("gram", V).gram(V, W)


def power_step(V: Tensor, HV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rayleigh quotients, residual norms and next iterates of k unit vectors, in one call.

        theta_i = v_i . Hv_i      r_i = |Hv_i - theta_i v_i|      v_i <- Hv_i / |Hv_i|

    Args:
        V: ``[k, n]``, rows of length 1.
        HV: ``[k, n]``; row i is ``H v_i``.

    Returns:
        theta ``[k]`` float64, r ``[k]`` float64 (both in the units of H), and the next block ``[k, n]`` like V. A zero
        row of HV gives a zero row.

    Raises:
        ValueError: shapes, dtypes, devices or memory layout do not fit.

    Cost: moves 5kn numbers in two passes.
    Source: Parlett, The Symmetric Eigenvalue Problem (1998), chapter 4.

    >>> theta, r, V = power_step(torch.eye(2)[:1], torch.tensor([[3.0, 4.0]]))
    >>> theta.item(), r.item()
    (3.0, 4.0)
    """
    _check_blocks("HV", HV, V)
    if V.shape != HV.shape:
        raise ValueError(f"HV must match V ({list(V.shape)}), got {list(HV.shape)}.")
    return choose("power_step", V).power_step(V, HV)


def combine(C: Tensor, V: Tensor, out: Tensor | None = None) -> Tensor:
    """Return linear combinations of the rows of a block, ``C V``.

    Args:
        C: ``[m, k]`` float64, on V's device.
        V: ``[k, n]``.
        out: ``[m, n]`` like V, not V itself; allocated if None.

    Returns:
        ``[m, n]`` like V.

    Raises:
        ValueError: shapes, dtypes, devices or memory layout do not fit.

    Cost: moves (k + m) n numbers.

    >>> combine(torch.tensor([[1.0, -1.0]]).double(), torch.eye(2)).tolist()
    [[1.0, -1.0]]
    """
    _check_block("V", V)
    if C.ndim != 2 or C.shape[1] != V.shape[0] or C.dtype != torch.float64 or C.device != V.device:
        raise ValueError(
            f"C must be [m, {V.shape[0]}] float64 on {V.device}, got {list(C.shape)} {C.dtype} on {C.device}."
        )
    if out is not None:
        _check_out(out, (C.shape[0], V.shape[1]), V)
    return choose("combine", V).combine(C.contiguous(), V, out)


def scale(V: Tensor, d: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply every row of a block by a diagonal.

    Args:
        V: ``[k, n]``.
        d: ``[n]`` like V.
        out: ``[k, n]`` like V, may be V; allocated if None.

    Returns:
        ``[k, n]`` like V.

    Raises:
        ValueError: shapes, dtypes, devices or memory layout do not fit.

    Cost: moves 2kn + n numbers.

    >>> scale(torch.ones(1, 2), torch.tensor([2.0, 3.0])).tolist()
    [[2.0, 3.0]]
    """
    _check_block("V", V)
    _check_vector("d", d, V.shape[1], V)
    if out is not None:
        _check_out(out, tuple(V.shape), V)
    return choose("scale", V).scale(V, d, out)


def inv_sqrt_adam(
    v: Tensor, *, bias_correction2: float, eps: float, factor: float, out: Tensor | None = None
) -> Tensor:
    """Turn Adam's second moment into the diagonal of ``P^-1/2`` in one pass.

        P = factor (sqrt(v / bias_correction2) + eps)

    Args:
        v: ``[n]`` float32 or float64, not negative: ``exp_avg_sq``.
        bias_correction2: ``1 - beta2^t``.
        eps: Adam's.
        factor: ``1 - beta1^t``, or 1 without the first moment's bias correction.
        out: ``[n]`` like v; allocated if None.

    Returns:
        ``[n]`` like v.

    Raises:
        ValueError: v is no contiguous vector, or out does not fit.

    Cost: moves 2n numbers.

    >>> inv_sqrt_adam(torch.tensor([16.0]), bias_correction2=1.0, eps=0.0, factor=1.0).item()
    0.5
    """
    _check_vector("v", v, v.numel(), v)
    if out is not None:
        _check_out(out, tuple(v.shape), v)
    module = choose("inv_sqrt_adam", v)
    result: Tensor = module.inv_sqrt_adam(v, bias_correction2=bias_correction2, eps=eps, factor=factor, out=out)
    return result


def _check_block(name: str, V: Tensor) -> None:
    if V.ndim != 2 or not V.is_contiguous() or (V.dtype != torch.float32 and V.dtype != torch.float64):
        raise ValueError(
            f"{name} must be a contiguous [k, n] block of float32 or float64, got {list(V.shape)} {V.dtype}, "
            f"contiguous={V.is_contiguous()}."
        )


def _check_blocks(name: str, W: Tensor, V: Tensor) -> None:
    _check_block("V", V)
    _check_block(name, W)
    if W.shape[1] != V.shape[1] or W.dtype != V.dtype or W.device != V.device:
        raise ValueError(
            f"{name} must have rows like V's ([{V.shape[1]}] {V.dtype} on {V.device}), "
            f"got [{W.shape[1]}] {W.dtype} on {W.device}."
        )


def _check_vector(name: str, d: Tensor, n: int, like: Tensor) -> None:
    if d.shape != (n,) or not d.is_contiguous() or d.dtype != like.dtype or d.device != like.device:
        raise ValueError(
            f"{name} must be a contiguous [{n}] vector, {like.dtype} on {like.device}, got {list(d.shape)} {d.dtype} "
            f"on {d.device}, contiguous={d.is_contiguous()}."
        )
    if d.dtype != torch.float32 and d.dtype != torch.float64:
        raise ValueError(f"{name} must be float32 or float64, got {d.dtype}.")


def _check_out(out: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if out.shape != shape or out.dtype != like.dtype or out.device != like.device or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous {list(shape)} {like.dtype} on {like.device}, got {list(out.shape)} {out.dtype} "
            f"on {out.device}, contiguous={out.is_contiguous()}."
        )
