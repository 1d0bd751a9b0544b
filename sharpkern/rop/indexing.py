"""Ops that look entries up: embedding, gather, index, index_select, and their scatters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fallback import UnsupportedOpError
from .rule import LinearInArgs, rule

aten = torch.ops.aten


@rule(aten.embedding.default)
class Embedding(LinearInArgs):
    """Rows of a table; the row of ``padding_idx`` gets no gradient, as in torch."""

    def forward(
        self, table: Tensor, index: Tensor, padding: int = -1, by_count: bool = False, sparse: bool = False
    ) -> Tensor:
        """Save the indices."""
        if by_count or sparse:
            raise UnsupportedOpError("embedding with scale_grad_by_freq or sparse=True is not supported: turn it off.")
        self.index, self.rows = index.reshape(-1), table.shape[0]
        self.lead = index.shape
        self.padding = padding if padding >= 0 else None
        return torch.nn.functional.embedding(index, table)

    def tangent(self, dtable: Tensor, _: None = None) -> Tensor:
        """Look up."""
        return dtable.index_select(1, self.index).view(dtable.shape[0], *self.lead, -1)

    def backward(self, g: Tensor) -> tuple[Tensor, None]:
        """Add up by row."""
        k, width = g.shape[0], g.shape[-1]
        g = g.reshape(k, -1, width)
        padding = -1 if self.padding is None else self.padding
        parts = [aten.embedding_dense_backward(part, self.index, self.rows, padding, False) for part in g]
        table = torch.stack(parts) if k > 1 else parts[0][None]
        return table, None


@rule(aten.index_select.default)
class IndexSelect(LinearInArgs):
    """Slices at given positions along a dimension."""

    def forward(self, x: Tensor, dim: int, index: Tensor) -> Tensor:
        """Save the positions."""
        self.dim, self.index, self.shape = dim % x.ndim, index, x.shape
        return x.index_select(dim, index)

    def tangent(self, dx: Tensor, _: None = None) -> Tensor:
        """Look up."""
        return dx.index_select(self.dim + 1, self.index)

    def backward(self, g: Tensor) -> tuple[Tensor, None]:
        """Add up by position."""
        return g.new_zeros(g.shape[0], *self.shape).index_add_(self.dim + 1, self.index, g), None


@rule(aten.gather.default)
class Gather(LinearInArgs):
    """``y[i] = x[index[i]]`` along a dimension."""

    def forward(self, x: Tensor, dim: int, index: Tensor, *_: Any) -> Tensor:
        """Save the indices."""
        self.dim, self.index, self.shape = dim % max(1, x.ndim), index, x.shape
        return x.gather(dim, index)

    def tangent(self, dx: Tensor, _: None = None) -> Tensor:
        """Look up."""
        return dx.gather(self.dim + 1, self.index.expand(dx.shape[0], *self.index.shape))

    def backward(self, g: Tensor) -> tuple[Tensor, None]:
        """Add up by position."""
        gx = g.new_zeros(g.shape[0], *self.shape)
        return gx.scatter_add_(self.dim + 1, self.index.expand(g.shape), g), None


@rule(aten.index.Tensor)
class Index(LinearInArgs):
    """Advanced indexing ``x[i, :, j]``."""

    def forward(self, x: Tensor, indices: list[Tensor | None]) -> Tensor:
        """Save the indices, one dimension further."""
        self.shape = x.shape
        y: Tensor = self.op(x, indices)
        # k must stay in front, where advanced indices that are not adjacent would put their own dimensions.
        given = [i for i, index in enumerate(indices) if index is not None]
        self.adjacent = given == list(range(given[0], given[-1] + 1))
        self.indices: list[Tensor | None] = [None, *indices]
        self.result_dims = y.ndim
        self.index_dims = torch.broadcast_shapes(*(i.shape for i in indices if i is not None and i.dtype != torch.bool))
        self.boolean = any(i is not None and i.dtype == torch.bool for i in indices)
        if self.boolean and not self.adjacent:
            raise UnsupportedOpError("index with boolean masks on dimensions that are not adjacent is not supported.")
        return y

    def tangent(self, dx: Tensor, _: Any = None) -> Tensor:
        """Look up."""
        y: Tensor = self.op(dx, self.indices)
        return y if self.adjacent else y.movedim(len(self.index_dims), 0)

    def backward(self, g: Tensor) -> tuple[Tensor, None]:
        """Add up by position."""
        g = g if self.adjacent else g.movedim(0, len(self.index_dims))
        k = g.shape[0] if self.adjacent else g.shape[len(self.index_dims)]
        return aten.index_put(g.new_zeros(k, *self.shape), self.indices, g, True), None
