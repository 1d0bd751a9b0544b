"""The CUDA kernels in ``sharpkern._C``: tensors become addresses.

They are launched from ``kernels.vectors``. Each call enqueues on torch's current stream of the tensor's device and
returns; memory comes from torch's allocator.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

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


def launch(kernel: str, x: Tensor, *arguments: float | Tensor) -> None:
    """Call a vector kernel of x's dtype on x's device and stream, with its arguments in the order of csrc/vectors.h."""
    addresses = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
    # A launch goes to the current device, which need not be that of x.
    with torch.cuda.device(x.device):
        workspace = _workspace(kernel, x, *(a for a in arguments if type(a) is int))
        stream = torch.cuda.current_stream(x.device).cuda_stream
        _function(kernel, x)(*addresses, workspace.data_ptr(), stream)


def _function(kernel: str, x: Tensor) -> Any:
    return getattr(_cuda, f"{kernel}_f64" if x.dtype == torch.float64 else f"{kernel}_f32", None)


def _workspace(kernel: str, x: Tensor, *sizes: int) -> Tensor:
    """Return room for the kernel's partial sums; torch may reuse it once the stream has passed the kernel."""
    numbers = _function(f"{kernel}_workspace", x)
    # At least one, since a kernel that is given no address is refused.
    return x.new_empty(max(1, numbers(*sizes)) if numbers else 1, dtype=torch.float64)
