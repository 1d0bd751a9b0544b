"""Exported graphs, kept as long as their model: operators made one after the other of one model export it once.

A graph is immutable, and belongs to what ``Engines`` calls a structure and values. Modules and parameters are compared
by identity, and held weakly, as the loss is: nothing here keeps a model alive.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..rop.export import Graph
from .losses import FunctionalLoss, LossModule
from .watch import Snapshot

_MOST_GRAPHS = 8  # of one model, least recently used first to go

graphs: weakref.WeakKeyDictionary[nn.Module, OrderedDict[Any, _Entry]] = weakref.WeakKeyDictionary()


@dataclass
class _Entry:
    graph: Graph
    loss_fn: Callable[[], Any]  # weak references
    parts: list[Callable[[], Any]]

    def holds(self, loss_fn: Any) -> bool:
        """Whether all that the key names by its id is still the same object, and none a new one in its place."""
        return self.loss_fn() is loss_fn and all(part() is not None for part in self.parts)


def kept_graph(module: LossModule | FunctionalLoss, key: Any) -> Graph | None:
    """Return the graph of an earlier export of the same model, loss and key; None if there is none.

    Args:
        module: of the operator that asks.
        key: hashable; equal for whatever needs no new export.
    """
    entries = _entries(module)
    entry = None if entries is None else entries.get(key)
    if entries is None or entry is None or not entry.holds(module.loss_fn):
        return None
    entries.move_to_end(key)
    return entry.graph


def keep_graph(module: LossModule | FunctionalLoss, key: Any, snapshot: Snapshot, graph: Graph) -> None:
    """Keep a graph for the next operator.

    Args:
        module, key: as for ``kept_graph``.
        snapshot: of the module, as the key has it.
        graph: that the comparison with the eager model has let pass, if there was one.
    """
    if (entries := _entries(module)) is None:
        return
    try:
        loss_fn = weakref.ref(module.loss_fn)
    except TypeError:  # an object that cannot be referred to weakly
        return
    entries[key] = _Entry(graph, loss_fn, [weakref.ref(part) for part in snapshot.objects])
    entries.move_to_end(key)
    while len(entries) > _MOST_GRAPHS:
        entries.popitem(last=False)


def _entries(module: LossModule | FunctionalLoss) -> OrderedDict[Any, _Entry] | None:
    if not isinstance(module, LossModule):
        return None
    try:
        return graphs.setdefault(module.model, OrderedDict())
    except TypeError:  # a model with an equality of its own has no hash
        return None
