"""The pages: every link and every named source file exists, and the short Python blocks run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
WRITTEN_BY_A_RUN = {"config.toml"}
# Old paths are named there on purpose.
HISTORY = re.compile(r"^## Where things moved\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def missing(page: Path, text: str) -> list[str]:
    """List the links and source paths of a page that lead nowhere."""
    links = re.findall(r"\]\((?!http|#)([^)#]+)", text)
    paths = re.findall(r"`([\w./-]+\.(?:py|cpp|cu|h|toml))`", text)
    lost = [link for link in links if not (page.parent / link).exists()]
    found = {path for path in paths for base in (ROOT, ROOT / "sharpkern") if (base / path).is_file()}
    return lost + [path for path in paths if path not in found | WRITTEN_BY_A_RUN]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page: Path) -> None:
    lost = missing(page, HISTORY.sub("", page.read_text()))
    assert not lost, f"{page.name} names files that do not exist: {lost}"


def test_a_lost_link_and_a_lost_path_are_seen() -> None:
    page = ROOT / "README.md"
    assert missing(page, "[a](docs/none.md) `rop/none.py` [b](docs/explain/design.md#layers) `rop/rule.py`") == [
        "docs/none.md",
        "rop/none.py",
    ]


@pytest.mark.parametrize("name", ["explain/correctness.md", "index.md", "explain/spectra.md"])
def test_python_blocks_run(name: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(), re.DOTALL)
    assert blocks
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    batch = torch.randn(16, 6), torch.randint(0, 3, (16,))
    namespace = {"model": model, "loss_fn": torch.nn.CrossEntropyLoss(), "batch": batch}
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)
