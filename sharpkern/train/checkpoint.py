"""Checkpoints: everything a run needs to continue identically, in tensors and plain Python."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from .metrics import replace_file


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; it is there whole or not at all.

    Args:
        path: the file.
        state: tensors and plain Python, as ``load`` takes nothing else; torch's CPU random state is added as ``rng``.

    Cost: copies of the state in memory, for a moment.
    """
    # Into memory first: written straight to the file, a kill would leave a part of it under the checkpoint's name.
    buffer = io.BytesIO()
    # Dropout in a user's own model draws from this generator, so a resumed run must find it as it was.
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
        with zipfile.ZipFile(path) as archive:
            # torch compares no checksums: a flipped bit in a weight would go on unseen.
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        # ``weights_only`` unpickles tensors and plain Python alone: a checkpoint from elsewhere cannot run code.
        state: dict[str, Any] = torch.load(path, weights_only=True)
        torch.set_rng_state(state.pop("rng"))
    # Which of a dozen errors is raised depends on where the file is damaged; the user's remedy is the same for all.
    except Exception as error:
        # torch's message goes on for a page about ``weights_only``; the first line says what was wrong.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: damaged checkpoint ({reason}).") from error
    return state
