"""A table of decompositions, applied as ``run_decompositions`` does but without its cost that no model causes.

Torch sorts all entries of a table anew for every program, and overrides every composite op under some sixty dispatch
keys, although most overrides are what the op does anyway. Together this is half of the time that a small model's export
takes. Here a table is sorted once, and only the overrides that differ are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

from torch.export import exported_program

_SORT = "_split_decomp_table_to_cia_and_python_decomp"  # torch's own; table -> composite ops, other ops
_OURS = object()  # a key that marks a call as ours: another thread may export something of its own

Decompositions = Mapping[Any, Callable[..., Any]]


class DecompositionTable:
    """Decompositions by op.

    Args:
        entries: op -> function of the op's arguments. A composite op that is not named stays whole.
    """

    def __init__(self, entries: Decompositions) -> None:
        self.entries = dict(entries)

    def apply(self, exported: Any) -> Any:
        """Return an exported program with the table's ops taken apart."""
        # A copy: torch removes entries.
        if not hasattr(exported_program, _SORT):
            return exported.run_decompositions(dict(self.entries))
        original, parts = getattr(exported_program, _SORT), self._sorted

        def sort(table: dict[Any, Any]) -> tuple[dict[Any, Any], dict[Any, Any]]:
            return (dict(parts[0]), dict(parts[1])) if _OURS in table else original(table)

        with patch.object(exported_program, _SORT, sort):
            return exported.run_decompositions({_OURS: None})

    @functools.cached_property
    def _sorted(self) -> tuple[Decompositions, Decompositions]:
        composite, others = getattr(exported_program, _SORT)(dict(self.entries))
        return {op: f for op, f in composite.items() if not _is_default(op, f)}, others


def _is_default(op: Any, decomposition: Any) -> bool:
    """Whether a composite op's entry is torch's wrapper of what the op does without any entry."""
    return isinstance(decomposition, functools.partial) and decomposition.keywords == {"kernel": op}
