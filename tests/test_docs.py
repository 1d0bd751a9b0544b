"""The pages: links lead somewhere, named files exist, code runs, and each public name is described once."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sharpkern
from sharpkern.cli import COMMANDS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
WRITTEN_BY_A_RUN = {"config.toml"}
# Old paths are named there on purpose.
HISTORY = re.compile(r"^## Where things moved\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What a page's code needs and a reader has already; a comment, so that the page does not show it.
SETUP = re.compile(r"^<!-- setup of the page's test\n(.*?)^-->", re.MULTILINE | re.DOTALL)
# Recipes run in test_recipes.py, each as a whole program.
RUN = [page for page in PAGES[2:] if PYTHON.search(page.read_text()) and page.parent.name != "recipes"]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing(page: Path, text: str) -> list[str]:
    """List the links, anchors and source paths of a page that lead nowhere."""
    lost = []
    for link in re.findall(r"\]\((?!http)([^)]+)\)", FENCED.sub("", text)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            lost.append(link)
    paths = re.findall(r"`([\w./-]+\.(?:py|cpp|cu|h|toml))`", text)
    found = {path for path in paths for base in (ROOT, ROOT / "sharpkern") if (base / path).is_file()}
    return lost + [path for path in paths if path not in found | WRITTEN_BY_A_RUN]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_and_paths_exist(page: Path) -> None:
    lost = missing(page, HISTORY.sub("", page.read_text()))
    assert not lost, f"{page.name} names what does not exist: {lost}"


def test_a_lost_link_anchor_and_path_are_seen() -> None:
    text = (
        "[a](docs/none.md) `rop/none.py` [b](docs/explain/design.md#layers) [c](docs/explain/design.md#none) "
        "`rop/rule.py` [d](#style) [e](#none)"
    )
    assert missing(ROOT / "CONTRIBUTING.md", text) == [
        "docs/none.md",
        "docs/explain/design.md#none",
        "#none",
        "rop/none.py",
    ]


@pytest.mark.parametrize("page", RUN, ids=named)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the blocks of a page in order, in one namespace that has a model, a loss function and a batch."""
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    batch = torch.randn(16, 6), torch.randint(0, 3, (16,))
    namespace = {"model": model, "loss_fn": torch.nn.CrossEntropyLoss(), "batch": batch}
    text = page.read_text()
    for block in [*SETUP.findall(text), *PYTHON.findall(text)]:
        exec(compile(block, str(page), "exec"), namespace)


def test_no_python_block_escapes() -> None:
    """Of another spelling of the fence, or indented, a block would look like code and never run."""
    for page in PAGES:
        odd = re.findall(
            r"^ *(?:```|~~~) *(?:py|python3|Python|pycon)\b.*|^ +```python|^```python .*", page.read_text(), re.M
        )
        assert not odd, f"{named(page)}: {odd}"


def test_every_page_is_in_the_index() -> None:
    linked = {(DOCS / link).resolve() for link in re.findall(r"\]\(([^)#]+\.md)\)", (DOCS / "index.md").read_text())}
    pages = {page for page in DOCS.rglob("*.md") if page.parent.name != "project"} - {DOCS / "index.md"}
    assert pages <= linked, f"docs/index.md does not link to {sorted(map(named, pages - linked))}"


def test_every_public_name_is_on_exactly_one_page() -> None:
    documented = [
        name
        for page in sorted((DOCS / "reference").glob("*.md"))
        for name in re.findall(r"^\.\. auto\w+:: sharpkern\.(\w+)$", page.read_text(), re.MULTILINE)
    ]
    assert sorted(documented) == sharpkern.__all__


def test_every_command_is_on_the_page_of_the_command_line() -> None:
    page = (DOCS / "reference" / "command-line.md").read_text()
    assert re.findall(r"^```\{help-of\} (\w+)$", page, re.MULTILINE) == list(COMMANDS)


def test_the_check_of_the_built_site_sees_dead_links(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text('<h1 id="here">A</h1><a href="b.html#there">b</a><a href="#here">up</a>')
    (tmp_path / "b.html").write_text('<p id="there"><img src="none.png"><a href="index.html#gone">a</a></p>')
    command = [sys.executable, str(ROOT / "scripts" / "check_links.py"), str(tmp_path)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.stdout.splitlines() == ["b.html: none.png", "b.html: index.html#gone"]
    assert checked.returncode == 1
    (tmp_path / "b.html").write_text('<p id="there"><a href="https://none.example/#x">a</a></p>')
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_docstrings_are_made_into_what_sphinx_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sphinx", reason="the site needs sphinx: pip install '.[docs]'")
    monkeypatch.syspath_prepend(DOCS / "_ext")
    docstrings = importlib.import_module("docstrings")
    lines = inspect.cleandoc("""
        Find it; see ``Record`` and docs/explain/cost.md.

            a = b c

        Args:
            x, y: of a, over
                two lines.   z: of b.

        Returns:
            pairs: some.

        Cost: two
        products.
    """).splitlines()
    docstrings.process(None, "function", "f", None, None, lines)
    assert "\n".join(lines) == inspect.cleandoc("""
        Find it; see :py:obj:`~sharpkern.Record` and :doc:`explain/cost.md </explain/cost>`.

        ::

            a = b c

        Args:
            x: of a, over
                two lines.
            y: of a, over
                two lines.
            z: of b.

        Returns:
            ..

            pairs: some.


        Cost:
            two
            products.
    """)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("sphinx", "furo", "myst_parser", "transformers", "lightning"):
        pytest.importorskip(package, reason=f"the site needs {package}: pip install '.[docs]'")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-n",
        "--fail-on-warning",
        "--keep-going",
        str(DOCS),
        str(tmp_path),
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    check = [sys.executable, str(ROOT / "scripts" / "check_links.py"), str(tmp_path)]
    checked = subprocess.run(check, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
