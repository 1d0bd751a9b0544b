"""Record a computation once and replay it on the same memory: no Python between the calls, no allocation.

A sweep is a fixed sequence of ATen and kernel calls. On the CPU a recording keeps that sequence, with every result's
memory; a replay makes the same calls again, writing into it. On a GPU it is a CUDA graph. Either way the inputs must
stay where they are: parameters, buffers, and copies of the batch and the vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels import native
from ..kernels.dispatch import interpreted

aten = torch.ops.aten
_MAX_BYTES = 32 << 20  # of results a recording keeps; above that, calls are long enough not to need it
_UNSIZED = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


class NotReplayableError(Exception):
    """The computation reads values (``.item()``, ``nonzero``), or its results are too large to keep."""


class Recording(Protocol):
    """A computation that can be run again; ``result`` is overwritten each time."""

    result: Tensor

    def replay(self) -> None:
        """Run it on what its inputs hold now."""


def record(computation: Callable[[], Tensor], device: torch.device) -> Recording:
    """Run a computation and return its recording, with the result of this run.

    Args:
        computation: makes the same calls each time, whatever its inputs hold; reads nothing that may move.
        device: of its tensors.

    Raises:
        NotReplayableError: it cannot be replayed.
    """
    if device.type == "cpu" and interpreted():
        raise NotReplayableError("Triton's interpreter leaves no trace of its calls")
    return CUDAGraph(computation) if device.type == "cuda" else Tape(computation)


class Tape:
    """A list of calls on fixed memory."""

    def __init__(self, computation: Callable[[], Tensor]) -> None:
        recorder = _Recorder()
        self._kept: list[Any] = []  # memory that compiled kernels know by address only
        with torch.no_grad(), recorder, native.recorded(recorder.calls, self._kept):
            self.result = computation()
        self._calls = recorder.calls

    def replay(self) -> None:
        """Make the calls again."""
        with torch.no_grad():
            for function, args, kwargs in self._calls:
                function(*args, **kwargs)


class CUDAGraph:
    """A captured stream of kernels: one launch from the host."""

    def __init__(self, computation: Callable[[], Tensor]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():  # libraries allocate their workspaces outside of the capture
            computation()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.no_grad(), torch.cuda.graph(self._graph):
                self.result = computation()
        except RuntimeError as error:
            raise NotReplayableError(f"CUDA cannot capture it: {error}") from error
        self._graph.replay()

    def replay(self) -> None:
        """Launch the graph."""
        self._graph.replay()


class _Recorder(TorchDispatchMode):
    """Runs each call, and writes down one that puts the same result into the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []
        self._bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        kwargs = kwargs or {}
        if any(tag in func.tags for tag in _UNSIZED):
            raise NotReplayableError(f"{func} depends on values")
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            self.calls.append((func, args, kwargs))
        elif _is_view(func) or func._schema.name.startswith(("aten::empty", "aten::new_empty")):
            return result  # stays valid: it is nothing but an address
        else:
            self._keep(func, args, kwargs, [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)])
        return result

    def _keep(self, func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> None:
        owned = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if all(t.untyped_storage().data_ptr() in owned for t in results):
            return  # a view in all but name, such as _unsafe_view
        self._bytes += sum(t.untyped_storage().nbytes() for t in results)
        if self._bytes > _MAX_BYTES:
            raise NotReplayableError(f"its results need more than {_MAX_BYTES >> 20} MiB")
        into = _out_variant(func)
        if func in (aten.clone.default, aten._to_copy.default):
            self.calls.append((results[0].copy_, args[:1], {}))
        elif into is None or len(into[1]) != len(results):  # fewer: some results are None
            self.calls.append((_copy_results, (func, args, kwargs, results), {}))
        else:
            op, names = into
            self.calls.append((op, args, {**_accepted(op, kwargs), **dict(zip(names, results, strict=True))}))


def _copy_results(func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> None:
    new = [t for t in pytree.tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
    for old, value in zip(results, new, strict=True):
        old.copy_(value)


@cache
def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None for r in func._schema.returns)


@cache
def _out_variant(func: Any) -> tuple[Any, list[str]] | None:
    """Find the overload that writes into given memory, and the names of its result arguments."""
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments if a.name not in _FACTORY]
    packet = getattr(aten, func._schema.name.removeprefix("aten::"), None)
    for overload in () if packet is None else packet.overloads():
        op = getattr(packet, overload)
        outs = [a.name for a in op._schema.arguments if a.is_out]
        inputs = [(a.name, str(a.type)) for a in op._schema.arguments if not a.is_out and a.name not in _FACTORY]
        if outs and inputs == wanted and len(outs) == len(func._schema.returns):
            return op, outs
    return None


_FACTORY = {"dtype", "layout", "device", "pin_memory", "memory_format"}  # the memory has them already


def _accepted(op: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = {a.name for a in op._schema.arguments}
    return {name: value for name, value in kwargs.items() if name in names}
