"""``sharpkern doctor``: what this installation can run, and why not the rest."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata, util

from .exits import OK

DESCRIPTION = """Show versions, kernel backends, and why one is missing.

It takes no options, and exits with 0 whatever it finds."""


def run() -> int:
    """Print the findings; return the exit code."""
    print("\n".join(findings()))
    return OK


def findings() -> list[str]:
    """Describe versions, machine and kernel backends, a line each.

    Returns:
        Lines such as ``backend triton: no (...)``.
    """
    import torch

    from .. import __version__

    lines = [
        f"sharpkern {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"machine: {platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} torch threads",
        f"GPU: {_gpu()}",
        f"nvcc: {shutil.which('nvcc') or 'not found'}",
        *_backends(),
    ]
    forced = os.environ.get("SHARPKERN_BACKEND")
    lines.append(f"SHARPKERN_BACKEND: {forced or 'not set, the fastest backend that fits is used'}")
    for package in ("triton", "tqdm", "matplotlib", "scipy"):
        # Looked up and not imported: importing all four takes seconds, and one that is broken would end the report.
        found = util.find_spec(package) is not None
        lines.append(f"{package}: {metadata.version(package) if found else 'not installed'}")
    return lines


def _backends() -> list[str]:
    import torch

    from .. import kernels
    from ..kernels.cpu import native

    lines = []
    x = torch.zeros(1, 1)
    for backend in kernels.BACKENDS:
        device = "cuda" if backend in ("cuda", "triton") else "cpu"
        # A backend is asked about a kernel that it has: Triton has no vector kernels, the compiled modules no
        # ``dual_gemm``.
        reason = kernels.why_not(backend, "dual_gemm" if backend == "triton" else "gram", x)
        if reason is None:
            level = f", {native.level()} instructions" if backend == "cpu" else ""
            lines.append(f"backend {backend}: yes ({device}{level})")
        else:
            lines.append(f"backend {backend}: no ({reason})")
    return lines


def _gpu() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    # Tells a machine without a GPU from a torch that was built without CUDA.
    return f"none that torch can use (torch is built {'with' if torch.version.cuda else 'without'} CUDA)"
