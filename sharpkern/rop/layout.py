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
        return torch.float64 if all(t.dtype == torch.float64 for t in self.tensors) else torch.float32

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.tensors[0].device

    def empty(self, k: int) -> Tensor:
        """Return memory for k vectors, ``[k, n]``."""
        return empty(k, self.n, self.dtype, self.device)

    def views(self, block: Tensor) -> Iterator[Tensor]:
        """View each parameter's part of a ``[k, n]`` block as ``[k, *shape]``."""
        k = block.shape[0]
        for start, stop, shape in zip(self.offsets, self.offsets[1:], self.shapes, strict=False):
            yield block[:, start:stop].view(k, *shape)


def memory_of(t: Any) -> Any:
    """Return what two tensors on the same memory have in common; an object of its own where there is none."""
    if not isinstance(t, Tensor) or t.layout is not torch.strided:
        return object()
    return t.data_ptr(), t.shape, t.stride(), t.dtype
