"""The short version of ``make fuzz``: damaged files of every kind give the documented error, or are still right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

fuzz = pytest.importorskip("fuzz")
INPUTS = 100


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_undamaged_files_are_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "damaged", lambda content, words, rng: content)
    assert fuzz.try_one(kind, 0, tmp_path) == "as before"


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damaged_files_give_the_documented_error(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = torch.initial_seed() % 2**31
    found = fuzz.campaign(kind, first, INPUTS)
    assert not found["failed"], capsys.readouterr().out
    assert found["refused"] >= INPUTS // 4


# What only few random inputs find, and once did.
@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("idx", b"\0\0\x08\x50" + b"\0\0\0\1" * 80 + b"x", "NumPy has no array of shape"),
        ("idx", b"\0\0\x08\x04" + b"\0" * 4 + b"\xff" * 12, "NumPy has no array of shape"),
        ("toml", b"\xff\xfe", "no UTF-8 at byte 0"),
        ("toml", b"steps = " + b"[" * 5000, "not TOML"),
        ("toml", b"steps = " + b"9" * 5000, "not TOML"),
        ("toml", b"[optimizer]\nlr = 1" + b"0" * 400, "optimizer.lr must be positive and finite, got inf"),
        ("metrics", b"\xff\n", "line 1 is no metrics row"),
        ("metrics", b"[" * 100_000 + b"\n", "line 1 is no metrics row"),
        ("metrics", b'{"step": ' + b"9" * 5000 + b"}\n", "line 1 is no metrics row"),
        ("metrics", b'{"step": "1"}\n', "line 1 is no metrics row"),
        ("metrics", b'{"step": true}\n', "line 1 is no metrics row"),
        ("sweep table: result.json", b"[]", "result.json is damaged: remove it"),
        ("sweep table: result.json", b'{"status": []}', "result.json is damaged"),
        ("sweep table: result.json", b'{"status": "done"}', "result.json is damaged"),
        ("sweep table: result.json", b'{"status": "failed", "steps": "x"}', "result.json is damaged"),
        ("sweep table: cell.toml", b"\xff", "was declared with other settings"),
    ],
    ids=[f"special {i}" for i in range(16)],
)
def test_special_inputs(kind: str, content: bytes, message: str, tmp_path: Path) -> None:
    files = fuzz.KINDS[kind].files(fuzz.random.Random(0))
    for path, whole in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(whole)
    (tmp_path / next(iter(files))).write_bytes(content)
    with pytest.raises(ValueError, match=message) as told:
        fuzz.KINDS[kind].read(tmp_path)
    assert str(tmp_path) in str(told.value) or kind == "toml"
