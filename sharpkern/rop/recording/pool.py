"""Memory that recordings share: what one call no longer needs, a later call writes over.

A replay makes its calls in the order in which they were recorded. So a block may go to another result as soon as the
recording holds no tensor on it any more; Python's reference counts say when that is, views included.
"""

from __future__ import annotations

import bisect
import ctypes
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

_LINE = 64  # bytes: a cache line, a vector of AVX-512, and how torch aligns its memory
_SMALLEST_SLAB = 1 << 16  # bytes


class _Span(NamedTuple):
    start: int  # address
    size: int  # bytes


class Pool:
    """Blocks of CPU memory for tensors, cut from slabs that are added as needed and live as long as the pool.

    Attributes:
        nbytes: of all slabs.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._slabs: dict[int, Tensor] = {}  # by address
        self._free: list[_Span] = []  # by address, no two adjacent
        self._taken: dict[int, int] = {}  # address -> bytes
        self._returned: list[int] = []  # addresses; a tensor may die at any moment, so its block waits here

    def empty(self, extent: int, dtype: torch.dtype) -> Tensor:
        """Return ``[extent]``, not empty, in a block that is free again once neither it nor a view of it exists."""
        size = -(-extent * dtype.itemsize // _LINE) * _LINE
        start = self._take(size)
        base = self._base(start)
        slab = self._slabs[base].numpy().data
        owner = (ctypes.c_char * size).from_buffer(slab, start - base)  # held by the tensor's storage alone
        weakref.finalize(owner, self._returned.append, start)
        return torch.frombuffer(owner, dtype=dtype, count=extent)

    def __contains__(self, t: Tensor) -> bool:
        return t.untyped_storage().data_ptr() in self._taken

    def alias(self, t: Tensor) -> Tensor:
        """Return a tensor on the same memory as t, which is in the pool, that does not keep its block."""
        start = t.untyped_storage().data_ptr()
        base = self._base(start)
        offset = (start - base) // t.dtype.itemsize + t.storage_offset()
        slab = self._slabs[base].untyped_storage()
        return torch.empty(0, dtype=t.dtype).set_(slab, offset, t.size(), t.stride())

    def _base(self, address: int) -> int:
        return next(base for base, slab in self._slabs.items() if base <= address < base + slab.nbytes)

    def _take(self, size: int) -> int:
        while self._returned:
            self._give(self._returned.pop())
        # The best fit, by a plain search: it runs while recording, and never in a replay.
        fitting = [span for span in self._free if span.size >= size]
        if fitting:
            best = min(fitting, key=lambda span: span.size)
            self._free.remove(best)
        else:
            slab = torch.empty(max(size, _SMALLEST_SLAB), dtype=torch.uint8)
            best = _Span(slab.data_ptr(), slab.nbytes)
            # Never given back before the pool goes: calls of a recording hold addresses in it.
            self._slabs[best.start] = slab
            self.nbytes += slab.nbytes
        if best.size > size:
            bisect.insort(self._free, _Span(best.start + size, best.size - size))
        self._taken[best.start] = size
        return best.start

    def _give(self, start: int) -> None:
        span = _Span(start, self._taken.pop(start))
        at = bisect.bisect(self._free, span)
        if at < len(self._free) and self._free[at].start == start + span.size:
            span = _Span(start, span.size + self._free.pop(at).size)
        if at and sum(self._free[at - 1]) == start:
            at -= 1
            before = self._free.pop(at)
            span = _Span(before.start, before.size + span.size)
        self._free.insert(at, span)
