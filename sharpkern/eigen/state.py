"""Checks of saved states, so that a checkpoint of another version fails by name instead of loading half."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def check_state(owner: str, state: Mapping[str, Any], fields: Iterable[str], version: int) -> None:
    """Check that a saved state has exactly these fields, and "version" with this number.

    Args:
        owner: whose state it is, for the message.
        state: what ``state_dict()`` of the owner returned, perhaps in another version of this package.
        fields: the names that it must have besides "version".
        version: the number that it must carry.

    Raises:
        ValueError: a field is missing or unknown, or the version is another one.
    """
    # First the version: with another one, what lacks or is unknown follows from it.
    if state.get("version") != version:
        raise ValueError(f"a state of {owner} must have version {version}, got {state.get('version')}.")
    expected = {"version", *fields}
    if missing := sorted(expected - set(state)):
        raise ValueError(f"the state of {owner} lacks {', '.join(missing)}.")
    if unknown := sorted(set(state) - expected):
        raise ValueError(f"the state of {owner} has unknown fields: {', '.join(unknown)}.")
