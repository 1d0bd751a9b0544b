"""Fixtures for all tests: a fresh seed for every test, printed when it fails."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seed torch anew for each test; ``SHARPKERN_SEED=<number>`` repeats a failure."""
    value = int(os.environ.get("SHARPKERN_SEED", random.SystemRandom().randrange(2**31)))
    request.node.user_properties.append(("seed", value))
    torch.manual_seed(value)
    print(f"SHARPKERN_SEED={value}")
    return value


# Tests of kernels, rules and recordings, by the names of their files.
_UNWRITTEN = (
    "test_kernels", "test_triton", "test_rule", "test_program", "test_replayed", "test_memory", "test_conformance",
    "test_operators", "test_operator_contract", "test_odd_models", "test_counts", "test_unwritten",
)  # fmt: skip


@pytest.fixture(autouse=True)
def nan_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let memory that nobody has written hold NaN in the tests of kernels, rules and recordings; see ``unwritten``."""
    if not request.path.name.startswith(_UNWRITTEN):
        yield
        return
    from unwritten import nan_memory

    with nan_memory():
        yield
