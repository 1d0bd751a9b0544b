"""Triton without a GPU, in two processes: numbers in the interpreter, code by offline compilation.

Triton decides at decoration whether a kernel is interpreted, so one process does one of them:
``TRITON_INTERPRET=1 pytest tests/kernels_triton`` runs the kernels on CPU tensors (``test_triton_*``), without the
variable they are compiled for chips that need not be there (``test_compiled_*``). Where a GPU is, the first also run
on it, compiled, under ``pytest -m gpu``.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if find_spec("triton") is None:
    collect_ignore_glob = ["test_*"]
elif INTERPRETED:
    collect_ignore_glob = ["test_compiled_*"]
elif not torch.cuda.is_available():
    collect_ignore_glob = ["test_triton_*"]


@pytest.fixture
def device() -> str:
    """The device whose tensors the kernels take in this process."""
    return "cpu" if INTERPRETED else "cuda"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs on a device is marked ``gpu``."""
    for item in items:
        if "device" in getattr(item, "fixturenames", ()) and not INTERPRETED:
            item.add_marker(pytest.mark.gpu)
