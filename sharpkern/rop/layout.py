"""Parameters in one flat vector: which part belongs to which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels.cpu.huge_pages import empty


class Layout:
    """Where each parameter lies in a flat vector: the order of ``named_parameters()``, no gaps.

    A tensor that has two names (tied weights) appears once, under its first name.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.names = list(params)
        self.tensors = list(params.values())
        self.shapes = [t.shape for t in self.tensors]
        self.offsets = [0]
        for t in self.tensors:
            self.offsets.append(self.offsets[-1] + t.numel())
        self.n = self.offsets[-1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of flat vectors: float64 when every parameter is, else float32."""
        # Never 16 bits, also where every parameter is: vectors of 8 or 11 significant bits cannot be kept orthogonal,
        # and a solver's residuals would be rounding.
        return torch.float64 if all(t.dtype == torch.float64 for t in self.tensors) else torch.float32

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.tensors[0].device

    def empty(self, k: int) -> Tensor:
        """Return memory for k vectors, ``[k, n]``."""
        # Fresh memory costs a page fault for each page; with pages of 2 MiB a sixth of that.
        return empty(k, self.n, self.dtype, self.device)

    def views(self, block: Tensor) -> Iterator[Tensor]:
        """View each parameter's part of a ``[k, n]`` block as ``[k, *shape]``."""
        k = block.shape[0]
        for start, stop, shape in zip(self.offsets, self.offsets[1:], self.shapes, strict=False):
            # A view also for k > 1, though not contiguous: rows lie n apart and have no gaps within a parameter. Rules
            # write their results through it.
            yield block[:, start:stop].view(k, *shape)


def memory_of(t: Any) -> Any:
    """Return what two tensors on the same memory have in common; an object of its own where there is none."""
    # Sparse tensors have no address. A new object is equal to no other.
    if not isinstance(t, Tensor) or t.layout is not torch.strided:
        return object()
    # An export hands out new tensor objects on the parameters' memory, so ``is`` would not find them.
    return t.data_ptr(), t.shape, t.stride(), t.dtype
