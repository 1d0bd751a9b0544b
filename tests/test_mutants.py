"""The planted faults still fit the code: each text stands where its file says, once, and its tests exist."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
AREAS = sorted((ROOT / "scripts" / "mutants").glob("*.toml"))


@pytest.mark.parametrize("area", AREAS, ids=lambda path: path.stem)
def test_every_fault_can_be_planted(area: Path) -> None:
    faults = tomllib.loads(area.read_text())["mutant"]
    assert faults
    for fault in faults:
        source = (ROOT / fault["file"]).read_text()
        assert source.count(fault["old"]) == 1, (fault["file"], fault["note"])
        assert fault["new"] != fault["old"]
        for test in fault["tests"]:
            assert (ROOT / test.split()[0].split("::")[0]).exists(), test
