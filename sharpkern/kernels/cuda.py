"""Tensors to addresses for the CUDA kernels in ``sharpkern._C``; same names and results as ``reference``.

Each call enqueues on torch's current stream of the tensor's device and returns; memory comes from torch's allocator.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .cholesky_qr import cholesky_qr
from .cpu import native

try:
    from .. import _C
except ImportError:  # native.REASON says why
    _C = None

_cuda = getattr(_C, "cuda", None)
_OLDEST = (8, 0)  # compute capability

REASON: str | None = native.REASON
if REASON is None and _cuda is None:
    REASON = "sharpkern was built without CUDA: reinstall with nvcc on PATH or in CUDA_HOME/bin"


@functools.cache
def problem(device: torch.device) -> str | None:
    """Say why a CUDA device cannot run the kernels: the driver or the chip is too old. None if it can."""
    if _cuda is None:
        return REASON
    if message := _cuda.problem():
        return f"the CUDA driver cannot run sharpkern's kernels: {message}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return f"{device} has compute capability {capability[0]}.{capability[1]}, {_OLDEST[0]}.{_OLDEST[1]} is needed"
    return None


def gram(V: Tensor, W: Tensor) -> Tensor:
    """See ``kernels.gram``."""
    k, m, n = V.shape[0], W.shape[0], V.shape[1]
    out = V.new_empty(k, m, dtype=torch.float64)
    _call("gram", V, V, k, W, m, n, out, _workspace("gram", V, k, m, n))
    return out


def power_step(V: Tensor, HV: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """See ``kernels.power_step``."""
    k, n = V.shape
    sums = V.new_empty(2, k, dtype=torch.float64)
    theta, residual, out = sums[0], sums[1], torch.empty_like(V) if out is None else out
    _call("power_step", V, V, HV, k, n, theta, residual, out, _workspace("power_step", V, k, n))
    return theta, residual, out


def combine(C: Tensor, V: Tensor, out: Tensor | None = None) -> Tensor:
    """See ``kernels.combine``."""
    out = V.new_empty(C.shape[0], V.shape[1]) if out is None else out
    _call("combine", V, C, *C.shape, V, V.shape[1], out)
    return out


def orthonormalise(V: Tensor) -> Tensor:
    """See ``kernels.orthonormalise``."""
    return cholesky_qr(V, gram, combine)


def scale(V: Tensor, d: Tensor, out: Tensor | None = None) -> Tensor:
    """See ``kernels.scale``."""
    out = torch.empty_like(V) if out is None else out
    _call("scale", V, V, *V.shape, d, out)
    return out


def inv_sqrt_adam(
    v: Tensor, *, bias_correction2: float, eps: float, factor: float, out: Tensor | None = None
) -> Tensor:
    """See ``kernels.inv_sqrt_adam``."""
    out = torch.empty_like(v) if out is None else out
    _call("inv_sqrt_adam", v, v, v.numel(), bias_correction2, eps, factor, out)
    return out


def _function(kernel: str, x: Tensor) -> Any:
    return getattr(_cuda, f"{kernel}_f64" if x.dtype == torch.float64 else f"{kernel}_f32")


def _workspace(kernel: str, x: Tensor, *sizes: int) -> Tensor:
    """Return room for the kernel's partial sums; torch may reuse it once the stream has passed the kernel."""
    return x.new_empty(_function(f"{kernel}_workspace", x)(*sizes), dtype=torch.float64)


def _call(kernel: str, x: Tensor, *arguments: Tensor | float) -> None:
    """Call a kernel of x's dtype on x's device and stream; tensors become addresses."""
    addresses = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
    with torch.cuda.device(x.device):
        _function(kernel, x)(*addresses, torch.cuda.current_stream(x.device).cuda_stream)
