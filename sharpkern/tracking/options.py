"""Which options and optimizers a tracker refuses or warns of, before anything is measured."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..curvature.wrappers import Kind
from ..optimizers.threshold import stability_threshold

_TF32_TOL = 0.005  # ten times TF32's rounding of a number: below, residuals would be mostly rounding


def check_options(
    *,
    tol: float,
    every: int,
    max_matvecs: int,
    k: int,
    budget: float | None,
    probe: Any,
    loader: Any,
    tf32: bool,
    chunk: int | None,
    products: bool,
    block: object,
    directions: bool | None,
) -> None:
    """Raise a ValueError for values out of range, and for options that exclude each other; see ``SharpnessTracker``."""
    if not 0 < tol < 1:
        raise ValueError(f"tol must lie between 0 and 1, got {tol}.")
    if tf32 and tol < _TF32_TOL:
        raise ValueError(f"tol must be at least {_TF32_TOL} with tf32=True, whose rounding is 0.0005; got {tol}.")
    if every < 1 or k < 1 or max_matvecs < k:
        raise ValueError(f"need every >= 1, k >= 1 and max_matvecs >= k, got {every}, {k} and {max_matvecs}.")
    if budget is not None and not budget > 0:
        raise ValueError(f"budget must be a positive fraction of a step's time, got {budget}.")
    if isinstance(probe, str) and (probe != "auto" or budget is None):
        raise ValueError(f'probe must be a batch, None, or with budget= "auto", got {probe!r} with budget={budget}.')
    if probe is not None and loader is not None:
        raise ValueError("give probe or loader, not both.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 example, got {chunk}.")
    if block is not None and block != "auto" and (type(block) is not int or block < 1):
        raise ValueError(f"block must be 'auto', None or a number of vectors, got {block!r}.")
    if not products and directions is False:
        raise ValueError("products=False and directions=False leave nothing to measure.")


def check_kind(kind: Kind, *, budget: float | None, block: object, directions: bool) -> None:
    """Raise a ValueError for options that a model over several processes does not have."""
    if kind != "plain" and budget is not None:
        raise ValueError(
            "budget= goes by the clock, which differs between processes, so that some would measure and others not: "
            "use every=."
        )
    if kind != "plain" and block == "auto":
        raise ValueError(
            'block="auto" goes by the clock, which differs between processes, so that some would multiply three '
            "vectors and others one: use block=3 or None."
        )
    if kind == "fsdp2" and directions:
        raise ValueError("directions=True and products=False need whole vectors, and fully_shard's are sharded.")


def has_threshold(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether the optimizer's stability threshold is known; warn where it is not, at the tracker's own caller."""
    try:
        stability_threshold(optimizer)
    except TypeError as error:
        warnings.warn(f"SharpnessTracker reports no threshold: {error}", stacklevel=3)
        return False
    return True
