"""Every recipe runs as it is printed."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch

RECIPES = sorted((Path(__file__).parent.parent / "docs" / "recipes").glob("*.md"))
NEEDS = {"hugging-face": ("transformers", "accelerate"), "lightning": ("lightning",)}


@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore")  # of the other libraries
def test_recipe_runs_as_printed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in NEEDS.get(page.stem, ()):
        pytest.importorskip(library)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    exec(compile(block, str(page), "exec"), {"__name__": "__main__"})
