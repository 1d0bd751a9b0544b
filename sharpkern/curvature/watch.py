"""What an exported program has frozen: the structure of the modules, and the Python values that their code reads.

``torch.export`` turns a Python number into a constant. So a refresh reads the same values again and compares.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..rop.sandbox import was_written
from .reading import Reader


class Snapshot:
    """What a module's forward pass depends on besides parameter values, buffers and the batch, as it stood once.

    Args:
        module: a ``LossModule`` or ``FunctionalLoss``.

    Attributes:
        structure: what a new program is needed for at once: modules, modes, parameters, autocast; hashable.
        values: the Python values that the code reads, by where they stand; each is hashable.
        others: modules that the loss function reaches without being among the module's own, such as a teacher.
        iterators: where the code can reach one; what it gives next cannot be given twice.
        tensors: captured ones, attributes that are no buffers, and all parameters.
        objects: what ``structure`` names by its id, but for the module itself, which stands first there.
    """

    def __init__(self, module: nn.Module) -> None:
        reader = Reader()
        own = list(module.modules())
        for name, m in module.named_modules():
            reader.module(m, name or "the loss")
        loss_fn = getattr(module, "loss_fn", None)
        # A loss that is a module is among the modules read above already.
        if not isinstance(loss_fn, nn.Module):
            reader.function(loss_fn, "loss_fn", 0)
        ids = {id(m) for m in own}
        self.values = reader.found
        self.others = [m for m in reader.modules.values() if id(m) not in ids]
        self.iterators = reader.iterators
        self._reads, self._cells, self._containers = reader.reads, reader.cells, reader.containers
        self._generators = reader.generators
        self._arrays = [(array, array.copy()) for array in reader.arrays]
        # Their sizes tell that a submodule or a hook was added or removed, without a look at each of them.
        self._parts = [
            (container, len(container)) for m in (*own, *self.others) for container in (m._modules, *_hooks_of(m))
        ]
        self._sizes = [(vars(m), len(vars(m))) for m in (*own, *self.others)]  # a ``forward`` of an object's own
        self._params = [p for m in (*own, *self.others) for p in m._parameters.values() if p is not None]
        self.tensors = list({id(t): t for t in (*self._params, *reader.tensors)}.values())
        self._flags = [_flags(p) for p in self._params]
        # The program holds these as constants, on the memory that they had.
        kept = [t for m in self.others for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        self._addresses = [(t, t.data_ptr()) for t in (*kept, *reader.tensors) if t.layout is torch.strided]
        self._modes = _modes()
        self.objects = [*own[1:], *self._params]
        self.structure = (
            *map(id, own), *(m.training for m in own), *(n for _, n in self._parts), *map(id, self._params),
            *self._flags, *(p.shape for p in self._params), *(a for _, a in self._addresses), self._modes,
        )  # fmt: skip

    def holds(self) -> bool:
        """Whether everything still is as it was; a fraction of the time of a new snapshot."""
        try:
            return (
                # Identity first: it is cheaper, and == on arrays or tensors gives no truth value.
                all(container[key] is value or container[key] == value for container, key, value in self._reads)
                and all(cell.cell_contents is value for cell, value in self._cells)
                and all(len(container) == size for container, size in self._parts)
                and all(len(container) == size for container, size in self._sizes)
                and all(t.data_ptr() == address for t, address in self._addresses)
                and [_flags(p) for p in self._params] == self._flags
                and _modes() == self._modes
            )
        except (KeyError, IndexError, ValueError, RuntimeError):  # gone, or not to be compared: look again
            return False

    def put_back(self) -> None:
        """Give every value that was read its old place again; the numbers in tensors are left as they are."""
        for container, contents in self._containers:
            if not _same(container, contents):
                _refill(container, contents)
        # Globals, slots and entries of classes are not among the containers: their other names are none of ours.
        for container, key, value in self._reads:
            if not isinstance(container, tuple) and container[key] is not value:
                container[key] = value
        for cell, value in self._cells:
            cell.cell_contents = value
        for generator, state, set_state in self._generators:
            del generator
            set_state(state)
        for array, values in self._arrays:
            array[...] = values


class Kept:
    """A snapshot, with the numbers of all tensors that a forward pass could write to besides buffers.

    Args:
        module: as for ``Snapshot``.

    Memory: a copy of the parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        self.snapshot = Snapshot(module)
        self._copies = [(t, t.detach().clone()) for t in self.snapshot.tensors]

    def written(self) -> list[str]:
        """Describe the tensors whose numbers have changed."""
        return [f"a tensor of shape {list(t.shape)}" for t, copy in self._copies if was_written(t.detach(), copy)]

    def for_graph(self) -> AbstractContextManager[Any]:
        """Let a graph that is recorded within the block hold copies of these tensors, so that they can be put back."""
        held = {t.untyped_storage().data_ptr() for t, _ in self._copies if t.layout is torch.strided}

        def pack(t: Tensor) -> tuple[Tensor, int]:
            mine = not t.requires_grad and t.layout is torch.strided and t.untyped_storage().data_ptr() in held
            t = t.detach().clone() if mine else t
            return t, t._version

        def unpack(packed: tuple[Tensor, int]) -> Tensor:
            t, version = packed
            # Torch looks itself only where there are no such functions.
            if t._version != version:
                raise RuntimeError("a tensor that the graph needs has been modified by an inplace operation")
            return t

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def put_back(self) -> None:
        """Put values and numbers back; a tensor that was not written is not touched."""
        self.snapshot.put_back()
        with torch.no_grad():
            for t, copy in self._copies:
                if was_written(t.detach(), copy):
                    t.copy_(copy)


def _same(container: Any, contents: Any) -> bool:
    if len(container) != len(contents):
        return False
    if isinstance(container, dict):
        return all(key in container and container[key] is value for key, value in contents.items())
    return container == contents if isinstance(container, set) else all(map(operator.is_, container, contents))


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    container.extend(contents) if isinstance(container, list | deque) else container.update(contents)


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Name the values that differ, or that only one of two looks has.

    Args:
        before, after: ``Snapshot.values``.
    """
    for name in {**before, **after}:
        if before.get(name, _MISSING) != after.get(name, _MISSING):
            yield name


_MISSING = object()


def _hooks_of(m: nn.Module) -> tuple[Any, ...]:
    return m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks


def _flags(p: Tensor) -> tuple[Any, ...]:
    return p.requires_grad, p.dtype, not p._backward_hooks


def _modes() -> tuple[Any, ...]:
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return (*((kind, torch.get_autocast_dtype(kind)) for kind in kinds), torch.get_default_dtype())
