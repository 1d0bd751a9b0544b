"""Run a user's module so that the run leaves no trace: buffers, random states, and checkpoints that differentiate."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import checkpoint as checkpointing

RandomState = tuple[Tensor, dict[int, Tensor]]

# Held while a user's module runs or is exported: what torch.export, this file and its users change meanwhile (buffers,
# random states, flags of parameters, functions of torch) belongs to all threads.
user_code = threading.RLock()


@contextmanager
def buffers_on_copies(modules: Iterable[nn.Module], *, updated: nn.Module | None = None) -> Iterator[None]:
    """Let the modules work on copies of their buffers, also where the forward pass binds a buffer anew.

    The originals are neither written nor counted as changed: a graph that saved one of the copies stays valid, which
    it would not if old values were copied back. Only the buffers of ``updated`` get what the pass left in the copies.
    """
    copies: dict[int, Tensor] = {}  # a buffer that two modules share has one copy
    before: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
    for module in {id(m): m for root in modules for m in root.modules()}.values():
        if not module._buffers:
            continue
        before.append((module, dict(module._buffers)))
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = copies.setdefault(id(b), b.detach().clone())
    to_update = set() if updated is None else {id(m) for m in updated.modules()}
    try:
        yield
    except BaseException:
        # A pass that failed half way has left half of its statistics.
        to_update.clear()
        raise
    finally:
        for module, buffers in before:
            if id(module) in to_update:
                buffers |= _taken_over(buffers, module._buffers)
            module._buffers.clear()
            module._buffers.update(buffers)


def _taken_over(originals: dict[str, Tensor | None], left: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Write what the pass left into the originals; return the buffers that cannot be written in place."""
    new: dict[str, Tensor | None] = {}
    for name, value in left.items():
        original = originals.get(name)
        if original is None or value is None or value.shape != original.shape or value.dtype != original.dtype:
            new[name] = value if value is None or value is original else value.detach()
        # Written only where the pass wrote, so that the version counter of an untouched buffer does not move.
        elif was_written(value, original):
            with torch.no_grad():
                original.copy_(value)
    return new


def was_written(now: Tensor, before: Tensor) -> bool:
    """Whether a buffer differs from a copy of it that was taken before."""
    if now.layout is torch.strided:
        return not torch.equal(now, before)  # by value: batch norm writes without counting a new version
    return now._version > 0  # torch does not compare sparse tensors


@contextmanager
def restored_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put old values back into buffers that were written: for an export, which must see the buffers' own memory."""
    before = [(b, b.clone()) for m in modules for b in m._buffers.values() if b is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for b, value in before:
                # An untouched buffer is not written to: that too would count as a change.
                if was_written(b, value):
                    b.copy_(value)


@contextmanager
def kept_random_states(devices: Iterable[torch.device]) -> Iterator[None]:
    """Put the random states of torch, Python and NumPy back afterwards."""
    # Only the devices in use: by default ``fork_rng`` copies the state of every GPU of the machine.
    indices = sorted({d.index or 0 for d in devices if d.type == "cuda"})
    # The generators that user code draws from are the global ones.
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(indices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def same_noise(devices: Iterable[torch.device]) -> Iterator[None]:
    """Let torch draw the same random numbers every time; those of Python and NumPy go on. Put all states back."""
    devices = set(devices)
    with kept_random_states(devices):
        # Not ``torch.manual_seed``: it would seed the GPUs whose states are not kept too.
        torch.default_generator.manual_seed(0)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.default_generators[device.index or 0].manual_seed(0)
        yield


def random_state() -> RandomState:
    """Return the state of torch's global generators: the CPU's, and each CUDA device's in use, by index."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return torch.get_rng_state(), {i: torch.cuda.get_rng_state(i) for i in devices}


def set_random_state(state: RandomState) -> None:
    """Set what ``random_state`` returned, so that noise is drawn again."""
    torch.set_rng_state(state[0])
    for index, cuda in state[1].items():
        torch.cuda.set_rng_state(cuda, index)


class RandomStates:
    """The random states of torch, Python and NumPy as they are now, to run something once more with the same noise."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._torch = device, random_state()
        self._python, self._numpy = random.getstate(), np.random.get_state()  # noqa: NPY002

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within the block, the states are those kept; afterwards, what they were before it."""
        with kept_random_states({self.device}):
            set_random_state(self._torch)
            random.setstate(self._python)
            np.random.set_state(self._numpy)  # noqa: NPY002
            yield


@contextmanager
def differentiable_checkpoints() -> Iterator[None]:
    """Run reentrant checkpoints as non-reentrant ones, which give the same gradient.

    A reentrant one runs under ``no_grad``, so that an export sees no gradient pass it, and torch refuses
    ``autograd.grad`` through it.
    """

    def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        return checkpointing.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)

    if "apply" in vars(checkpointing.CheckpointFunction):  # within another such block already
        yield
        return
    checkpointing.CheckpointFunction.apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        del checkpointing.CheckpointFunction.apply  # what it inherits shows again


@contextmanager
def requiring_grad(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let the tensors require a gradient within the block, with gradients recorded."""
    # A list first: the flags are about to change, and only these are put back.
    frozen = [t for t in tensors if not t.requires_grad]
    for t in frozen:
        t.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for t in frozen:
            t.requires_grad_(False)


@contextmanager
def without_trace(modules: Iterable[nn.Module], devices: Iterable[torch.device]) -> Iterator[None]:
    """Keep buffers and random states as they are, and let reentrant checkpoints be differentiated."""
    with ExitStack() as stack:
        stack.enter_context(kept_random_states(devices))
        stack.enter_context(buffers_on_copies(modules))
        stack.enter_context(differentiable_checkpoints())
        yield
