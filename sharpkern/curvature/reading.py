"""The Python values that a loss's code can reach: attributes, closures, globals, what classes and modules hold.

Which ones? Those that the code can name: attributes of a module that one of its class's functions mentions, and the
closure, globals, defaults and bound object of each function that ``forward`` or the loss leads to.
"""

from __future__ import annotations

import collections.abc
import dis
import functools
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (int, float, bool, str, complex, type(None), torch.dtype, torch.device)
_MOST = 10_000  # values read in one look; a model's own code names far fewer
_DEEPEST = 6  # objects inside objects
_SMALL_ARRAY = 1 << 12  # bytes of a NumPy array up to which its contents are compared
_TORCHS_OWN = {name for name in vars(nn.Module()) if name != "training"}  # a module's parameters, hooks, ...
_LIBRARIES = {
    "torch", "numpy", "builtins", "functools", "math", "typing", "logging", "re", "abc", "warnings", "inspect",
}  # fmt: skip
_FORWARD = frozenset({"forward"})
# Their modules' attributes are read like a user's; their globals are thousands of functions, and anneal nothing.
_FRAMEWORKS = {
    "transformers", "peft", "accelerate", "diffusers", "huggingface_hub", "lightning", "pytorch_lightning", "timm",
    "torchvision", "torchaudio", "einops", "scipy", "triton",
}  # fmt: skip
# What they keep around a model, in attributes of its own too, is the training loop's: no forward pass reads it.
_TRAINERS = {"lightning", "pytorch_lightning", "lightning_fabric", "accelerate"}
_FUNCTIONS: tuple[type, ...] = (types.FunctionType, types.MethodType, functools.partial)
_CONTAINERS: tuple[type, ...] = (list, tuple, set, frozenset, collections.deque, collections.abc.Mapping)


class Reader:
    """One walk over what code can reach.

    Attributes:
        found: where a value stands -> what stands there; each is hashable. A tensor by its identity.
        reads: container, key, and what stood there.
        cells: of closures, with what they held.
        containers: what the code may change, with a copy of its contents: ``__dict__``s, lists, sets, mappings.
        generators: a generator of random numbers, its state, and the call that sets it.
        iterators: where there is one, which nobody can rewind.
        modules: by id, those of closures included.
        tensors: captured, or attributes that are no buffers.
        arrays: small ones of NumPy.
    """

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.reads: list[tuple[Any, Any, Any]] = []
        self.cells: list[tuple[types.CellType, Any]] = []
        self.containers: list[tuple[Any, Any]] = []
        self.generators: list[tuple[Any, Any, Callable[[Any], Any]]] = []
        self.iterators: list[str] = []
        self.modules: dict[int, nn.Module] = {}
        self.tensors: list[Tensor] = []
        self.arrays: list[np.ndarray[Any, Any]] = []
        self._seen: set[int] = set()
        self._classes: set[tuple[type, frozenset[str]]] = set()
        self._names: dict[Any, frozenset[str]] = {}

    def module(self, m: nn.Module, where: str) -> None:
        """Read a module's own attributes and hooks; of its parameters and submodules, which ones they are."""
        self.modules[id(m)] = m
        names = self._names_in_class(type(m))
        attributes = vars(m)
        self.containers.append((attributes, dict(attributes)))
        for name, value in list(attributes.items()):
            # A ``forward`` of the object's own stands before its class's, though nothing mentions it.
            if (name in names and name not in _TORCHS_OWN) or name == "forward":
                self.reads.append((attributes, name, value))
                self.value(value, f"{where}.{name}", names, 0)
        for container in (m._parameters, m._modules):
            self.reads += [(container, name, part) for name, part in container.items()]
        for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values()):
            self.function(hook, f"{where}'s hook", 0)
        self._class(type(m), _FORWARD, 0)

    def function(self, f: Any, where: str, depth: int) -> None:
        """Read what a function's code mentions: closure, globals, defaults, the object it is bound to."""
        # Functions may refer to each other in a circle.
        if id(f) in self._seen or depth > _DEEPEST:
            return
        self._seen.add(id(f))
        if isinstance(f, functools.partial):
            self.function(f.func, where, depth + 1)
            self.value(f.args, where, frozenset(), depth + 1)
            self.value(f.keywords, where, frozenset(), depth + 1)
        elif isinstance(f, types.MethodType):
            names = self._names_in_class(type(f.__self__)) | names_in_code(f.__func__.__code__)
            self.value(f.__self__, f"{where}.__self__", names, depth + 1)
            self.function(f.__func__, where, depth + 1)
        elif isinstance(f, types.FunctionType):
            self._plain_function(f, where, depth)
        # An object with ``__call__``: what its class's functions mention are its values.
        elif f is not None and not isinstance(f, type | types.BuiltinFunctionType | types.ModuleType):
            self.value(f, where, self._names_in_class(type(f)) | {"__call__"}, depth + 1)

    def _plain_function(self, f: types.FunctionType, where: str, depth: int) -> None:
        if is_standard(f.__module__):
            return
        # By its code: a lambda that is made anew at each pass is another object, but the same function.
        self.found[where] = id(f.__code__)
        names = names_in_code(f.__code__)
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
            try:
                self.cells.append((cell, cell.cell_contents))
            except ValueError:  # not filled yet
                continue
            self.value(cell.cell_contents, f"{where}: {name}", names, depth + 1)
        for name in globals_in_code(f.__code__):
            if name in f.__globals__:
                self.reads.append((f.__globals__, name, f.__globals__[name]))
                self.value(f.__globals__[name], f"{where}: {name}", names, depth + 1)
        for defaults in (f.__defaults__, f.__kwdefaults__):
            self.value(defaults, f"{where}'s defaults", names, depth + 1)

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
            if small:
                self.arrays.append(value)
            self.found[where] = (id(value), value.tobytes() if small else value.__array_interface__["data"])
        elif isinstance(value, nn.Module):
            self._reached(value, where)
        elif isinstance(value, np.generic):
            self.found[where] = value.item()
        elif isinstance(value, _FUNCTIONS):
            self.function(value, where, depth)
        elif isinstance(value, _CONTAINERS):
            self._container(value, where, names, depth)
        elif (state := _state_of(value)) is not None:
            self.found[where] = repr(state[0])
            self.generators.append((value, *state))
        elif isinstance(value, Iterator):
            self.iterators.append(where)
        elif isinstance(value, type | types.ModuleType):
            if isinstance(value, type):
                self._class(value, names, depth)
            elif not is_standard(value.__name__):
                self._members(value, names, depth)
        else:
            self._object(value, where, names, depth)

    def _container(self, value: Any, where: str, names: frozenset[str], depth: int) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, list | set | dict | collections.deque):
            self.containers.append((value, copy_of(value)))
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in list(items):
            # A set has no keys by which to read an element again.
            if not isinstance(value, set | frozenset):
                self.reads.append((value, key, item))
            self.value(item, f"{where}[{key!r}]", names, depth + 1)

    def _reached(self, m: nn.Module, where: str) -> None:
        """Read a module that is an attribute or in a closure, with all below it."""
        if id(m) in self.modules:
            return
        for name, part in m.named_modules():
            if id(part) not in self.modules:
                self.module(part, f"{where}.{name}" if name else where)

    def _object(self, value: Any, where: str, names: frozenset[str], depth: int) -> None:
        """Read those attributes of an object that the code mentions."""
        if id(value) in self._seen or is_trainers(type(value)):
            return
        self._seen.add(id(value))
        # A library's object, such as an optimizer: what the user's code names, and what a function named there reads.
        library = is_library(type(value).__module__)
        wanted = names | (_named_functions(type(value), names) if library else self._names_in_class(type(value)))
        attributes = getattr(value, "__dict__", {})
        for name, item in list(attributes.items()):
            if name in wanted:
                self.reads.append((attributes, name, item))
                self.value(item, f"{where}.{name}", wanted, depth + 1)
        if library:
            return
        self.containers.append((attributes, dict(attributes)))
        for name in _slots(type(value)) & wanted:
            if hasattr(value, name):
                slots = Slots(value)
                self.reads.append((slots, name, slots[name]))
                self.value(slots[name], f"{where}.{name}", wanted, depth + 1)
        self._class(type(value), names, depth)

    def _members(self, holder: Any, names: frozenset[str], depth: int) -> None:
        """Read what code names of a Python module."""
        if id(holder) in self._seen:
            return
        self._seen.add(id(holder))
        for name in names & vars(holder).keys():
            self.reads.append((vars(holder), name, vars(holder)[name]))
            self.value(vars(holder)[name], f"{holder.__name__}.{name}", names, depth + 1)

    def _class(self, cls: type, entries: frozenset[str], depth: int) -> None:
        """Read the functions of a class that the entries lead to, and the class attributes that these mention."""
        if (cls, entries) in self._classes or all(is_standard(base.__module__) for base in cls.__mro__):
            return
        self._classes.add((cls, entries))
        waiting, done = list(entries), set()
        while waiting:
            name = waiting.pop()
            if name in done:
                continue
            done.add(name)
            for base in cls.__mro__:
                if name not in vars(base):
                    continue
                if not is_standard(base.__module__) and (base, name) not in self._names:
                    waiting += self._member(base, name, depth)
                elif (base, name) in self._names:
                    waiting += self._names[base, name]
                break

    def _member(self, base: type, name: str, depth: int) -> frozenset[str]:
        """Read one entry of a class; return the names that it mentions."""
        member = vars(base)[name]
        function = _function_of(member)
        names = names_in_code(function.__code__) if function is not None else frozenset()
        self._names[base, name] = names
        self.reads.append((Slots(base), name, member))
        where = f"{base.__name__}.{name}"
        if function is not None:
            self.function(function, where, depth)
        elif isinstance(member, (*_PLAIN, Tensor, np.ndarray, list, tuple, dict)):
            self.value(member, where, frozenset(), depth)
        return names

    def _names_in_class(self, cls: type) -> frozenset[str]:
        if cls not in self._names:
            self._names[cls] = names_in_class(cls)
        return self._names[cls]


class Slots:
    """An object's ``__slots__``, or the entries of a class, read and written like a mapping."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __getitem__(self, name: str) -> Any:
        # Of a class the entry itself: its attribute would be another bound method at each look.
        return vars(self.owner)[name] if isinstance(self.owner, type) else getattr(self.owner, name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self.owner, name, value)


def copy_of(container: Any) -> Any:
    """Return a copy of a list, set, deque or mapping, of a plain class, without calling the container's own."""
    for kind in (list, set, collections.deque):
        if isinstance(container, kind):
            return kind(container)
    return dict(container)


def _state_of(value: Any) -> tuple[Any, Callable[[Any], Any]] | None:
    """Return the state of a generator of random numbers and the call that sets it; None for anything else."""
    if isinstance(value, torch.Generator):
        return value.get_state().tolist(), lambda state: value.set_state(torch.tensor(state, dtype=torch.uint8))
    if isinstance(value, random.Random):
        return value.getstate(), value.setstate
    if isinstance(value, np.random.RandomState):
        return value.get_state(), value.set_state
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state, lambda state: setattr(value.bit_generator, "state", state)
    return None


def _function_of(member: Any) -> types.FunctionType | None:
    """Return the function behind a method, a static or class method, or a property."""
    function = getattr(member, "__func__", getattr(member, "fget", getattr(member, "func", member)))
    return function if isinstance(function, types.FunctionType) else None


def _named_functions(cls: type, names: frozenset[str]) -> frozenset[str]:
    """Return what those functions of a class mention that the names lead to directly, such as ``get_last_lr``."""
    found: set[str] = set()
    for name in names:
        if (function := _function_of(getattr(cls, name, None))) is not None:
            found |= names_in_code(function.__code__)
    return frozenset(found)


def _slots(cls: type) -> frozenset[str]:
    slots: set[str] = set()
    for base in cls.__mro__:
        own = vars(base).get("__slots__", ())
        slots |= {own} if isinstance(own, str) else set(own)
    return frozenset(slots)


def names_in_class(cls: Any) -> frozenset[str]:
    """Return all names that the functions of a class mention, those of torch's and Python's base classes apart."""
    # Their functions mention every name that torch itself uses, and would make all attributes look read.
    bases = [b for b in cls.__mro__ if b is not nn.Module and b is not object and not is_trainers(b)]
    functions = [_function_of(member) for base in bases for member in vars(base).values()]
    # What the constructor alone mentions is read once, before the export.
    return _names_in_all(tuple(f.__code__ for f in functions if f is not None and f.__name__ != "__init__"))


@functools.cache
def _names_in_all(codes: tuple[types.CodeType, ...]) -> frozenset[str]:
    return frozenset().union(*map(names_in_code, codes))


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


@functools.cache
def globals_in_code(code: types.CodeType) -> frozenset[str]:
    """Return the globals that a piece of code reads: an attribute or a local variable may have a global's name."""
    names: set[str] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(instruction.argval)
        elif isinstance(instruction.argval, types.CodeType):
            names |= globals_in_code(instruction.argval)
    return frozenset(names)


def is_library(module: str | None) -> bool:
    """Whether code belongs to torch, NumPy or Python itself, which keep no numbers of the user's."""
    return (module or "builtins").partition(".")[0] in _LIBRARIES


def is_trainers(cls: type) -> bool:
    """Whether a class belongs to a library that trains other people's modules."""
    return cls.__module__.partition(".")[0] in _TRAINERS


def is_standard(module: str | None) -> bool:
    """Whether functions, classes and globals are not a user's; an object of such a class may be."""
    root = (module or "").partition(".")[0]
    return is_library(module) or root in sys.stdlib_module_names or root in _FRAMEWORKS
