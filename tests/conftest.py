"""Fixtures for all tests: a fresh seed for every test, printed when it fails."""

from __future__ import annotations

import os
import random
import sys
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
