"""What a kernel's callers keep of the primal between sweeps, and the error of dependent rows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

FIXED, RMS, CENTRED = 0, 1, 2  # a norm's statistics: constants; root mean square; mean and variance


class Standardised(NamedTuple):
    """A norm's primal: ``xhat`` ``[rows, D]``, ``r`` ``[rows]``, and how rows and channels belong together.

    Both are contiguous: the compiled kernels know them by address. ``groups`` and ``inner`` as in ``kernels.norm``;
    ``mode`` is FIXED, RMS or CENTRED.
    """

    xhat: Tensor
    r: Tensor
    groups: int
    inner: int
    mode: int

    @property
    def channels(self) -> int:
        """Length of weight and bias."""
        # D / inner channels in each row, and as many different rows as groups.
        return self.groups * (self.xhat.shape[1] // self.inner)


class Heads(NamedTuple):
    """The primal of attention: q, o ``[B, T, d]``, k, v ``[B, S, d]`` (v, o may have another width), lse ``[B, T]``.

    B counts batch times heads. ``mask`` is None, or a float tensor that broadcasts to ``[B, T, S]`` and is added to the
    scores (-inf forbids); causal: query i sees keys up to i. lse is float32 for 16-bit floats; a row that sees nothing
    has lse = +inf and o = 0.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor
    mask: Tensor | None
    causal: bool
    scale: float


class RankError(ValueError):
    """Rows that should span k dimensions do not, to rounding. Attribute: ``rank``."""

    def __init__(self, rank: int, k: int) -> None:
        self.rank = rank
        super().__init__(f"the {k} rows of V span {rank} dimensions to rounding: drop or replace {k - rank} of them.")
