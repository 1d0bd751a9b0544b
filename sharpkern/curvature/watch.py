"""What an exported program has frozen: the structure of the modules, and the Python values that their code reads.

``torch.export`` turns a Python number into a constant. So a refresh reads the same values again and compares. Which
ones? Those that the code can name: attributes of a module that one of its class's functions mentions, and the closure,
globals, defaults and bound object of the loss function, as far as its code mentions them.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (int, float, bool, str, complex, type(None), torch.dtype, torch.device)
_MOST = 10_000  # values read in one look; a model's own code names far fewer
_DEEPEST = 6  # objects inside objects
_SMALL_ARRAY = 1 << 12  # bytes of a NumPy array up to which its contents are compared
_TORCHS_OWN = {name for name in vars(nn.Module()) if name != "training"}  # a module's parameters, hooks, ...


class Snapshot:
    """What a module's forward pass depends on besides parameter values, buffers and the batch, as it stood once.

    Args:
        module: a ``LossModule`` or ``FunctionalLoss``.

    Attributes:
        structure: what a new program is needed for at once: modules, modes, parameters, autocast; hashable.
        values: the Python values that the code reads, by where they stand; each is hashable.
        others: modules that the loss function reaches without being among the module's own, such as a teacher.
    """

    def __init__(self, module: nn.Module) -> None:
        reader = _Reader()
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
        self._reads, self._cells = reader.reads, reader.cells
        # Their sizes tell that a submodule or a hook was added or removed, without a look at each of them.
        self._parts = [
            (container, len(container)) for m in (*own, *self.others) for container in (m._modules, *_hooks_of(m))
        ]
        self._params = [p for m in (*own, *self.others) for p in m._parameters.values() if p is not None]
        self._flags = [_flags(p) for p in self._params]
        # The program holds these as constants, on the memory that they had.
        kept = [t for m in self.others for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        self._addresses = [(t, t.data_ptr()) for t in (*kept, *reader.tensors) if t.layout is torch.strided]
        self._modes = _modes()
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
                and all(t.data_ptr() == address for t, address in self._addresses)
                and [_flags(p) for p in self._params] == self._flags
                and _modes() == self._modes
            )
        except (KeyError, IndexError, ValueError, RuntimeError):  # gone, or not to be compared: look again
            return False


class _Reader:
    """One walk over what code can reach."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.modules: dict[int, nn.Module] = {}
        self.reads: list[tuple[Any, Any, Any]] = []  # container, key, and what stood there
        self.cells: list[tuple[types.CellType, Any]] = []
        self.tensors: list[Tensor] = []  # captured, or attributes that are no buffers
        self._seen: set[int] = set()

    def module(self, m: nn.Module, where: str) -> None:
        """Read a module's own attributes; of its parameters and submodules, which ones they are."""
        self.modules[id(m)] = m
        names = names_in_class(_class_of(m))
        attributes = vars(m)
        for name, value in list(attributes.items()):
            if name in names and name not in _TORCHS_OWN:
                self.reads.append((attributes, name, value))
                self.value(value, f"{where}.{name}", names, 0)
        for container in (m._parameters, m._modules):
            self.reads += [(container, name, part) for name, part in container.items()]

    def function(self, f: Any, where: str, depth: int) -> None:
        """Read what a function's code mentions: closure, globals, defaults, the object it is bound to."""
        # Functions may refer to each other in a circle.
        if id(f) in self._seen or depth > _DEEPEST:
            return
        self._seen.add(id(f))
        if isinstance(f, functools.partial):
            self.function(f.func, where, depth + 1)
            self.value([*f.args, *f.keywords.items()], where, frozenset(), depth + 1)
        elif isinstance(f, types.MethodType):
            names = names_in_class(_class_of(f.__self__)) | names_in_code(f.__func__.__code__)
            self.value(f.__self__, f"{where}.__self__", names, depth + 1)
            self.function(f.__func__, where, depth + 1)
        elif isinstance(f, types.FunctionType):
            self._plain_function(f, where, depth)
        # An object with ``__call__``: what its class's functions mention are its values.
        elif f is not None and not isinstance(f, type | types.BuiltinFunctionType | types.ModuleType):
            self.value(f, where, names_in_class(_class_of(f)), depth + 1)

    def _plain_function(self, f: types.FunctionType, where: str, depth: int) -> None:
        if is_library(f.__module__):
            return
        names = names_in_code(f.__code__)
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
            try:
                self.cells.append((cell, cell.cell_contents))
            except ValueError:  # not filled yet
                continue
            self.value(cell.cell_contents, f"{where}: {name}", names, depth + 1)
        for name in names:
            if name in f.__globals__:
                self.reads.append((f.__globals__, name, f.__globals__[name]))
                self.value(f.__globals__[name], f"{where}: {name}", names, depth + 1)
        self.value([*(f.__defaults__ or ()), *(f.__kwdefaults__ or {}).items()], where, names, depth + 1)

    def value(self, value: Any, where: str, names: frozenset[str], depth: int) -> None:
        """Read a value: plain ones are kept, containers and objects are walked."""
        if isinstance(value, _PLAIN):
            # A NaN differs from itself, and would look changed at every refresh.
            self.found[where] = value if value == value else "nan"
        elif len(self.found) >= _MOST or depth > _DEEPEST:
            return
        elif isinstance(value, Tensor):
            self.tensors.append(value)
            # Not its numbers: a captured tensor's memory is read at every run; only another tensor is a change.
            self.found[where] = (id(value), value.dtype, value.shape)
        elif isinstance(value, np.ndarray):
            small = value.nbytes <= _SMALL_ARRAY
            self.found[where] = (id(value), value.tobytes() if small else value.__array_interface__["data"])
        elif isinstance(value, nn.Module):
            self._reached(value, where)
        elif isinstance(value, np.generic):
            self.found[where] = value.item()
        elif isinstance(value, types.FunctionType | types.MethodType | functools.partial):
            self.function(value, where, depth)
        elif isinstance(value, list | tuple | set | frozenset | Mapping) and id(value) not in self._seen:
            self._seen.add(id(value))
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, item in list(items):
                # A set has no keys by which to read an element again.
                if not isinstance(value, set | frozenset):
                    self.reads.append((value, key, item))
                self.value(item, f"{where}[{key!r}]", names, depth + 1)
        elif not isinstance(value, types.ModuleType | type) or not is_library(getattr(value, "__name__", "torch")):
            self._object(value, where, names, depth)

    def _reached(self, m: nn.Module, where: str) -> None:
        """Read a module that is an attribute or in a closure, with all below it."""
        if id(m) in self.modules:
            return
        for name, part in m.named_modules():
            if id(part) not in self.modules:
                self.module(part, f"{where}.{name}" if name else where)

    def _object(self, value: Any, where: str, names: frozenset[str], depth: int) -> None:
        """Read those attributes of an object that the code mentions."""
        if id(value) in self._seen or is_library(type(value).__module__):
            return
        self._seen.add(id(value))
        attributes = getattr(value, "__dict__", {})
        wanted = names | names_in_class(_class_of(value))
        for name, item in attributes.items():
            if name in wanted:
                self.reads.append((attributes, name, item))
                self.value(item, f"{where}.{name}", wanted, depth + 1)


def _class_of(value: Any) -> Any:
    return type(value)


@functools.cache
def names_in_class(cls: Any) -> frozenset[str]:
    """Return all names that the functions of a class mention, those of torch's and Python's base classes apart."""
    names: set[str] = set()
    for base in cls.__mro__:
        # Their functions mention every name that torch itself uses, and would make all attributes look read.
        if base is nn.Module or base is object:
            continue
        for member in vars(base).values():
            function = getattr(member, "__func__", getattr(member, "fget", member))
            # What the constructor alone mentions is read once, before the export.
            if isinstance(function, types.FunctionType) and function.__name__ != "__init__":
                names |= names_in_code(function.__code__)
    return frozenset(names)


@functools.cache
def names_in_code(code: types.CodeType) -> frozenset[str]:
    """Return the names that a piece of code reads, the functions inside it included; not those that it only writes."""
    names: set[str] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith("LOAD_") and isinstance(instruction.argval, str):
            names.add(instruction.argval)  # a string constant too: getattr(self, "scale")
        elif isinstance(instruction.argval, types.CodeType):
            names |= names_in_code(instruction.argval)
    return frozenset(names)


def is_library(module: str | None) -> bool:
    """Whether code belongs to torch, NumPy or Python itself, which keep no numbers of the user's."""
    return (module or "builtins").partition(".")[0] in ("torch", "numpy", "builtins", "functools", "math", "typing")


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
