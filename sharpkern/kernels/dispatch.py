"""The registry of kernels, and which backend runs one: per call, explainable, never silent.

A kernel is a public function with the decorator ``kernel``, which names for each backend the module that has a version:
a function of the same name. ``reference`` has one of every kernel.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import cuda
from .cpu.native import forced_backend

BACKENDS = ("cuda", "triton", "cpu", "reference")  # fastest first; the last always fits
_CALLED = {"cuda": "CUDA C++", "triton": "Triton", "cpu": "compiled CPU"}
Function = TypeVar("Function", bound=Callable[..., Any])


class Version(NamedTuple):
    """A backend's version of a kernel: its module in ``kernels/``, and the tensors that it takes; None for any."""

    module: str
    device: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None


_REFERENCE = Version("reference")
COMPILED = Version("cpu.native", "cpu", (torch.float32, torch.float64))
CUDA = Version("cuda", "cuda", (torch.float32, torch.float64))


def triton(family: str) -> Version:
    """Return the version that the module of a family in ``kernels/triton/`` has."""
    return Version(f"triton.{family}", "cuda", (torch.float32, torch.bfloat16, torch.float16))


_versions: dict[str, dict[str, Version]] = {}


def kernel(**versions: Version) -> Callable[[Function], Function]:
    """Register a public function as a kernel.

    Args:
        versions: backend = its version; a backend that is not named has none.
    """

    def register(function: Function) -> Function:
        # The function itself stays as it is: it calls ``choose`` where it has checked its arguments.
        _versions[function.__name__] = versions
        return function

    return register


def why_not(backend: str, kernel: str, x: Tensor) -> str | None:
    """Say in one sentence why a backend cannot run a kernel on a tensor's device and dtype; None if it can."""
    return _why_not(backend, kernel, x.device, x.dtype)


def _why_not(backend: str, kernel: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if backend == "reference":
        return None
    version = _versions.get(kernel, {}).get(backend)
    if version is None:
        instead = "; torch's own kernels run it" if backend == "cpu" else ""
        return f"sharpkern has no {_CALLED[backend]} version of {kernel}{instead}"
    if reason := _missing(version):
        return reason
    # the interpreter runs Triton kernels on the CPU
    if version.device not in (None, device.type) and not (backend == "triton" and interpreted()):
        return f"the tensor is on {device}"
    if version.dtypes is not None and dtype not in version.dtypes:
        *names, last = (str(d).removeprefix("torch.") for d in version.dtypes)
        return f"{dtype} is not supported, {', '.join(names)} and {last} are"
    return cuda.problem(device) if backend == "cuda" else None


def _missing(version: Version) -> str | None:
    try:
        module = _module(version)
    except ImportError as error:  # only Triton's modules import what may be missing
        return f"Triton is missing ({error}): pip install triton"
    reason: str | None = getattr(module, "REASON", None)
    return reason


def _module(version: Version) -> ModuleType:
    # On first use: importing Triton takes long, and it may be missing.
    return importlib.import_module(f"{__package__}.{version.module}")


def choose(kernel: str, x: Tensor) -> ModuleType:
    """Return the module that runs a kernel on a tensor: the forced backend, else the fastest that fits.

    An empty tensor goes to the reference, on any backend.

    Raises:
        TypeError: a DTensor, which has no memory of its own.
        ValueError: SHARPKERN_BACKEND names no backend.
        RuntimeError: the forced backend cannot run here, and why.
    """
    if type(x) is not Tensor and hasattr(x, "to_local"):  # its address is 0, and a compiled kernel would go there
        raise TypeError(f"{kernel} takes plain tensors, got a {type(x).__name__}: pass its part, t.to_local().")
    # The variable is part of the key, so that a change of it is seen at the next call.
    chosen = _choice(kernel, forced_backend(), x.device, x.dtype)
    # Where there is nothing to compute no kernel is run: torch knows what each of its ops gives for no numbers.
    return chosen if x.numel() else _module(_REFERENCE)


def runs_on(backend: str, kernel: str, x: Tensor) -> bool:
    """Whether ``choose`` takes this backend, for callers with a path of their own where it does not."""
    return (forced_backend() or _fastest(kernel, x.device, x.dtype)) == backend


# Choices are kept: the reasons take longer to find than a small kernel to run.


@functools.cache
def _choice(kernel: str, forced: str | None, device: torch.device, dtype: torch.dtype) -> ModuleType:
    if forced and forced not in BACKENDS:
        raise ValueError(f"SHARPKERN_BACKEND is {forced!r}; known backends are {', '.join(BACKENDS)}.")
    # Refused and not replaced: who forces a backend wants to know that it ran.
    if forced and (reason := _why_not(forced, kernel, device, dtype)):
        raise RuntimeError(f"{kernel} cannot run on backend {forced!r}: {reason}.")
    backend = forced or _fastest(kernel, device, dtype)
    return _module(_REFERENCE if backend == "reference" else _versions[kernel][backend])


@functools.cache
def _fastest(kernel: str, device: torch.device, dtype: torch.dtype) -> str:
    # on the CPU no GPU's backend unasked: Triton's interpreter is for tests
    order = BACKENDS if device.type == "cuda" else ("cpu", "reference")
    return next(b for b in order if _why_not(b, kernel, device, dtype) is None)


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"
