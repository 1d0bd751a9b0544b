"""Every Python block of the README runs, in order, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_python_blocks_of_the_readme_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 5
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "tracker.step" in blocks[0]
    assert namespace["rec"].step == 30
    assert namespace["report"].ok
    assert namespace["HV"].shape == (namespace["H"].n, 4)


def test_the_diff_adds_three_lines_and_changes_no_weight(capsys: pytest.CaptureFixture[str]) -> None:
    (diff,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    lines = diff.splitlines()
    assert sum(line.startswith("+") for line in lines) == 3
    assert len(lines) - 3 <= 30
    weights = []
    for kept in (" ", " +"):
        namespace: dict[str, object] = {}
        script = "\n".join(line[1:] for line in lines if not line or line[0] in kept)
        exec(compile(script, "README.md", "exec"), namespace)
        weights.append(namespace["model"].state_dict())
    for name, plain in weights[0].items():
        assert torch.equal(plain, weights[1][name]), name
    assert capsys.readouterr().out.count("Record(") == 20


def test_links_of_the_readme_point_to_files() -> None:
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (root / target).is_file(), target
