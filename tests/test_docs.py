"""What the pages name is there: links, and paths of source files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACES = [ROOT, ROOT / "sharpkern", ROOT / "docs", ROOT / "sharpkern" / "kernels", ROOT / "sharpkern" / "rop"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_are_there(page: Path) -> None:
    text = page.read_text()
    old = text.partition("## Where things moved")[2].partition("Chosen otherwise")[0]  # names what is no more
    text = text.replace(old, "") if old else text
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    broken = [link for link in links if not (page.parent / link).exists()]
    named = re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|cpp|cu|h|toml|md))`", text)
    broken += [path for path in named if not any((place / path).exists() for place in PLACES)]
    assert not broken, f"{page.name} names what is not there: {broken}"
