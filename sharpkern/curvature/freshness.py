"""Notice that parameters or batch have changed since the primal sweeps ran."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# As whole words and not as numbers: NaN differs from itself, and 0.0 equals -0.0.
_WORDS = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}


class Freshness:
    """Version counters and addresses of tensors, and a few of the parameters' elements, as they were.

    ``p.data.add_(...)`` moves neither counter nor address. So the first, middle and last element of each parameter on
    a CPU are compared too: 0.1 us each, where a checksum would read all of them. On a GPU this would wait for the
    device and is left out.

    Args:
        params: whose elements are looked at.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = list(params)
        self._addresses: list[int] = []

    def renew(self, inputs: Sequence[Tensor]) -> None:
        """Take the present state as the one to compare with.

        Args:
            inputs: tensors of the batch.
        """
        self._tensors = [*self._params, *inputs]
        self._marks = self._present_marks()
        addresses = [p.data_ptr() if p.layout is torch.strided else 0 for p in self._params]
        # Pointers are made anew only where memory has moved: this runs at every refresh.
        if addresses != self._addresses:
            self._addresses = addresses
            self._words = [word for p in self._params if p.device.type == "cpu" for word in _samples(p)]
        self._values = [word.value for word in self._words]

    def holds(self) -> bool:
        """Whether nothing has changed, as far as can be seen; the addresses come first, for they may be freed."""
        return self._present_marks() == self._marks and [word.value for word in self._words] == self._values

    def _present_marks(self) -> list[int]:
        return [mark for t in self._tensors for mark in _marks(t)]


def _marks(t: Tensor) -> tuple[int, int]:
    # Tensors made in inference mode have no counter, and torch raises when asked for it.
    version = 0 if t.is_inference() else t._version
    return version, t.data_ptr() if t.layout is torch.strided else 0


def _samples(p: Tensor) -> list[Any]:
    # Sparse tensors have no elements at an address, and complex128 is wider than any word.
    if not p.numel() or p.layout is not torch.strided or p.element_size() not in _WORDS:
        return []
    word, base, size = _WORDS[p.element_size()], p.data_ptr(), p.element_size()
    return [word.from_address(base + size * _offset(p, i)) for i in sorted({0, p.numel() // 2, p.numel() - 1})]


def _offset(p: Tensor, index: int) -> int:
    """Return where an element lies, in elements from the first."""
    offset = 0
    for length, stride in zip(reversed(p.shape), reversed(p.stride()), strict=True):
        # From the last dimension on, which is how an index in logical order counts; strides say where it lies.
        index, position = divmod(index, length)
        offset += position * stride
    return offset
