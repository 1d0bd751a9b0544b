"""Does every link of the built site lead somewhere?

    python scripts/check_links.py build/docs

Reads the HTML only, so it sees what Sphinx made of a page and not what was meant: a file that is not there, and an
anchor that its page does not have. Links to other sites are not followed. Returns 1 if one is dead.
"""

from __future__ import annotations

import argparse
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The targets that a page has, and those that it names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors = {"", "top"}
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, _tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep ids, and what href and src name."""
        self.anchors.update(value for name, value in attrs if name == "id" and value)
        self.links += [value for name, value in attrs if name in ("href", "src") and value]


def dead_links(site: Path) -> list[str]:
    """Return "page: link" for each link within the site that leads nowhere."""
    pages = {path.resolve(): Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    dead = []
    for path, page in pages.items():
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = target not in pages or unquote(parts.fragment) in pages[target].anchors
            if not target.is_file() or not known:
                dead.append(f"{path.relative_to(site.resolve())}: {link}")
    return dead


def main() -> int:
    """Print the dead links of a folder; return 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path)
    site = parser.parse_args().site
    if not (site / "index.html").is_file():
        parser.error(f"{site} has no index.html: build the site first, with make docs.")
    dead = dead_links(site)
    print("\n".join(dead) or "every link within the site leads somewhere")
    return bool(dead)


if __name__ == "__main__":
    raise SystemExit(main())
