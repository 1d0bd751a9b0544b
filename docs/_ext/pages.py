"""What the site shows and GitHub does not, each asked for by a comment in the page.

<!-- site ... -->           the lines of Markdown in the comment
<!-- copy of ../../X.md --> in place of the page, a file outside docs/, with its links made to fit
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

_COMMENT = re.compile(r"^<!-- site\n(.*?)^-->\n", re.MULTILINE | re.DOTALL)
_COPY = re.compile(r"^<!-- copy of (\S+) -->$", re.MULTILINE)
_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


def copies_of(docs: Path) -> dict[Path, Path]:
    """Return for each file that a page is a copy of, that page."""
    pages = [(page, _COPY.search(page.read_text())) for page in (docs / "project").glob("*.md")]
    return {(page.parent / copy[1]).resolve(): page for page, copy in pages if copy}


def read(app: Sphinx, docname: str, source: list[str]) -> None:
    """Change the text of a page before it is parsed."""
    folder = Path(app.srcdir, docname).parent
    home = folder
    if copy := _COPY.search(source[0]):
        file = (folder / copy[1]).resolve()
        home = file.parent
        app.env.note_dependency(str(file), docname=docname)
        source[0] = file.read_text()
    copies = copies_of(Path(app.srcdir))

    def link(match: re.Match[str]) -> str:
        target = (home / match[1]).resolve()
        return "](" + os.path.relpath(copies.get(target, target), folder)

    source[0] = _LINK.sub(link, _COMMENT.sub(r"\1", source[0]))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the hook."""
    app.connect("source-read", read)
    return {"parallel_read_safe": True}
