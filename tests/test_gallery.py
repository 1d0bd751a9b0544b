"""The scripts of the gallery run, with few steps, and each has a page with its picture."""

from __future__ import annotations

import runpy
from pathlib import Path

import matplotlib as mpl
import pytest

GALLERY = Path(__file__).parent.parent / "docs" / "gallery"
SCRIPTS = sorted(GALLERY.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
@pytest.mark.filterwarnings("ignore")  # of the other libraries
def test_script_draws_its_picture(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if script.stem == "gpt":
        pytest.importorskip("transformers")
    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GALLERY_STEPS", "12")
    runpy.run_path(str(script), run_name="__main__")
    assert (tmp_path / f"{script.stem}.png").stat().st_size > 10_000


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_page_shows_script_and_picture(script: Path) -> None:
    page = script.with_suffix(".md").read_text()
    assert f"]({script.stem}.png)" in page
    assert script.with_suffix(".png").is_file()
    assert f"{{literalinclude}} {script.name}" in page
