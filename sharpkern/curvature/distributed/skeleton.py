"""A twin of a model under ``fully_shard`` without its hooks, whose weights are gathered where they are used.

The twin's modules share everything with the model's but parameters, hooks of FSDP and their class: a subclass of the
original one that looks parameters up among the shards. Nothing of FSDP's own state is touched.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...optimizers.parts import is_spread
from ..wrappers import is_fully_sharded
from .blocks import Call
from .shards import Shard, Whole

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _View:
    """Where the twin's modules find weights: those that are whole at the moment, else gathered on the spot."""

    def __init__(self, shards: Mapping[int, Shard]) -> None:
        self.shards = shards  # id of a parameter -> its shard
        self.whole: dict[int, Tensor] = {}

    def weight(self, key: int) -> Tensor:
        found = self.whole.get(key)
        return Whole.apply(self.shards[key].part, self.shards[key]) if found is None else found

    @contextmanager
    def using(self, keys: Sequence[int], weights: Sequence[Tensor]) -> Iterator[None]:
        self.whole = dict(zip(keys, weights, strict=True))
        try:
            yield
        finally:
            self.whole = {}


def twin_of(model: nn.Module, shards: Mapping[int, Shard]) -> nn.Module:
    """Return the twin of a model.

    A module is run as one ``Call`` if it holds shards, no module under ``fully_shard`` lies within it, and it is not
    part of a module of that kind: so FSDP's own units, and what lies between them.

    Args:
        model: with modules under ``fully_shard``, resharded.
        shards: id of each sharded parameter -> its shard.

    Raises:
        ValueError: a module keeps parameters or other modules where they cannot be replaced.
    """
    view = _View(shards)
    # All twins first: a module may stand at several places.
    ids = {id(m) for m in model.modules()}
    twins: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        _check_attributes(name, module, ids)
        twins[id(module)] = _bare_twin(module, view)
    for module in model.modules():
        twins[id(module)]._modules = {k: m if m is None else twins[id(m)] for k, m in module._modules.items()}
    for name, module in _units(model, "the model"):
        _run_as_call(name, twins[id(module)], _keys_below(module), view)
    return twins[id(model)]


def _bare_twin(module: nn.Module, view: _View) -> nn.Module:
    # Without __init__, which would draw new weights; without deepcopy, which FSDP forbids.
    twin: nn.Module = object.__new__(_class_for(_own_class(module)))
    state = dict(vars(module))  # buffers are shared with the module, as a container: it sees new ones
    spread = {name: id(p) for name, p in module._parameters.items() if is_spread(p)}
    # A sharded parameter that is found among the others would bypass the gather.
    state["_parameters"] = {name: p for name, p in module._parameters.items() if name not in spread}
    # The user's hooks stay. FSDP's would gather into the model's own parameters.
    for kind in _HOOKS:
        state[kind] = type(state[kind])((k, h) for k, h in state[kind].items() if not _is_fsdps(h))
    vars(twin).update(state, _sharded=spread, _view=view, _call=None)
    return twin


def _units(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Find the modules that are run as one call: as large as possible without a fully sharded module inside."""
    # With a unit inside, whole weights of this module would outlive that unit's call.
    inside = any(is_fully_sharded(m) for m in module.modules() if m is not module)
    if not inside and not isinstance(module, _CONTAINERS):
        if _keys_below(module):
            yield name, module
        return
    for child_name, child in module.named_children():
        yield from _units(child, child_name if name == "the model" else f"{name}.{child_name}")


def _keys_below(module: nn.Module) -> list[int]:
    return [id(p) for p in module.parameters() if is_spread(p)]


def _run_as_call(name: str, twin: nn.Module, keys: list[int], view: _View) -> None:
    def run(args: Any, kwargs: Any, weights: Sequence[Tensor]) -> Any:
        with view.using(keys, weights):
            return plain_call(twin, *args, **kwargs)

    plain_call = type(twin).__bases__[0].__call__  # the twin's own makes the ``Call`` that this is within

    # A new Call each time: a module may be called twice, with other arguments and noise.
    vars(twin)["_call"] = lambda: Call(name, run, twin, [view.shards[key] for key in keys])


@functools.cache
def _class_for(cls: Any) -> Any:
    """Return a subclass that finds its parameters among the shards, and may run as one ``Call``."""

    def find(self: nn.Module, name: str) -> Any:
        key = vars(self)["_sharded"].get(name)
        # nn.Module keeps parameters out of reach of normal attribute access, so they all come here.
        return cls.__getattr__(self, name) if key is None else vars(self)["_view"].weight(key)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        make = vars(self)["_call"]
        return cls.__call__(self, *args, **kwargs) if make is None else make()(args, kwargs)

    return type(cls.__name__, (cls,), {"__getattr__": find, "__call__": call, "__module__": cls.__module__})


def _own_class(module: nn.Module) -> Any:
    """Return the class that ``fully_shard`` has replaced by a subclass."""
    cls = type(module)
    return next(b for b in cls.__bases__ if issubclass(b, nn.Module)) if is_fully_sharded(module) else cls


def _is_fsdps(hook: Any) -> bool:
    owner = getattr(hook, "__self__", None)
    return type(owner).__module__.startswith("torch.distributed.fsdp")


def _check_attributes(name: str, module: nn.Module, ids: set[int]) -> None:
    """Check that a module does not keep parameters, modules or bound methods of modules outside torch's containers."""
    for attribute, value in vars(module).items():
        if attribute in ("_parameters", "_modules", *_HOOKS):
            continue
        items = value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else [value]
        for item in items:
            bound = item.__self__ if isinstance(item, types.MethodType) else item
            if is_spread(item) or id(bound) in ids:
                raise ValueError(
                    f"the sharded module {name or 'at the top'!r} keeps a parameter, module or method of one in its "
                    f"attribute {attribute!r}, where it cannot be replaced by a gathered one: keep it as an ordinary "
                    "attribute or in a ModuleList, ModuleDict or ParameterList (torch's RNNs are not supported)."
                )
