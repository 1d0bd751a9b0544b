"""The questions that the suite asks, one file each. Every answer is a list of entries for the JSON.

An entry says what was asked (``question`` and its parameters), and holds ``seconds``: contender -> one time a round;
``base``: the contender that ratios are taken to; ``errors``: contender -> relative error against float64.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """How much to spend on an entry: rounds at most, seconds after which no further one begins, untimed rounds."""

    rounds: int
    seconds: float
    quick: bool
    untimed: int = 2
