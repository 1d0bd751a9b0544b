"""Record a computation once and replay it on the same memory: no Python between the calls, no allocation.

A sweep is a fixed sequence of ATen and kernel calls. On the CPU a recording keeps that sequence, and a replay makes the
same calls again, each writing where it wrote before; on a GPU it is a CUDA graph. Either way what it reads must stay
where it is: parameters, buffers, a copy of the batch. Only the vectors and results of a replay may lie anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ...kernels.cpu import native
from ...kernels.dispatch import interpreted
from .bindings import BINDINGS
from .common import NotReplayableError, Recording, copy_all
from .cuda_graph import CUDAGraph
from .pool import Pool

aten = torch.ops.aten
_MAX_BYTES = 1 << 30  # of a pool; above that, calls are long enough not to need it
_LARGE = 1 << 20  # bytes of vectors and results from which pointing all calls at them costs less than copying them
# Known in torch 2.13 to leave results unwritten when given memory: batch norm those of an input that is not contiguous,
# the losses in more cases. ``_writes_all`` finds them too, but trying the losses makes torch print a warning.
_UNWRITTEN = {
    "aten::_native_batch_norm_legit", "aten::native_batch_norm", "aten::binary_cross_entropy", "aten::_ctc_loss",
}  # fmt: skip
_COPIES = (aten.clone.default, aten._to_copy.default)
_UNSIZED = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


def record(
    computation: Callable[..., None],
    inputs: Sequence[Tensor],
    results: Sequence[Tensor],
    pool: Pool,
    device: torch.device,
    known: Sequence[Tensor] = (),
) -> Recording:
    """Run a computation and return its recording.

    Args:
        computation: ``computation(*inputs, *results)`` reads the ones and writes the others. It makes the same calls
            each time, whatever they hold; reads nothing else that may move.
        inputs: contiguous.
        results: contiguous.
        pool: gives the memory of everything in between; what outlives the computation stays valid while it is held.
        device: of all tensors.
        known: what else the computation may read, and stays where it is: parameters, buffers, constants, a batch. Any
            other tensor was made without torch's dispatcher (by NumPy, say), and would be frozen at its value now.

    Raises:
        NotReplayableError: it cannot be replayed.
    """
    if device.type == "cpu" and interpreted():
        raise NotReplayableError("Triton's interpreter leaves no trace of its calls")
    if device.type == "cuda":
        return CUDAGraph(computation, inputs, results)
    return Tape(computation, inputs, results, pool, known)


class Tape:
    """A list of calls on fixed memory, but for large inputs and results, which are used where they are."""

    def __init__(
        self,
        computation: Callable[..., None],
        inputs: Sequence[Tensor],
        results: Sequence[Tensor],
        pool: Pool,
        known: Sequence[Tensor] = (),
    ) -> None:
        self._large = sum(t.nbytes for t in (*inputs, *results)) >= _LARGE
        mine = [*inputs, *results]
        if not self._large:
            # Fixed places of its own; a replay copies in and out, which for little data beats repointing every call.
            mine = [t.clone() for t in mine]
        self._inputs, self._results = mine[: len(inputs)], mine[len(inputs) :]
        self._recorder = _Recorder(mine if self._large else [], pool, [*mine, *known])
        # Without gradients, here and in replays: a graph would keep every intermediate result.
        with torch.no_grad(), self._recorder, native.recorded(self._recorder.add_native):
            computation(*mine)
        self._calls = [(BINDINGS.get(f, f), args, kwargs) for f, args, kwargs in self._recorder.calls]
        if self._large:
            self._release()
        else:
            copy_all(self._results, results)

    def replay(self, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Make the calls again."""
        with torch.no_grad():
            if self._large:
                self._point_at([*inputs, *results])
            else:
                copy_all(inputs, self._inputs)
            for function, args, kwargs in self._calls:
                function(*args, **kwargs)
            if self._large:
                self._release()
            else:
                copy_all(self._results, results)

    def _point_at(self, tensors: list[Tensor]) -> None:
        storages = [t.untyped_storage() for t in tensors]
        for place, t in self._recorder.places:
            storage = storages[place.tensor]
            offset = tensors[place.tensor].data_ptr() - storage.data_ptr() + place.offset
            # In place: the calls hold these tensor objects, and now see other memory.
            t.set_(storage, offset // t.dtype.itemsize, place.size, place.stride)
        for call, position, tensor, offset in self._recorder.addresses:
            function, args, kwargs = self._calls[call]
            address = tensors[tensor].data_ptr() + offset
            # Compiled kernels take plain addresses, so that here the call itself is written anew.
            self._calls[call] = (function, (*args[:position], address, *args[position + 1 :]), kwargs)

    def _release(self) -> None:
        """Let go of the caller's tensors."""
        self._inputs = self._results = []
        for _, t in self._recorder.places:
            t.data = t.new_empty(0)


class _Place(NamedTuple):
    """A view of one of the tensors that replays bring: which, from which byte on, and its geometry."""

    tensor: int
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


class _Recorder(TorchDispatchMode):
    """Runs each call, moves its results into the pool, and writes down one that puts the same there.

    The calls hold stand-ins, tensors on the same memory that do not keep its blocks, so that these are free once
    the computation is done with them.

    Args:
        moving: tensors that lie elsewhere in each replay.
        pool: gives the memory of everything that the computation makes.
        known: tensors that stay where they are.
    """

    def __init__(self, moving: Sequence[Tensor], pool: Pool, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []
        self.places: list[tuple[_Place, Tensor]] = []  # the stand-ins for views of what moves
        self.addresses: list[tuple[int, int, int, int]] = []  # call, argument, tensor that moves, offset in bytes
        self._kept: list[Tensor] = []  # compiled kernels know it by address only
        self._moving = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in moving]
        self._pool = pool
        self._known = {t.untyped_storage().data_ptr() for t in known}
        self._stand_ins: dict[Any, Tensor] = {}
        self._writes: dict[Any, bool] = {}  # a call's kind -> its overload for given memory writes all results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        kwargs = kwargs or {}
        if _unsized(func, args):
            raise NotReplayableError(f"{func} depends on values")
        # Run as it is, and moved afterwards: nothing has to be known about the op, at the price of one copy.
        result = func(*args, **kwargs)
        # It wrote where it was told to: a replay does so again, and there is no result to find a place for.
        if func._schema.is_mutable:
            self.calls.append((func, *self._held(args, kwargs)))
            return result
        owned = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if _is_view(func) or all(t.untyped_storage().data_ptr() in owned for t in _tensors(result)):
            return result  # nothing but an address; some ops are views in all but name, such as _unsafe_view
        result = pytree.tree_map_only(Tensor, self._moved_to_pool, result)
        # Memory without values: its place is all that matters.
        if not func._schema.name.startswith(("aten::empty", "aten::new_empty")):
            into = self._into(func, args, kwargs, _tensors(result))
            args, kwargs = self._held(args, kwargs)
            self._add(func, args, kwargs, [self._stand_in(t) for t in _tensors(result)], into)
        return result

    def _into(self, func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> tuple[Any, list[str]] | None:
        """Return the overload for given memory if this kind of call can be trusted to it."""
        into = _out_variant(func)
        if into is None or func in _COPIES or len(into[1]) != len(results):  # fewer: some results are None
            return None
        leaves, spec = pytree.tree_flatten((args, kwargs, results))
        kind = (func, spec, *(_kind(x) for x in leaves))
        if kind not in self._writes:
            self._writes[kind] = _writes_all(func, *into, args, kwargs, results)
        return into if self._writes[kind] else None

    def add_native(self, function: Any, addresses: tuple[Any, ...], arguments: tuple[Any, ...]) -> None:
        """Write down a call of a compiled kernel."""
        for position, t in enumerate(arguments):
            if isinstance(t, Tensor) and (tensor := self._which(t)) is not None:
                offset = t.data_ptr() - self._moving[tensor][0]
                self.addresses.append((len(self.calls), position, tensor, offset))
            # A compiled call holds an address, which keeps nothing alive. Blocks of the pool are safe without.
            elif isinstance(t, Tensor) and t not in self._pool:
                self._check_origin(t)
                self._kept.append(t)
        self.calls.append((function, addresses, {}))

    def _add(
        self, func: Any, args: Any, kwargs: Any, results: list[Tensor], into: tuple[Any, list[str]] | None
    ) -> None:
        # One copy; their ``out`` variants make a tensor of their own first, and copy that.
        if func in _COPIES:
            self.calls.append((results[0].copy_, args[:1], {}))
        elif into is None:
            self.calls.append((_copy_results, (func, args, kwargs, results), {}))
        else:
            op, names = into
            self.calls.append((op, args, {**_accepted(op, kwargs), **dict(zip(names, results, strict=True))}))

    def _moved_to_pool(self, t: Tensor) -> Tensor:
        if t.numel() == 0:
            return t
        # The span from first to last number, with the result's own strides: views and kernels further on were chosen by
        # them. An expanded result takes the memory of what it repeats.
        extent = 1 + sum((size - 1) * stride for size, stride in zip(t.size(), t.stride(), strict=True))
        block = self._pool.empty(extent, t.dtype)
        if self._pool.nbytes > _MAX_BYTES:
            raise NotReplayableError(f"it needs more than {_MAX_BYTES >> 20} MiB")
        block.copy_(t.as_strided((extent,), (1,)))
        return block.as_strided(t.size(), t.stride())

    def _held(self, args: Any, kwargs: Any) -> Any:
        return pytree.tree_map_only(Tensor, self._stand_in, (args, kwargs))

    def _stand_in(self, t: Tensor) -> Tensor:
        tensor = self._which(t)
        if tensor is None and t not in self._pool:
            self._check_origin(t)
            return t  # it stays where it is
        # One for all uses of a view; a later result in the same block may share it, for only place and shape count.
        key = (t.data_ptr(), t.dtype, t.size(), t.stride())
        if key not in self._stand_ins:
            if tensor is None:
                self._stand_ins[key] = self._pool.alias(t)
            else:
                # Of a tensor that moves: a replay points this object at the new place.
                alias = torch.empty(0, dtype=t.dtype)
                alias.set_(t.untyped_storage(), t.storage_offset(), t.size(), t.stride())
                self._stand_ins[key] = alias
                place = _Place(tensor, t.data_ptr() - self._moving[tensor][0], t.size(), t.stride())
                self.places.append((place, alias))
        return self._stand_ins[key]

    def _check_origin(self, t: Tensor) -> None:
        if t.numel() and t.untyped_storage().data_ptr() not in self._known:
            raise NotReplayableError(f"a tensor of shape {list(t.shape)} was made without torch's dispatcher")

    def _which(self, t: Tensor) -> int | None:
        """Return which of the moving tensors t is a view of."""
        address = t.data_ptr()
        return next((i for i, (start, stop) in enumerate(self._moving) if start <= address < stop), None)


def _tensors(result: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def _writes_all(func: Any, op: Any, names: list[str], args: Any, kwargs: Any, results: list[Tensor]) -> bool:
    """Run the overload for given memory on memory that holds something else, and compare.

    One that leaves a result unwritten raises nothing, and a replay would read what the memory held before.
    """
    # Not tried: it would draw other numbers, and move the random state.
    if torch.Tag.nondeterministic_seeded in func.tags:
        return False
    given = {name: _unlike(t) for name, t in zip(names, results, strict=True)}
    try:
        op(*args, **_accepted(op, kwargs), **given)
    except RuntimeError:  # it does not take memory of these strides
        return False
    return all(_same(given[name], t) for name, t in zip(names, results, strict=True))


def _unlike(t: Tensor) -> Tensor:
    """Return a tensor of the same shape, strides and dtype that differs from t in every entry."""
    other = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=t.device)
    if t.dtype.is_floating_point or t.dtype.is_complex:
        return other.fill_(math.nan).masked_fill_(t.isnan(), 0)
    return other.copy_(t.bitwise_not())


def _same(a: Tensor, b: Tensor) -> bool:
    # To the bit but for NaNs, whose own bits carry nothing: it is the same computation on the same numbers.
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _kind(x: Any) -> Any:
    return (x.dtype, x.size(), x.stride()) if isinstance(x, Tensor) else str(x)


def _copy_results(func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> None:
    copy_all(_tensors(func(*args, **kwargs)), results)


def _unsized(func: Any, args: Any) -> bool:
    """Whether the shape of the result depends on values."""
    # Indexing has the shape of its indices, unless one is a mask; torch's tag does not tell the two apart.
    if func is aten.index.Tensor:
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    return any(tag in func.tags for tag in _UNSIZED)


@cache
def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None for r in func._schema.returns)


@cache
def _out_variant(func: Any) -> tuple[Any, list[str]] | None:
    """Find the overload that writes into given memory, and the names of its result arguments; None: copy instead."""
    if func._schema.name in _UNWRITTEN:
        return None
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments if a.name not in _FACTORY]
    packet = getattr(aten, func._schema.name.removeprefix("aten::"), None)
    for overload in () if packet is None else packet.overloads():
        op = getattr(packet, overload)
        outs = [a.name for a in op._schema.arguments if a.is_out]
        inputs = [(a.name, str(a.type)) for a in op._schema.arguments if not a.is_out and a.name not in _FACTORY]
        # The same arguments by name and type, or an ``out`` overload of a sibling would be taken.
        if outs and inputs == wanted and len(outs) == len(func._schema.returns):
            return op, outs
    return None


_FACTORY = {"dtype", "layout", "device", "pin_memory", "memory_format"}  # the memory has them already


def _accepted(op: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = {a.name for a in op._schema.arguments}
    return {name: value for name, value in kwargs.items() if name in names}
