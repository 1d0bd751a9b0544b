"""Ops that look entries up or put them in place: embedding, gather, index, index_put, scatter. All linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.embedding import embedding, embedding_backward, fused
from ..rule import LinearInArgs, align, rule
from .arithmetic import Kind
from .fallback import UnsupportedOpError

aten = torch.ops.aten


@rule(aten.embedding.default)
class Embedding(LinearInArgs):
    """Rows of a table; the row of ``padding_idx`` gets no gradient, as in torch, and is constant along tangents.

    torch's own second derivative moves it in the forward pass alone, which is no symmetric matrix.
    """

    def forward(
        self, table: Tensor, index: Tensor, padding: int = -1, by_count: bool = False, sparse: bool = False
    ) -> Tensor:
        """Save the indices."""
        if by_count or sparse:
            raise UnsupportedOpError(
                "aten.embedding with scale_grad_by_freq or sparse=True is not supported: turn the option off."
            )
        self.index, self.rows = index.reshape(-1), table.shape[0]
        self.lead, self.width = index.shape, table.shape[1]
        # -1 for none: ``torch.nn.functional`` has made a negative index positive.
        self.padding = padding
        return torch.nn.functional.embedding(index, table)

    def tangent(self, dtable: Tensor, _: None = None) -> Tensor:
        """Return the rows of dtable at the indices, zero at the padding's."""
        # One lookup for all k tables, which share the indices.
        dy = embedding(dtable, self.index) if fused(dtable) else dtable.index_select(1, self.index)
        if self.padding >= 0:
            # The row has no gradient, so for a symmetric H it must not move either.
            dy.masked_fill_((self.index == self.padding)[:, None], 0)
        return dy.view(dtable.shape[0], *self.lead, self.width)

    def backward(self, g: Tensor) -> tuple[Tensor, None]:
        """Add up by row; k tables are one tall table."""
        k = g.shape[0]
        if fused(g):
            tables = embedding_backward(g.reshape(k, -1, self.width).contiguous(), self.index, self.rows)
            return self._without_padding(tables), None
        g = g.reshape(-1, self.width)
        if k == 1:
            table = aten.embedding_dense_backward.default(g, self.index, self.rows, self.padding, False)
            return table[None], None
        offset = torch.arange(k, device=g.device)[:, None] * self.rows
        # No padding index here: it would be one row of the tall table, and there are k.
        tall = aten.embedding_dense_backward.default(g, (self.index + offset).view(-1), k * self.rows, -1, False)
        return self._without_padding(tall.view(k, self.rows, self.width)), None

    def _without_padding(self, tables: Tensor) -> Tensor:
        if self.padding >= 0:
            tables[:, self.padding] = 0
        return tables


@rule(aten.index_select.default)
class IndexSelect(LinearInArgs):
    """Slices at given positions along a dimension."""

    def forward(self, x: Tensor, dim: int, index: Tensor) -> Tensor:
        """Save the positions."""
        # ``max(1, ...)``: a 0-d tensor may be indexed along dimension 0 or -1.
        self.shape, self.dim_after_k, self.index = x.shape, dim % max(1, x.ndim) + 1, index.reshape(-1)
        y = x.index_select(dim, index)
        self.after = y.shape
        return y

    def tangent(self, dx: Tensor, _: None = None) -> Tensor:
        """Return the slices of dx at the positions."""
        dx = dx if self.shape else dx[:, None]
        return dx.index_select(self.dim_after_k, self.index).view(dx.shape[0], *self.after)

    def backward(self, g: Tensor) -> tuple[Tensor, None]:
        """Add up by position."""
        k, shape = g.shape[0], self.shape or (1,)
        slices = g.reshape(k, *shape[: self.dim_after_k - 1], len(self.index), *shape[self.dim_after_k :])
        gx = g.new_zeros(k, *shape).index_add_(self.dim_after_k, self.index, slices)
        return gx.view(k, *self.shape), None


class _Along(LinearInArgs):
    """Entries ``index[i]`` along a dimension; 0-d tensors are treated as ``[1]``."""

    def _start(self, x: Tensor, dim: int, index: Tensor) -> None:
        self.shape, self.index_shape = x.shape, index.shape
        self.dim_after_k = dim % max(1, x.ndim) + 1
        self.index = index if index.ndim else index[None]

    def _block(self, d: Tensor) -> Tensor:
        return d if d.ndim > 1 else d[:, None]

    def _index(self, k: int) -> Tensor:
        # A view: the same indices for each vector. ``gather`` and ``scatter`` need one for each entry.
        return self.index.expand(k, *self.index.shape)

    def _take(self, d: Tensor) -> Tensor:
        k = d.shape[0]
        return self._block(d).gather(self.dim_after_k, self._index(k)).view(k, *self.index_shape)

    def _add(self, into: Tensor, d: Tensor) -> Tensor:
        """Add ``d[i]`` to ``into[index[i]]``, in place."""
        return into.scatter_add_(self.dim_after_k, self._index(d.shape[0]), self._block(d))


@rule(aten.gather.default)
class Gather(_Along):
    """``y[i] = x[index[i]]`` along a dimension."""

    def forward(self, x: Tensor, dim: int, index: Tensor, *_: Any) -> Tensor:
        """Save the indices."""
        self._start(x, dim, index)
        return x.gather(dim, index)

    def tangent(self, dx: Tensor, _: None = None) -> Tensor:
        """Return ``dx[index[i]]``."""
        return self._take(dx)

    def backward(self, g: Tensor) -> tuple[Tensor, None]:
        """Add up by position."""
        k = g.shape[0]
        return self._add(g.new_zeros(k, *(self.shape or (1,))), g).view(k, *self.shape), None


@rule(aten.scatter.src, aten.scatter.value, aten.scatter_add.default)
class ScatterTo(_Along):
    """``y = x`` but ``y[index[i]] = src[i]`` (or plus it) along a dimension."""

    def forward(self, x: Tensor, dim: int, index: Tensor, src: Any) -> Tensor:
        """Save the indices."""
        self._start(x, dim, index)
        self.adds = self.op is aten.scatter_add.default
        self.src = src.shape if isinstance(src, Tensor) else None
        if not x.ndim or (self.src is not None and self.src != index.shape):
            # torch reads the part of src that the index covers; the cotangent of the rest would have to be put back.
            raise UnsupportedOpError(f"{self.op} of a 0-d tensor, or with an index smaller than its source.")
        y: Tensor = self.op(x, dim, index, src)
        return y

    def tangent(self, dx: Tensor | None, _: None = None, dsrc: Tensor | None = None) -> Tensor:
        """Put dsrc into dx."""
        if dx is None:
            assert dsrc is not None
            y = dsrc.new_zeros(dsrc.shape[0], *self.shape)
        else:
            # A copy, since dx is another step's too; what is not written stays dx.
            y = dx.clone()
        if self.adds:
            return y if dsrc is None else self._add(y, dsrc)
        index = self._index(y.shape[0])
        return y.scatter_(self.dim_after_k, index, 0 if dsrc is None else dsrc)

    def backward(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """Give src what it put, and x the rest."""
        gx = None
        if self.needs[0]:
            # Where an index occurs twice, torch does not say which source wins, and gives each the whole cotangent.
            gx = g if self.adds else g.scatter(self.dim_after_k, self._index(g.shape[0]), 0)
        gsrc = self._take(g) if self.src is not None and self.needs[2] else None
        return (gx, None, gsrc)[: len(self.needs)]


class _Places(LinearInArgs):
    """Advanced indices ``x[i, :, j]`` with k in front."""

    def _start(self, x: Tensor, indices: list[Tensor | None]) -> None:
        self.shape = x.shape
        positions: list[Tensor | None] = []
        for index in indices:
            masks = index is not None and index.dtype in (torch.bool, torch.uint8)
            # A mask stands for as many indices as it has dimensions. To find them reads values, so that a model with
            # masks runs without its recordings.
            positions += index.nonzero(as_tuple=True) if masks and index is not None else [index]
        given = [i for i, index in enumerate(positions) if index is not None]
        # None takes all of a dimension, here of k.
        self.indices = [None, *positions]
        # torch puts the dimensions of indices that are not adjacent in front, so before k
        adjacent = given == list(range(given[0], given[-1] + 1))
        self.k_at = 0 if adjacent else len(torch.broadcast_shapes(*(p.shape for p in positions if p is not None)))

    def _take(self, d: Tensor) -> Tensor:
        y: Tensor = aten.index.Tensor(d, self.indices)
        return y.movedim(self.k_at, 0) if self.k_at else y

    def _put(self, into: Tensor, d: Tensor, add: bool) -> Tensor:
        """Write d to the places, in place."""
        d = d.movedim(0, self.k_at) if self.k_at else d
        return aten.index_put_.default(into, self.indices, d, add)


@rule(aten.index.Tensor)
class Index(_Places):
    """``y = x[i, :, j]``."""

    def forward(self, x: Tensor, indices: list[Tensor | None]) -> Tensor:
        """Save the indices."""
        self._start(x, indices)
        y: Tensor = self.op(x, indices)
        return y

    def tangent(self, dx: Tensor, _: Any = None) -> Tensor:
        """Return ``dx[i, :, j]``, with k in front."""
        return self._take(dx)

    def backward(self, g: Tensor) -> tuple[Tensor, None]:
        """Add up by position."""
        # Adding, for a position may have been read more than once.
        return self._put(g.new_zeros(g.shape[0], *self.shape), g, True), None


@rule(aten.index_put.default)
class IndexPut(_Places):
    """``y = x`` but ``y[i, :, j] = v`` (or plus it)."""

    def forward(self, x: Tensor, indices: list[Tensor | None], v: Tensor, add: bool = False) -> Tensor:
        """Save the indices."""
        self._start(x, indices)
        self.adds, self.kind = add, Kind.of(v)
        self.place_dims = aten.index.Tensor(x, indices).ndim
        y: Tensor = self.op(x, indices, v, add)
        return y

    def tangent(self, dx: Tensor | None, _: Any = None, dv: Tensor | None = None) -> Tensor:
        """Put dv into dx."""
        if dx is None:
            assert dv is not None
            y = dv.new_zeros(dv.shape[0], *self.shape)
        else:
            y = dx.clone()
        if dv is not None:
            dv = align(dv, self.place_dims)
            # ``index_put`` broadcasts v by itself, but with k in front it would align wrongly.
            return self._put(y, dv.expand(self._take(y).shape), self.adds)
        return y if self.adds else self._put(y, y.new_zeros([1] * (self.place_dims + 1)), False)

    def backward(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """Give v what it put, and x the rest."""
        gx = None
        if self.needs[0]:
            # x has lost the places that were overwritten.
            gx = g if self.adds else self._put(g.clone(), g.new_zeros([1] * (self.place_dims + 1)), False)
        return gx, None, self.kind.cotangent(self._take(g)) if self.needs[2] else None
