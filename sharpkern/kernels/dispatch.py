"""Which backend runs a kernel: per call, explainable, never silent."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from . import cuda, reference
from .cpu import blocked_attention, native

BACKENDS = ("cuda", "triton", "cpu", "reference")  # fastest first; the last always fits
# The kernels that have a Triton version, and the module it is in.
_TRITON = {
    "attention": "attention",
    "attention_backward": "attention",
    "attention_backward_tangent": "attention",
    "attention_tangent": "attention",
    "dual_gemm": "linear",
    "embedding": "embedding",
    "embedding_backward": "embedding",
    "norm_backward_tangent": "norm",
    "norm_tangent": "norm",
    "slope_product": "pointwise",
    "activation_slope": "pointwise",
    "activation_curvature": "pointwise",
    "softmax_backward_tangent": "softmax",
    "softmax_jacobian": "softmax",
}
# The kernels whose CPU version is plain torch in blocks: it serves other devices and dtypes too.
_BLOCKED = ("attention", "attention_backward", "attention_backward_tangent", "attention_tangent")
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(backend: str, kernel: str, x: Tensor) -> str | None:
    """Say in one sentence why a backend cannot run a kernel on a tensor's device and dtype; None if it can."""
    return _why_not(backend, kernel, x.device, x.dtype)


def _why_not(backend: str, kernel: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if backend == "reference" or (backend == "cpu" and kernel in _BLOCKED):
        return None
    if backend == "cpu":
        if native.REASON is not None:
            return native.REASON
        if not hasattr(native, kernel):
            return f"sharpkern has no compiled CPU version of {kernel}; torch's own kernels run it"
        if device.type != "cpu":
            return f"the tensor is on {device}"
        if dtype not in (torch.float32, torch.float64):
            return f"{dtype} is not supported, float32 and float64 are"
        return None
    if backend == "triton":
        if kernel not in _TRITON:
            return f"sharpkern has no Triton version of {kernel}"
        if reason := _no_triton(_TRITON[kernel]):
            return reason
        if dtype not in _TRITON_DTYPES:
            return f"{dtype} is not supported, float32, bfloat16 and float16 are"
        return None if device.type == "cuda" or interpreted() else f"the tensor is on {device}"
    if cuda.REASON is not None:
        return cuda.REASON
    if not hasattr(cuda, kernel):
        return f"sharpkern has no CUDA C++ version of {kernel}"
    if device.type != "cuda":
        return f"the tensor is on {device}"
    if dtype not in (torch.float32, torch.float64):
        return f"{dtype} is not supported, float32 and float64 are"
    return cuda.problem(device)


def choose(kernel: str, x: Tensor) -> ModuleType:
    """Return the module that runs a kernel on a tensor: the forced backend, else the fastest that fits.

    Raises:
        ValueError: SHARPKERN_BACKEND names no backend.
        RuntimeError: the forced backend cannot run here, and why.
    """
    return _choice(kernel, native.forced_backend(), x.device, x.dtype)


@functools.cache
def _choice(kernel: str, forced: str | None, device: torch.device, dtype: torch.dtype) -> ModuleType:
    if not forced:
        return _module(_fastest(kernel, device, dtype), kernel)
    if forced not in BACKENDS:
        raise ValueError(f"SHARPKERN_BACKEND is {forced!r}; known backends are {', '.join(BACKENDS)}.")
    if reason := _why_not(forced, kernel, device, dtype):
        raise RuntimeError(f"{kernel} cannot run on backend {forced!r}: {reason}.")
    return _module(forced, kernel)


@functools.cache
def _fastest(kernel: str, device: torch.device, dtype: torch.dtype) -> str:
    order = BACKENDS if device.type == "cuda" else ("cpu", "reference")
    return next(b for b in order if _why_not(b, kernel, device, dtype) is None)


def forget() -> None:
    """Look again for what is installed: choices are kept, for a look costs more than a small kernel."""
    _choice.cache_clear()
    _fastest.cache_clear()


def runs_on(backend: str, kernel: str, x: Tensor) -> bool:
    """Whether ``choose`` takes this backend, for callers with a path of their own where it does not."""
    return (native.forced_backend() or _fastest(kernel, x.device, x.dtype)) == backend


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _module(backend: str, kernel: str) -> ModuleType:
    if backend == "triton":
        return importlib.import_module(f"{__package__}.triton.{_TRITON[kernel]}")
    if backend == "cpu" and kernel in _BLOCKED:
        return blocked_attention
    return {"cuda": cuda, "cpu": native, "reference": reference}[backend]


@functools.cache
def _no_triton(module: str) -> str | None:
    try:
        importlib.import_module(f"{__package__}.triton.{module}")
    except ImportError as error:
        return f"Triton is missing ({error}): pip install triton"
    return None
