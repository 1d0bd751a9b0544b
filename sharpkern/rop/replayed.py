"""A program whose sweeps are recorded on first use and replayed: for small models Python costs more than arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .program import Program
from .tape import NotReplayableError, Recording, record

_MAX_RECORDINGS = 8  # block sizes seen; beyond, the oldest is dropped
_MAX_MOVES = 3  # times that parameters may move in memory before recording is given up


class ReplayedProgram:
    """The sweeps of a ``Program``, on fixed memory; they run as they are where that is not possible.

    The memory of batch and vectors is this object's own; parameters and buffers are watched, and new addresses (or
    another number of threads) start new recordings.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.fallback_ops = program.fallback_ops
        self._live = not program.fallback_ops  # torch.func inside a recording is not worth the risk
        self._moves = 0
        self._forget()

    def _forget(self) -> None:
        self._recordings: dict[Any, Recording] = {}
        self._blocks: dict[int, Tensor] = {}
        self._leaves: list[Any] | None = None
        self._addresses: Any = None

    def forward(self, module: torch.nn.Module, batch_leaves: Iterable[Any], *, update_buffers: bool = False) -> Tensor:
        """See ``Program.forward``."""
        leaves = list(batch_leaves)
        if not self._live:
            return self.program.forward(module, leaves, update_buffers=update_buffers)
        addresses = self._where(module)
        if addresses != self._addresses:
            self._moves += self._addresses is not None
            self._forget()
            self._live = self._moves <= _MAX_MOVES
            self._addresses = addresses
        if self._leaves is None:
            self._leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        else:
            for mine, leaf in zip(self._leaves, leaves, strict=True):
                if isinstance(mine, Tensor):
                    mine.copy_(leaf.detach())
        static = self._leaves
        loss = self._run("forward", lambda: self.program.forward(module, static))
        if update_buffers:
            self.program.update_buffers(module)
        self._prepared = False
        return loss

    def backward(self) -> Tensor:
        """See ``Program.backward``."""
        return self._run("backward", self.program.backward)

    def hvp(self, block: Tensor) -> Tensor:
        """See ``Program.hvp``."""
        return self._product("hvp", self.program.hvp, block)

    def ggn(self, block: Tensor) -> Tensor:
        """See ``Program.ggn``."""
        return self._product("ggn", self.program.ggn, block)

    def quadratic_form(self, block: Tensor, *, gauss_newton: bool = False) -> Tensor:
        """See ``Program.quadratic_form``."""
        form = partial(self.program.quadratic_form, gauss_newton=gauss_newton)
        return self._product(f"quadratic_form {gauss_newton}", form, block)

    def _product(self, name: str, sweep: Callable[[Tensor], Tensor], block: Tensor) -> Tensor:
        if not self._live:
            return sweep(block)
        if not self._prepared:
            self._run("prepare", self._prepare)
            self._prepared = True
        k = block.shape[0]
        mine = self._blocks.get(k)
        if mine is None:
            mine = self._blocks[k] = torch.empty_like(block)
        mine.copy_(block)
        return self._run((name, k), lambda: sweep(mine))

    def _prepare(self) -> Tensor:
        self.program.prepare()
        return torch.empty(0, device=self.program.layout.device)

    def _run(self, key: Any, sweep: Callable[[], Tensor]) -> Tensor:
        if not self._live:
            return sweep()
        recording = self._recordings.get(key)
        if recording is not None:
            recording.replay()
            return recording.result.clone()
        try:
            recording = record(sweep, self.program.layout.device)
        except NotReplayableError:
            self._live = False
            self._recordings.clear()
            return sweep()
        if len(self._recordings) >= _MAX_RECORDINGS:
            oldest = next(key for key in self._recordings if isinstance(key, tuple))
            del self._recordings[oldest]
        self._recordings[key] = recording
        return recording.result.clone()

    def _where(self, module: torch.nn.Module) -> Any:
        tensors = [*self.program.layout.tensors, *module.parameters(), *module.buffers()]
        return [t.data_ptr() for t in tensors], torch.get_num_threads()
