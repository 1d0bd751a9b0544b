"""What must give the same loss each time it runs: a batch whose forward pass is run again for every product."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class NotRepeatableError(RuntimeError):
    """The forward pass of a batch cannot be run a second time."""


class ChangedLossError(NotRepeatableError):
    """The forward pass of a batch gave another loss when it was run again."""


def check_no_iterator(iterators: Sequence[str]) -> None:
    """Refuse a model that takes values from an iterator, where passes beside training's own would take some too.

    Args:
        iterators: where the model's code can reach one.

    Raises:
        NotRepeatableError: there is one.
    """
    if iterators:
        raise NotRepeatableError(
            f"the model reads an iterator ({iterators[0]}), which gives each value only once, and this needs more "
            "passes than training makes: hand its values over in the batch."
        )


def check_same_loss(now: Tensor, before: Tensor, what: str) -> None:
    """Compare the loss of a pass with that of an earlier one on the same batch.

    Args:
        now, before: 0-d. They may differ by the square root of their dtype's eps, relative to the earlier one.
        what: was run again, for the message.

    Raises:
        ChangedLossError: they differ by more.
    """
    first, again = float(before), float(now)
    if not abs(again - first) <= math.sqrt(torch.finfo(before.dtype).eps) * abs(first):
        raise ChangedLossError(
            f"{what} gave a loss of {first:.9g}, and {again:.9g} when it was run again for a product. The model "
            "changes from pass to pass (a counter, a schedule, a buffer that it reads as well): hold it fixed, or "
            "measure one micro-batch alone."
        )
