"""A program whose sweeps are recorded on first use and replayed: for small models Python costs more than arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels.precision import within_tf32_products
from ..program import Program
from ..sandbox import random_state, set_random_state
from .common import NotReplayableError, Recording
from .pool import Pool
from .tape import record

_MOST_VECTORS = 16  # at once: bounds the memory of tangents, which grows with their number
_CACHED = 2 << 20  # bytes of activations above which, on a CPU, a block is slower than its vectors one by one
_MAX_RECORDINGS = 8  # block sizes seen; beyond, the oldest is dropped
_MAX_MOVES = 3  # times that parameters may move in memory before recording is given up


class ReplayedProgram:
    """The sweeps of a ``Program``, on fixed memory; they run as they are where that is not possible.

    The memory of the batch is this object's own; parameters and buffers are watched, and new addresses (or
    another number of threads) start new recordings.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.fallback_ops = program.fallback_ops
        large = program.layout.device.type == "cpu" and program.activation_bytes > _CACHED
        self._at_once = 1 if large else _MOST_VECTORS
        # The fallback keeps autograd's graphs between sweeps, and its first product makes other calls than the next.
        self._live = program.replayable and not program.fallback_ops
        self._moves = 0
        self._forget()

    def _forget(self) -> None:
        self._recordings: dict[Any, Recording] = {}
        self._memory = Pool()
        self._leaves: list[Any] | None = None
        self._addresses: Any = None
        self._known: list[Tensor] = []

    def forward(self, module: torch.nn.Module, batch_leaves: Iterable[Any], *, update_buffers: bool = False) -> Tensor:
        """Return the loss at the present parameters, 0-d; see ``Program.forward``. The batch is copied."""
        leaves = list(batch_leaves)
        if not self._live:
            return self.program.forward(module, leaves, update_buffers=update_buffers)
        addresses = self._where(module)
        if addresses != self._addresses:
            # The recordings hold the old addresses. A loop that moves its parameters at every step would record at
            # every step: after a few moves the sweeps run as they are.
            self._moves += self._addresses is not None
            self._forget()
            self._live = self._moves <= _MAX_MOVES
            self._addresses = addresses
        if self._leaves is None:
            # Copies: the caller's batch lies elsewhere at every step, and a replay reads where it was recorded.
            self._leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            # Everything that a sweep may read without having made it; the recorder refuses other memory.
            fixed = [*self.program.layout.tensors, *module.parameters(), *module.buffers(), *self._leaves]
            fixed += self.program.graph.constants.values()
            self._known = [t for t in fixed if isinstance(t, Tensor) and t.layout is torch.strided]
        else:
            for mine, leaf in zip(self._leaves, leaves, strict=True):
                if isinstance(mine, Tensor):
                    mine.copy_(leaf.detach())
        static = self._leaves
        loss = self.program.empty_loss()
        self._run("forward", lambda out: out.copy_(self.program.forward(module, static)), results=[loss])
        if update_buffers:
            # Outside of the recording: whether they are written changes from call to call.
            self.program.update_buffers(module)
        return loss

    def backward(self) -> None:
        """Prepare gradient and products, after ``forward``; see ``Program.backward``."""
        self._run("backward", self.program.backward)

    def gradient(self) -> Tensor:
        """Return the gradient ``[n]`` at the last ``backward``."""
        result = self.program.layout.empty(1)
        self._run("gradient", self.program.gradient, results=[result])
        return result[0]

    def hvp(self, block: Tensor) -> Tensor:
        """Multiply the Hessian with k vectors: ``[k, n] -> [k, n]``, contiguous; see ``Program.hvp``."""
        return self._product("hvp", self.program.hvp, block, self.program.layout.empty(len(block)))

    def ggn(self, block: Tensor) -> Tensor:
        """Multiply the Gauss-Newton matrix with k vectors: ``[k, n] -> [k, n]``; see ``Program.ggn``."""
        return self._product("ggn", self.program.ggn, block, self.program.layout.empty(len(block)))

    def quadratic_form(self, block: Tensor, *, gauss_newton: bool = False) -> Tensor:
        """Return ``v'Hv`` for k vectors ``[k, n]``: ``[k]`` float64; see ``Program.quadratic_form``."""
        form = partial(self.program.quadratic_form, gauss_newton=gauss_newton)
        total = block.new_empty(block.shape[0], dtype=torch.float64)
        return self._product(f"quadratic_form {gauss_newton}", form, block, total)

    def _product(self, name: str, sweep: Callable[[Tensor, Tensor], None], block: Tensor, result: Tensor) -> Tensor:
        if within_tf32_products():  # a CUDA graph keeps the precision that it was captured in
            name = f"{name}, TF32"
        if len(block) <= self._at_once:  # cutting would take 9 us
            self._run((name, len(block)), sweep, [block], [result])
            return result
        # The last part may be shorter, and has a recording of its own: shapes are fixed in one.
        for part, out in zip(block.split(self._at_once), result.split(self._at_once), strict=True):
            self._run((name, len(part)), sweep, [part], [out])
        return result

    def _run(
        self, key: Any, sweep: Callable[..., None], inputs: Sequence[Tensor] = (), results: Sequence[Tensor] = ()
    ) -> None:
        if not self._live:
            sweep(*inputs, *results)
            return
        recording = self._recordings.get(key)
        if recording is not None:
            recording.replay(inputs, results)
            return
        before = random_state()
        try:
            recording = record(sweep, inputs, results, self._memory, self.program.layout.device, self._known)
        except NotReplayableError:
            # For good: a computation that reads values does so at every call. What rules have saved so far stays valid,
            # for tensors keep their part of the pool alive.
            self._live = False
            self._forget()
            # What was run before it failed may have drawn noise: the sweep must draw the same again, or a seed would
            # not give the masks that it gives the eager model.
            set_random_state(before)
            sweep(*inputs, *results)
            return
        if len(self._recordings) >= _MAX_RECORDINGS:
            # Dictionaries keep their order. The keys of the primal sweeps are plain strings, and these stay.
            oldest = next(key for key in self._recordings if isinstance(key, tuple))
            del self._recordings[oldest]
        self._recordings[key] = recording

    def _where(self, module: torch.nn.Module) -> Any:
        tensors = [*self.program.layout.tensors, *module.parameters(), *module.buffers()]
        # Calls of compiled kernels were recorded with their number of threads.
        return [t.data_ptr() for t in tensors], torch.get_num_threads()
