"""Sharded parameters: how their parts are put together, and how the parts of a sum are handed out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

    Raises:
        ValueError: the part is not what ``torch.chunk`` would give this process.
    """

    def __init__(self, parameter: Any, ranks: Ranks, index: int) -> None:
        self.parameter, self.ranks, self.index = parameter, ranks, index
        self.dim: int = parameter.placements[0].dim
        self.length: int = parameter.shape[self.dim]
        # As torch.chunk cuts: parts of one size, so that the last ones come out short.
        self.chunk = -(-self.length // ranks.size)
        self.start = min(ranks.rank * self.chunk, self.length)
        self.rows = min(self.chunk, self.length - self.start)
        # A leaf apart from the DTensor: derivatives by it are parts, and no DTensor operation is differentiated.
        self.part = local_part(parameter).requires_grad_(parameter.requires_grad)
        if self.part.shape[self.dim] != self.rows:
            raise ValueError(
                f"a parameter of shape {list(parameter.shape)} has a part of {list(self.part.shape)} on rank "
                f"{ranks.rank} of {ranks.size}, where {self.rows} of {self.length} were expected in dimension "
                f"{self.dim}: only equal chunks are supported."
            )

    def chosen(self, whole: Tensor) -> Tensor:
        """Return this process's part of a tensor that every process has whole."""
        return whole.narrow(self.dim, self.start, self.rows)

    def padded(self, t: Tensor, rows: int) -> Tensor:
        """Return a tensor with the cut dimension first, filled up with zeros: collective calls need one size."""
        # The cut dimension goes first, because collective calls join and split along it.
        t = t.detach().movedim(self.dim, 0)
        missing = rows - t.shape[0]
        return t if not missing else torch.cat([t, t.new_zeros(missing, *t.shape[1:])])


def gathered(shards: Sequence[Shard], parts: Sequence[Tensor]) -> list[Tensor]:
    """Put the processes' parts of several parameters together, in one collective call for each dtype.

    Memory: what is gathered twice, while it is put in order.
    """

    def collect(row: Tensor, shard: Shard) -> Tensor:
        return shard.ranks.gathered(row, shard.index).view(shard.ranks.size, -1)

    def arrange(column: Tensor, shard: Shard, like: Tensor) -> Tensor:
        # One row of each process, side by side with other parameters' rows: a copy puts them in order.
        rest = like.movedim(shard.dim, 0).shape[1:]
        return column.reshape(shard.ranks.size * shard.chunk, *rest)[: shard.length].movedim(0, shard.dim)

    rows = [shard.padded(t, shard.chunk).reshape(1, -1) for shard, t in zip(shards, parts, strict=True)]
    return list(_exchanged(shards, parts, rows, collect, arrange))


def scattered(shards: Sequence[Shard], wholes: Sequence[Tensor]) -> list[Tensor]:
    """Add up whole tensors over the processes, and return this one's parts; calls as for ``gathered``."""

    def collect(rows: Tensor, shard: Shard) -> Tensor:
        return shard.ranks.scattered_sum(rows, shard.index)

    def arrange(row: Tensor, shard: Shard, like: Tensor) -> Tensor:
        rest = like.movedim(shard.dim, 0).shape[1:]
        # Contiguous, because the kernels read flat memory.
        return row.reshape(shard.chunk, *rest)[: shard.rows].movedim(0, shard.dim).contiguous()

    size = shards[0].ranks.size if shards else 1
    rows = [shard.padded(t, shard.chunk * size).reshape(size, -1) for shard, t in zip(shards, wholes, strict=True)]
    return list(_exchanged(shards, wholes, rows, collect, arrange))


def _exchanged(
    shards: Sequence[Shard],
    tensors: Sequence[Tensor],
    rows: list[Tensor],
    collect: Callable[[Tensor, Shard], Tensor],
    arrange: Callable[[Tensor, Shard, Tensor], Tensor],
) -> Iterator[Tensor]:
    """Join rows of one dtype, exchange them in one call, and cut the result."""
    cut: dict[int, Tensor] = {}
    # One call for all parameters of a unit: a call's latency is longer than the transfer of a small one.
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        at = [i for i, t in enumerate(tensors) if t.dtype is dtype]
        widths = [rows[i].shape[1] for i in at]
        whole = collect(rows[at[0]] if len(at) == 1 else torch.cat([rows[i] for i in at], dim=1), shards[at[0]])
        cut.update(zip(at, whole.split(widths, dim=-1), strict=True))
    for i, (shard, t) in enumerate(zip(shards, tensors, strict=True)):
        yield arrange(cut.pop(i), shard, t)  # popped, so that the joined memory goes with its last piece


class Whole(Function):
    """Gathers a parameter; differentiable as often as wanted, for this and handing out are each other's transpose.

    For weights that are read outside the module that is run layer by layer: the graph then keeps them whole.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return gathered([shard], [part])[0]

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor, None]:
        return _Parts.apply(g[0], ctx.shard), None


class _Parts(Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return scattered([shard], [whole])[0]

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor, None]:
        return Whole.apply(g[0], ctx.shard), None
