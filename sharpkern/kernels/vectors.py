"""Vector kernels: one public function each, which checks its arguments, chooses a backend, and launches its kernel.

The compiled backends (``cpu.native``, ``cuda``) have the kernels of ``csrc/vectors.h`` and one ``launch`` each, which
takes a kernel's arguments in the order that stands there.

Blocks hold k vectors as rows, ``[k, n]``, contiguous, float32 or float64; sums are accumulated in float64.
``SHARPKERN_BACKEND`` (reference, cpu, triton, cuda) forces a backend, which then runs or raises.

Tried for a call's own time: choices of a backend that are kept (a call took 12 us without), checks as one expression,
addresses without ``isinstance``. Results as views of one allocation were slower.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .cholesky_qr import cholesky_qr
from .cpu.native import on_huge_pages
from .dispatch import COMPILED, CUDA, choose, kernel

_DTYPES = (torch.float32, torch.float64)


@kernel(cpu=COMPILED, cuda=CUDA)
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
    backend = choose("gram", V)
    # The reference has functions, the compiled backends one ``launch`` for all.
    if backend is reference:
        return reference.gram(V, W)
    (k, n), m = V.shape, W.shape[0]
    # Float64 whatever V is: the kernel's sums are, and a Ritz value needs more digits than its vector.
    out = V.new_empty(k, m, dtype=torch.float64)
    backend.launch("gram", V, V, k, W, m, n, out)
    return out


@kernel(cpu=COMPILED)
def transpose(V: Tensor) -> Tensor:
    """Return the columns of ``[n, k]`` as the rows of a contiguous block.

    Args:
        V: ``[n, k]``, of any dtype.

    Returns:
        ``[k, n]``, contiguous: V's own memory where V is the transpose of such a block, else a copy.

    Cost: reads and writes k n numbers, where k is at most 4 as fast as they can be copied; torch takes four times that.
    """
    if V.t().is_contiguous():
        # viewed anew: with one column the stride over it may be 1, and torch then copies it 80 times slower
        return V.t().view(V.shape[1], V.shape[0])
    result: Tensor = choose("transpose", V).transpose(V)
    return result


@kernel(cpu=COMPILED, cuda=CUDA)
def power_step(V: Tensor, HV: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Rayleigh quotients, residual norms and next iterates of k unit vectors, in one call.

        theta_i = v_i . Hv_i      r_i = |Hv_i - theta_i v_i|      v_i <- Hv_i / |Hv_i|

    Args:
        V: ``[k, n]``, rows of length 1.
        HV: ``[k, n]``; row i is ``H v_i``.
        out: ``[k, n]`` like V, neither V nor HV; allocated if None.

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
    if out is not None:
        _check_like("out", out, V.shape, V)
    backend = choose("power_step", V)
    if backend is reference:
        return reference.power_step(V, HV, out)
    k, n = V.shape
    theta = V.new_empty(k, dtype=torch.float64)
    residual = torch.empty_like(theta)  # views of one allocation would cost more
    # Only memory of our own: the advice must come before the first write.
    out = on_huge_pages(torch.empty_like(V)) if out is None else out
    backend.launch("power_step", V, V, HV, k, n, theta, residual, out)
    return theta, residual, out


@kernel(cpu=COMPILED, cuda=CUDA)
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
        _check_like("out", out, (C.shape[0], V.shape[1]), V)
    # C is small, and often a transposed view.
    backend, C = choose("combine", V), C.contiguous()
    if backend is reference:
        return reference.combine(C, V, out)
    (m, k), n = C.shape, V.shape[1]
    out = on_huge_pages(V.new_empty(m, n)) if out is None else out
    backend.launch("combine", V, C, m, k, V, n, out)
    return out


@kernel(cpu=COMPILED, cuda=CUDA)
def orthonormalise(V: Tensor) -> Tensor:
    """Return the Gram-Schmidt basis of the rows of a block, by Cholesky QR.

    Args:
        V: ``[k, n]``, k <= n.

    Returns:
        ``[k, n]`` like V: Q with V = L Q, L lower triangular with a positive diagonal. Q Q' is the identity to 1e-6
        (float32) or 1e-13 (float64), however close to dependent the rows are.

    Raises:
        RankError: the rows are dependent to rounding; its ``rank`` says how many are not. A ValueError.
        ValueError: V is no contiguous block with k <= n, or holds NaN or infinite numbers.

    Cost: moves 6 k n numbers for most blocks (two passes of ``gram`` and ``combine``), at most four times that. A GPU
    is waited for once in each pass.
    Source: Fukaya et al., Shifted Cholesky QR (2020).

    >>> orthonormalise(torch.tensor([[3.0, 0.0], [4.0, 2.0]])).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    _check_block("V", V)
    if V.shape[0] > V.shape[1]:
        raise ValueError(f"V must have no more rows than columns to be orthonormalised, got {list(V.shape)}.")
    if V.shape[0] == 0:
        return torch.empty_like(V)
    if choose("orthonormalise", V) is reference:
        return reference.orthonormalise(V)
    # Made of two kernels, which ask ``choose`` again.
    return cholesky_qr(V, gram, combine)


@kernel(cpu=COMPILED, cuda=CUDA)
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
    _check_like("d", d, V.shape[1:], V)
    if out is not None:
        _check_like("out", out, V.shape, V)
    backend = choose("scale", V)
    if backend is reference:
        return reference.scale(V, d, out)
    out = on_huge_pages(torch.empty_like(V)) if out is None else out
    backend.launch("scale", V, V, *V.shape, d, out)
    return out


@kernel(cpu=COMPILED, cuda=CUDA)
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
    if v.ndim != 1 or not v.is_contiguous() or v.dtype not in _DTYPES:
        raise ValueError(
            f"v must be a contiguous vector of float32 or float64, got {list(v.shape)} {v.dtype}, "
            f"contiguous={v.is_contiguous()}."
        )
    if out is not None:
        _check_like("out", out, v.shape, v)
    backend = choose("inv_sqrt_adam", v)
    if backend is reference:
        return reference.inv_sqrt_adam(v, bias_correction2=bias_correction2, eps=eps, factor=factor, out=out)
    out = on_huge_pages(torch.empty_like(v)) if out is None else out
    backend.launch("inv_sqrt_adam", v, v, v.numel(), bias_correction2, eps, factor, out)
    return out


# Each check is one expression on the way that succeeds: a call on a short vector is mostly these.


def _check_block(name: str, V: Tensor) -> None:
    if V.ndim != 2 or not V.is_contiguous() or V.dtype not in _DTYPES:
        raise ValueError(
            f"{name} must be a contiguous [k, n] block of float32 or float64, got {list(V.shape)} {V.dtype}, "
            f"contiguous={V.is_contiguous()}."
        )


def _check_blocks(name: str, W: Tensor, V: Tensor) -> None:
    _check_block("V", V)
    # The common case; of the symmetric result the compiled kernels compute one half.
    if W is V:
        return
    _check_block(name, W)
    if W.shape[1] != V.shape[1] or W.dtype is not V.dtype or W.device != V.device:
        raise ValueError(
            f"{name} must have rows like V's ([{V.shape[1]}] {V.dtype} on {V.device}), "
            f"got [{W.shape[1]}] {W.dtype} on {W.device}."
        )


def _check_like(name: str, d: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if d.shape != shape or d.dtype is not like.dtype or not d.is_contiguous() or d.device != like.device:
        raise ValueError(
            f"{name} must be contiguous {list(shape)}, {like.dtype} on {like.device}, got {list(d.shape)} {d.dtype} "
            f"on {d.device}, contiguous={d.is_contiguous()}."
        )
