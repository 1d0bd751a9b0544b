"""The page on the configuration says what the program declares, and nothing on it is out of date."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import config_reference

from sharpkern.train.config import TrainConfig, from_toml, to_toml

PAGE = config_reference.PAGE.read_text()


def test_the_committed_page_is_what_the_script_writes() -> None:
    assert config_reference.with_tables(PAGE) == PAGE, "run python scripts/config_reference.py"


def test_a_stale_row_is_noticed() -> None:
    stale = PAGE.replace("| `steps` | integer | `200` |", "| `steps` | integer | `100` |")
    assert stale != PAGE
    assert config_reference.with_tables(stale) == PAGE


def test_every_key_that_a_run_writes_is_on_the_page() -> None:
    for line in to_toml(TrainConfig()).splitlines():
        name = line.strip("[]") if line.startswith("[") else line.partition(" = ")[0]
        assert not line or f"`{name}`" in PAGE or f"`[{name}]`" in PAGE, line


def test_the_example_on_the_page_is_a_configuration() -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    read = from_toml(example)
    assert (read.steps, read.batch_size, read.model.width, read.optimizer.name) == (300, 128, 256, "adam")


@pytest.mark.parametrize(("need", "shown"), [("lie between 0 and optimizer.lr", 1), ("be at least 1", 9)])
def test_limits_are_shown_without_the_value_of_a_certain_run(need: str, shown: int) -> None:
    assert PAGE.count(f"| {need} |") >= shown
    assert not re.search(r"optimizer\.\w+ = ", config_reference.tables().partition("## Presets")[0])
