"""What this package's docstrings have beside Google's style, made into what napoleon and Sphinx read.

a formula, table or code, indented between paragraphs     a literal block
"Cost: ..." and "Source: ..." that begin on their line    sections (napoleon_custom_sections in conf.py)
"a, b: text" in a section, and "a: text.   b: text"       a field for each name
``Name`` of a public class, docs/explain/memory.md        links
"""

from __future__ import annotations

import re
from itertools import takewhile
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import inspect

import sharpkern
from sharpkern.curvature.base import BaseOperator

_SECTION = re.compile(r" *(Args|Attributes|Returns|Raises|Cost|Source):$")
_RETURNS = re.compile(r" *Returns:$")
_FIELDS = re.compile(r" *(Args|Attributes|Raises):$")
_INLINE = re.compile(r"(Cost|Source): +(\S.*)$")
_NEXT_FIELD = re.compile(r"(?<=\S)\s{3,}(?=\w+(?:, \w+)*: )")
_NAMES = re.compile(r"\s*(\w+(?:, \w+)+): ")
_CLASSES = "|".join(name for name in sharpkern.__all__ if name[0].isupper())
_CLASS = re.compile(rf"``({_CLASSES})``")
_PAGE = re.compile(r"docs/(\w+/[\w-]+)\.md")


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def with_sections(lines: list[str]) -> list[str]:
    """Put the text of "Cost: text", and what continues it, under a header."""
    out: list[str] = []
    inside = False
    for line in lines:
        if match := _INLINE.match(line):
            out += ["", f"{match[1]}:", f"    {match[2]}"]
            inside = True
            continue
        inside = inside and bool(line.strip()) and not _SECTION.match(line)
        out.append(f"    {line}" if inside else line)
    return out


def _deeper(lines: list[str], indent: int) -> list[str]:
    return list(takewhile(lambda line: _indent(line) > indent, lines))


def _each_name(field: list[str]) -> list[str]:
    match = _NAMES.match(field[0])
    if not match:
        return field
    before, text = " " * _indent(field[0]), field[0][match.end() :]
    return [line for name in match[1].split(", ") for line in (f"{before}{name}: {text}", *field[1:])]


def with_fields(lines: list[str]) -> list[str]:
    """Give each name of a section its own field: napoleon takes the first of two for a type."""
    out: list[str] = []
    rest = list(lines)
    while rest:
        out.append(rest.pop(0))
        if not _FIELDS.match(out[-1]):
            continue
        section = _deeper(rest, _indent(out[-1]))
        del rest[: len(section)]
        depth = min(map(_indent, section), default=0)
        fields: list[list[str]] = []
        for line in section:
            for part in _NEXT_FIELD.sub("\n" + " " * depth, line).split("\n"):
                if _indent(part) == depth:
                    fields.append([])
                fields[-1].append(part)
        out += [line for field in fields for line in _each_name(field)]
    return out


def with_literal_blocks(lines: list[str]) -> list[str]:
    """Mark each indented block after an empty line as literal, unless it is the text of a section."""
    out: list[str] = []
    for i, line in enumerate(lines):
        text = next((kept for kept in reversed(lines[:i]) if kept.strip()), "")
        deeper = line.strip() and _indent(line) > _indent(text) and not lines[i - 1].strip()
        if deeper and text and not _SECTION.match(text):
            out += [f"{' ' * _indent(text)}::", ""]
        out.append(line)
    return out


def without_types(lines: list[str], what: str) -> list[str]:
    """Let what stands before a colon be text, where napoleon takes it for a type: a comment is now the first line."""
    out = ["..", "", *lines] if what == "property" else list(lines)
    for i in reversed([i for i, line in enumerate(out[:-1]) if _RETURNS.match(line)]):
        out[i + 1 : i + 1] = [" " * _indent(out[i + 1]) + "..", ""]
    return out


def with_links(line: str) -> str:
    """Link the public classes and the pages that a line names."""
    return _PAGE.sub(r":doc:`\1.md </\1>`", _CLASS.sub(r":py:obj:`~sharpkern.\1`", line))


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Rewrite a docstring in place, before napoleon reads it."""
    sections = with_literal_blocks(with_fields(with_sections(lines)))
    lines[:] = map(with_links, without_types(sections, what))


def signature(app: Sphinx, what: str, name: str, obj: Any, *_: Any) -> tuple[str, str] | None:
    """Show the arguments of a class's ``__init__``, also where a base class has a ``__new__`` that takes any."""
    if what != "class" or not issubclass(obj, BaseOperator):
        return None
    if obj.__init__ is object.__init__:
        return "", ""
    arguments = inspect.signature(obj.__init__, bound_method=True)
    return inspect.stringify_signature(arguments, show_return_annotation=False, unqualified_typehints=True), ""


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the hooks."""
    app.connect("autodoc-process-docstring", process)
    app.connect("autodoc-process-signature", signature)
    return {"parallel_read_safe": True}
