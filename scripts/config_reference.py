"""Write the tables of docs/guide/configuration.md: every option of a run, as the program itself declares it.

python scripts/config_reference.py
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sharpkern.train.config import PRESETS, TrainConfig, limits, value_of

PAGE = Path(__file__).parent.parent / "docs" / "guide" / "configuration.md"
START, END = "<!-- generated -->", "<!-- end -->"
# What an error message says of the value that was given has no place in a table.
_GIVEN = re.compile(r" = [\d.]+$")


def main() -> None:
    """Rewrite the part of the page that is generated."""
    PAGE.write_text(with_tables(PAGE.read_text()))


def with_tables(page: str) -> str:
    """Return the page with its tables as they must be now.

    Args:
        page: with one pair of the marks ``START`` and ``END``.
    """
    before, _, rest = page.partition(START)
    return f"{before}{START}\n\n{tables()}\n\n{END}{rest.partition(END)[2]}"


def tables() -> str:
    """Return a section for each table of a configuration, after one for what is in no table; then the presets."""
    hints = get_type_hints(TrainConfig)
    inner = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    parts = ["## Options outside of a table", *_rows(TrainConfig, "")]
    for name, table in inner.items():
        parts += ["", f"## `[{name}]`", "", str(table.__doc__), *_rows(table, f"{name}.")]
    parts += ["", "## Presets", "", "A preset is the default configuration with these values:", ""]
    parts += ["| preset | values |", "|---|---|", *(f"| `{name}` | {_changes(p)} |" for name, p in PRESETS.items())]
    return "\n".join(parts)


def _rows(table: Any, prefix: str) -> Iterator[str]:
    yield from ("", "| key | type | default | meaning | must |", "|---|---|---|---|---|")
    hints = get_type_hints(table, include_extras=True)
    needs: dict[str, list[str]] = {}
    for key, _, need in limits(TrainConfig()):
        needs.setdefault(key, []).append(_GIVEN.sub("", need))
    for name, _ in _options(table):
        kind, about = get_args(hints[name])
        default = value_of(TrainConfig(), prefix + name)
        must = "; ".join(needs.get(prefix + name, []))
        yield f"| `{name}` | {_type(kind)} | {_value(default)} | {about} | {must} |"


def _options(table: Any) -> Iterator[tuple[str, Any]]:
    for name, hint in get_type_hints(table).items():
        if not dataclasses.is_dataclass(hint):
            yield name, hint


def _type(kind: Any) -> str:
    """Name a type as a user writes its values in TOML."""
    if get_origin(kind) is Literal:
        return ", ".join(f'`"{value}"`' for value in get_args(kind))
    if isinstance(kind, types.UnionType):
        return " or ".join(_type(part) for part in get_args(kind) if part is not type(None))
    return {int: "integer", float: "number", bool: "true or false", str: "string", Path: "path"}[kind]


def _value(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value!r}`" if isinstance(value, int | float) else f'`"{value}"`'


def _changes(preset: TrainConfig) -> str:
    """List what a preset has otherwise than the defaults."""
    names = [name for name, _ in _options(TrainConfig)]
    for table, hint in get_type_hints(TrainConfig).items():
        if dataclasses.is_dataclass(hint):
            names += [f"{table}.{name}" for name, _ in _options(hint)]
    changed = [name for name in names if value_of(preset, name) != value_of(TrainConfig(), name)]
    return ", ".join(f"`{name}` = {_value(value_of(preset, name))}" for name in changed)


if __name__ == "__main__":
    main()
