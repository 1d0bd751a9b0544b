"""Whether products with several vectors at once pay on this model and device: measured, not guessed."""

from __future__ import annotations

import time
from typing import Any

import torch

WIDTH = 3  # vectors: the top one and the two that may take its place
_PAYS = 1.8  # of one vector's time: a solve by blocks needs 0.5 to 0.6 of the products one after the other
_UNTIMED, _TIMED = 2, 3  # calls: the first records the sweep, the second sees its memory for the first time


def width_that_pays(operator: Any) -> tuple[int, int]:
    """Time a product of three vectors and one of one vector.

    Args:
        operator: at parameters that it has been refreshed for.

    Returns:
        ``WIDTH`` if the block takes at most 1.8 times as long, else 1; and the Hessian-vector products spent.

    Cost: five products of each, 20 vectors in all.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(WIDTH, operator.n, dtype=operator.dtype, generator=generator).to(operator.device)
    # Columns of a contiguous transpose, as the solvers hand them over.
    blocks = {width: rows[:width].t() for width in (1, WIDTH)}
    seconds, spent = dict.fromkeys(blocks, float("inf")), 0
    try:
        for call in range(_UNTIMED + _TIMED):
            for width, block in blocks.items():  # in turn, so that both meet the same disturbances
                start = _now(operator.device)
                operator.matmat(block)
                spent += width
                taken = _now(operator.device) - start
                if call >= _UNTIMED:
                    seconds[width] = min(seconds[width], taken)
    except torch.OutOfMemoryError:
        # Three tangents of each activation do not fit; one did at every other step.
        return 1, spent
    return WIDTH if seconds[WIDTH] <= _PAYS * seconds[1] else 1, spent


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
