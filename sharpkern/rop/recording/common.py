"""What every kind of recording offers, and how it says that there can be none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class NotReplayableError(Exception):
    """The computation reads values (``.item()``, ``nonzero``), or its results are too large to keep."""


class Recording(Protocol):
    """A computation that can be run again."""

    def replay(self, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Run it on other inputs and into other results, of the same shapes and dtypes, contiguous."""


def copy_all(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copy each source ``[*shape]`` into its target ``[*shape]``; dtypes are converted."""
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
