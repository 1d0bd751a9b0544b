"""The emulation: a module like ``sharpkern._C.cuda`` from the same kernel source, compiled for the CPU."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from sharpkern.kernels import cuda, vectors

ROOT = Path(__file__).parents[2]


@functools.cache
def build() -> ModuleType:
    """Compile and load the emulation, once in a process; skip the test where there is no compiler."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    includes = [ROOT / "tests" / "cuda_on_cpu", ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", *(f"-I{folder}" for folder in includes)]
    # a 16-byte access off 16 bytes ends the process, as it would end a kernel
    flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / f"cuda_on_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
        subprocess.run([compiler, *flags, str(ROOT / "tests/cuda_on_cpu/module.cpp"), "-o", str(target)], check=True)
        spec = importlib.util.spec_from_file_location("cuda_on_cpu", target)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def install(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Put the emulation in the place of the compiled module: ``kernels.gram`` and the others run it on CPU tensors."""
    emulation = build()
    monkeypatch.setattr(vectors, "choose", lambda kernel, x: cuda)
    monkeypatch.setattr(cuda, "_cuda", emulation)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    return emulation
