"""One sharded parameter: how its parts are put together, and how the parts of a sum are handed out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ...optimizers.parts import local_part
from .group import Ranks


class Shard:
    """A parameter under ``fully_shard``, cut along one dimension; the last processes may hold less, or nothing.

    Args:
        parameter: a DTensor on a mesh of one dimension.
        ranks: the processes of that mesh, in its order.
        index: of the parameter in the model, to tell whether all processes gather the same one.

    Attributes:
        part: this process's part, on the parameter's memory; a leaf of its own, with the parameter's
            ``requires_grad``.
    """

    def __init__(self, parameter: Any, ranks: Ranks, index: int) -> None:
        self.parameter, self.ranks, self.index = parameter, ranks, index
        self.dim: int = parameter.placements[0].dim
        self.length: int = parameter.shape[self.dim]
        self.chunk = -(-self.length // ranks.size)  # as torch.chunk cuts
        self.part = local_part(parameter).requires_grad_(parameter.requires_grad)
        start, stop = self._range()
        if self.part.shape[self.dim] != stop - start:
            raise ValueError(
                f"a parameter of shape {list(parameter.shape)} has a part of {list(self.part.shape)} on rank "
                f"{ranks.rank} of {ranks.size}, where {stop - start} of {self.length} were expected in dimension "
                f"{self.dim}: only equal chunks are supported."
            )

    def _range(self) -> tuple[int, int]:
        start = min(self.ranks.rank * self.chunk, self.length)
        return start, min(start + self.chunk, self.length)

    def gathered(self, part: Tensor) -> Tensor:
        """Put the processes' parts together, ``part -> whole``; every process must do so at the same time."""
        rows = self._padded(part, self.chunk)
        return self.ranks.gathered(rows, self.index)[: self.length].movedim(0, self.dim)

    def scattered(self, whole: Tensor) -> Tensor:
        """Add up whole tensors over the processes, and return this one's part."""
        rows = self._padded(whole, self.chunk * self.ranks.size)
        start, stop = self._range()
        return self.ranks.scattered_sum(rows, self.index)[: stop - start].movedim(0, self.dim).contiguous()

    def _padded(self, t: Tensor, rows: int) -> Tensor:
        t = t.detach().movedim(self.dim, 0)
        missing = rows - t.shape[0]
        # Collective calls need the same size everywhere.
        return t.contiguous() if not missing else torch.cat([t, t.new_zeros(missing, *t.shape[1:])])

    def chosen(self, whole: Tensor) -> Tensor:
        """Return this process's part of a tensor that every process has whole."""
        start, stop = self._range()
        return whole.narrow(self.dim, start, stop - start)


class Whole(Function):
    """Gathers a parameter; differentiable as often as wanted, for each is linear and the other's transpose.

    For weights that are read outside the module that is run layer by layer: the graph then keeps them whole.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return shard.gathered(part)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor, None]:
        return _Parts.apply(g[0], ctx.shard), None


class _Parts(Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return shard.scattered(whole)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor, None]:
        return Whole.apply(g[0], ctx.shard), None
