"""A user's own model, loss and data, made by a function that is named on the command line."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class OwnParts:
    """What a task's function gives.

    Attributes:
        model: a module, at the state to start from.
        loss_fn: ``(output, targets) -> scalar``, or ``(output, batch) -> scalar`` where batches are dicts.
        batches: one epoch, all in memory; each is ``(inputs, targets)`` or a dict.
    """

    model: nn.Module
    loss_fn: Callable[..., Tensor]
    batches: list[Any]


def load_own(task: str) -> OwnParts:
    """Import a task's function, and call it.

    Args:
        task: ``package.module:function``; the current directory is looked in first, as ``python -m`` does.
            ``function()`` returns ``(model, loss_fn, data)``. Data are one batch, a tuple or a dict; or a finite
            iterable of batches, such as a list or a ``DataLoader``, which is read once.

    Raises:
        ValueError: there is no such module or function, one of them raised an error, or the function returned
            something else.
    """
    module_name, _, function_name = task.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"task must be package.module:function, got {task!r}.")
    function = getattr(_import(module_name, task), function_name, None)
    if not callable(function):
        raise ValueError(f"task {task!r}: the module {module_name} has no function {function_name!r}.")
    try:
        found = function()
    except Exception as error:
        raise ValueError(f"task {task!r}: {function_name}() raised {_told(error)}") from error
    return _checked(found, task)


def _import(name: str, task: str) -> ModuleType:
    # A console script has its own folder there, and not the current one as ``python -m`` does.
    here = str(Path.cwd())
    if sys.path[0] != here:
        sys.path.insert(0, here)
    try:
        return import_module(name)
    # Any error at all: it is the user's code that runs.
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):  # not one that the module itself imports
            raise ValueError(f"task {task!r}: no module named {missing!r}, in {here} or among the installed.") from None
        raise ValueError(f"task {task!r}: the import of {name} raised {_told(error)}") from error


def _told(error: Exception) -> str:
    """Say in one line what was raised, and where: the traceback is not shown."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    words = (str(error) or "no message").splitlines()[0].rstrip(".")
    return f"{type(error).__name__}: {words} ({Path(frame.filename).name}, line {frame.lineno})."


def _checked(found: Any, task: str) -> OwnParts:
    wanted = f"task {task!r} must return (model, loss_fn, data)"
    if not isinstance(found, tuple) or len(found) != 3:
        got = f"a tuple of {len(found)}" if isinstance(found, tuple) else type(found).__name__
        raise ValueError(f"{wanted}, got {got}.")
    model, loss_fn, data = found
    if not isinstance(model, nn.Module):
        raise ValueError(f"{wanted}, where the model is a torch.nn.Module, got {type(model).__name__}.")
    if not callable(loss_fn):
        raise ValueError(f"{wanted}, where loss_fn can be called, got {type(loss_fn).__name__}.")
    # A tensor can be iterated too, over its rows, which nobody means.
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise ValueError(f"{wanted}, where data are a batch or an iterable of batches, got {type(data).__name__}.")
    # A tuple is one batch and a list several. Read once, after ``build_task`` has seeded torch, so that a
    # ``DataLoader`` that shuffles gives a resumed run the batches in the same order.
    batches = [data] if isinstance(data, tuple | Mapping) else list(data)
    if not batches:
        raise ValueError(f"{wanted}, but its data hold no batch.")
    for batch in batches:
        if not isinstance(batch, Mapping) and not (isinstance(batch, tuple | list) and len(batch) >= 2):
            raise ValueError(f"{wanted}, where a batch is (inputs, targets) or a dict, got {type(batch).__name__}.")
    return OwnParts(model, loss_fn, batches)
