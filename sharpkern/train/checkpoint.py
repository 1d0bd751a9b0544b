"""Checkpoints: everything a run needs to continue identically, in tensors and plain Python."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from .metrics import replace_file


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; it is there whole or not at all."""
    buffer = io.BytesIO()
    torch.save({**state, "rng": torch.get_rng_state()}, buffer)
    replace_file(path, buffer.getvalue())


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint and set torch's random numbers as they were. Loads no code.

    Raises:
        FileNotFoundError: no checkpoint.
        ValueError: damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no checkpoint to resume from.")
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        torch.set_rng_state(state.pop("rng"))
    except (RuntimeError, EOFError, OSError, KeyError, AttributeError, TypeError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: damaged checkpoint ({reason}).") from error
    return state
