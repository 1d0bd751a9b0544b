"""Memory for blocks of parameter vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native


def empty(rows: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``[rows, n]``, not set, and on huge pages if it is large and on the CPU."""
    return native.on_huge_pages(torch.empty(rows, n, dtype=dtype, device=device))
