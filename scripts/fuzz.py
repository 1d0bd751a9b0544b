"""Damage files of every kind that sharpkern reads: each reader gives its documented error, or what is still right.

    python scripts/fuzz.py --inputs 20000            # of each kind; make fuzz
    python scripts/fuzz.py --kind toml --seed 7      # again, as a failure names it

A failure is any other exception than ``ValueError`` or ``FileNotFoundError``, a message of several lines or without the
file, a checkpoint that is read as something else than was saved, or the end of the process.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import gzip
import io
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sharpkern.sweep.collect import DECLARED, RESULT, table
from sharpkern.sweep.grid import Sweep, read_sweep
from sharpkern.train import checkpoint, metrics
from sharpkern.train.cifar import TEST, TRAIN, read_cifar10
from sharpkern.train.config import DEMO, DataConfig, TrainConfig, from_toml, read_toml, to_toml
from sharpkern.train.data import load
from sharpkern.train.idx import read_idx

_SECONDS = 60  # for one input; the process then ends with its traceback
_AT_ONCE = 2000  # inputs of a process: one that dies names where to look


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
        files: name -> content of a folder that can be read; the first one is damaged.
        read: reads the folder; its result is compared with that of the undamaged folder if ``exact``.
        exact: damage that changes the result must be noticed, for the file has checksums.
        words: what text of this kind is damaged with.
    """

    files: Callable[[random.Random], dict[str, bytes]]
    read: Callable[[Path], Any]
    exact: bool = False
    words: tuple[bytes, ...] = ()


def _idx(shape: tuple[int, ...], rng: random.Random, below: int = 256) -> bytes:
    numbers = 1
    for n in shape:
        numbers *= n
    header = b"\0\0\x08" + bytes([len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    return header + bytes(rng.randrange(below) for _ in range(numbers))


def _idx_folder(rng: random.Random) -> dict[str, bytes]:
    n, m = rng.randint(1, 4), rng.randint(1, 3)
    files = {
        "train-images-idx3-ubyte": _idx((n, 3, 2), rng),
        "train-labels-idx1-ubyte": _idx((n,), rng, 10),
        "t10k-images-idx3-ubyte": _idx((m, 3, 2), rng),
        "t10k-labels-idx1-ubyte": _idx((m,), rng, 10),
    }
    first = rng.choice(list(files))
    return {first: files[first]} | files


def _cifar(rng: random.Random) -> dict[str, bytes]:
    records = b"".join(bytes([rng.randrange(10)]) + rng.randbytes(3072) for _ in range(rng.randint(1, 2)))
    return {TEST[0]: records}


def _rows(rng: random.Random) -> bytes:
    rows = [{"step": i, "loss": rng.random(), "lr": 0.1, "status": "tracked", "x": None} for i in range(1, 5)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@functools.cache
def _state() -> dict[str, Any]:
    return {"step": 3, "model": {"w": torch.arange(40.0), "b": torch.ones(3, dtype=torch.float64)}, "more": [1, "x"]}


@functools.cache
def _checkpoint() -> bytes:
    buffer = io.BytesIO()
    torch.save({**_state(), "rng": torch.Generator().manual_seed(0).get_state()}, buffer)
    return buffer.getvalue()


_SWEEP = b"""loss = "mse"
[model]
width = 8
[sweep]
lr_unit = "1/sharpness"
[sweep.grid]
optimizer.lr = [1, 2.5]
optimizer.warmup_steps = [1, 16]
"""
_CELL = "cells/lr=1,warmup_steps=1"


def _result(rng: random.Random) -> bytes:
    return json.dumps(
        {"status": "trained", "steps": 70, "train_loss": rng.random(), "regime": "C3", "trend": 1.2,
         "crossing_step": None, "regime_is_sure": True}, indent=1,
    ).encode()  # fmt: skip


@functools.cache
def _sweep(folder: Path) -> Sweep:
    (folder / "sweep.toml").write_bytes(_SWEEP)
    return read_sweep(folder / "sweep.toml", folder)


@functools.cache
def _declared() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return _sweep(Path(folder)).cells[0].declared().encode()


def _cells(name: str, rng: random.Random) -> dict[str, bytes]:
    files = {f"{_CELL}/{RESULT}": _result(rng), f"{_CELL}/{DECLARED}": _declared()}
    first = f"{_CELL}/{name}"
    return {first: files[first]} | files


def _table(folder: Path) -> Any:
    rows = table(_sweep(folder))
    assert len(rows) == 4
    assert all(row["status"] in ("trained", "failed", "diverged", "unfinished") for row in rows)


def _read_metrics(folder: Path) -> Any:
    path = folder / "metrics.jsonl"
    rows = metrics.read(path)
    metrics.MetricsFile(path, keep=2).close()
    finite = [{k: None if v in (math.inf, -math.inf) or v != v else v for k, v in row.items()} for row in rows]
    assert repr(metrics.read(path)) == repr([row for row in finite if row["step"] <= 2])


_TOML = (b"[", b"]" * 9, b"[" * 5000, b'"', b"'''", b"=", b"\n", b"nan", b"inf", b"-", b"1e999", b"9" * 5000, b"true",
         b"\0", b"\xff\xfe", b"1979-99-99", b"{", b"#", b".", b"[[model]]", b"model = 3\n", b"\xed\xa0\x80",
         b"''")  # fmt: skip
_JSON = (b"[", b"{" * 5000, b"[" * 5000, b'"', b"NaN", b"Infinity", b"1e999", b"9" * 5000, b"null", b"\0", b"\xff\xfe",
         b"\n", b"}", b"{}", b"[1]", b"\\ud800", b'{"step": 1.5}', b'{"step": true}', b"-")  # fmt: skip

KINDS = {
    "idx": Kind(lambda rng: {"file": _idx((rng.randint(1, 4), 3, 2), rng)}, lambda f: read_idx(f / "file")),
    "idx gzip": Kind(
        lambda rng: {"file": gzip.compress(_idx((rng.randint(1, 4), 3, 2), rng), mtime=0)},
        lambda f: read_idx(f / "file"),
    ),
    "idx folder": Kind(_idx_folder, lambda f: load(DataConfig("mnist", dir=f))),
    "cifar": Kind(_cifar, lambda f: read_cifar10(f, TEST)),
    "toml": Kind(
        lambda rng: {"config.toml": to_toml(rng.choice([DEMO, TrainConfig()])).encode()},
        lambda f: from_toml(read_toml(f / "config.toml"), str(f / "config.toml")),
        words=_TOML,
    ),
    "sweep": Kind(
        lambda _: {"sweep.toml": _SWEEP},
        lambda f: read_sweep(f / "sweep.toml", f),
        words=(*_TOML, b"[sweep.grid]", b"[]"),
    ),
    "metrics": Kind(lambda rng: {"metrics.jsonl": _rows(rng)}, _read_metrics, words=_JSON),
    "checkpoint": Kind(
        lambda _: {"checkpoint.pt": _checkpoint()}, lambda f: checkpoint.load(f / "checkpoint.pt"), exact=True
    ),
    "sweep table: result.json": Kind(lambda rng: _cells(RESULT, rng), _table, words=_JSON),
    "sweep table: cell.toml": Kind(lambda rng: _cells(DECLARED, rng), _table, words=_TOML),
}
assert len(TRAIN) == 5


def damaged(content: bytes, words: tuple[bytes, ...], rng: random.Random) -> bytes:
    """Damage a file in one to three places, as disks, transfers, editors and people do."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(data) + 1)
        to = min(len(data), at + rng.choice((1, 2, 4, 16, 64)))
        kind = rng.randrange(9 if words else 7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at:to]
        elif kind == 4:
            data[at:at] = data[at:to]
        elif kind == 5:
            data[at:to] = bytes(to - at)
        elif kind == 6:
            data += rng.randbytes(rng.choice((1, 7, 100)))
        elif kind == 7:
            data[at:at] = rng.choice(words)
        elif kind == 8:
            data[at:to] = rng.choice(words)
    return bytes(data)


def try_one(name: str, seed: int, folder: Path) -> str:
    """Damage a file of a kind and read it.

    Returns:
        "refused", "read" or "as before" (the damage undid itself, or nothing was changed).

    Raises:
        AssertionError: a failure, in one line.
    """
    kind, rng = KINDS[name], random.Random(f"{name} {seed}")
    files = kind.files(rng)
    first = next(iter(files))
    changed = damaged(files[first], kind.words, rng)
    for path, content in (files | {first: changed}).items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    try:
        result = kind.read(folder)
    except (ValueError, FileNotFoundError) as error:
        _check_message(str(error), folder)
        return "refused"
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}") from error
    if kind.exact:
        result.pop("rng", None)
        assert repr(result) == repr(_state()), "read as something else"
    return "as before" if changed == files[first] else "read"


def _check_message(told: str, folder: Path) -> None:
    assert str(folder) in told, f"no file named: {told!r}"
    assert "\n" not in told, f"several lines: {told!r}"


def campaign(name: str, first: int, count: int, started: Callable[[], None] = lambda: None) -> Counter[str]:
    """Try inputs of one kind, each after a call of ``started``; failures are printed and counted."""
    found: Counter[str] = Counter()
    shared = Path("/dev/shm")
    # In memory where that is possible: a hundred thousand files with their fsync would be the disk's campaign.
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        for seed in range(first, first + count):
            started()
            try:
                found[try_one(name, seed, Path(folder))] += 1
            except AssertionError as error:
                found["failed"] += 1
                print(f"{name}, seed {seed}: {str(error)[:300]}", flush=True)
    return found


def _in_processes(name: str, inputs: int) -> Counter[str]:
    total: Counter[str] = Counter()
    for first in range(0, inputs, _AT_ONCE):
        count = min(_AT_ONCE, inputs - first)
        command = [sys.executable, __file__, "--kind", name, "--seed", str(first), "--inputs", str(count), "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        *messages, last = done.stdout.splitlines() or [""]
        print("".join(f"{m}\n" for m in messages), end="", flush=True)
        if done.returncode:
            print(f"{name}, seeds {first} to {first + count - 1}: the process ended with {done.returncode}", flush=True)
            total["failed"] += 1
        else:
            total += Counter(json.loads(last))
    return total


def main() -> int:
    """Run the campaign that the command line asks for; return 1 if an input failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000, help="of each kind; 1 with --seed")
    parser.add_argument("--kind", choices=KINDS, help="of files; all by default")
    parser.add_argument("--seed", type=int, help="of the first input")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.json:
        watch = functools.partial(faulthandler.dump_traceback_later, _SECONDS, exit=True)
        print(json.dumps(campaign(given.kind, given.seed, given.inputs, watch)))
        return 0
    if given.seed is not None and given.kind:
        return int(campaign(given.kind, given.seed, 1)["failed"] > 0)
    failed = 0
    print("| kind | inputs | refused | read | as before | failed |\n|---|---|---|---|---|---|")
    for name in [given.kind] if given.kind else KINDS:
        found = _in_processes(name, given.inputs)
        failed += found["failed"]
        columns = [f"{found[column]:,}" for column in ("refused", "read", "as before", "failed")]
        print(f"| {name} | {given.inputs:,} | {' | '.join(columns)} |", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    raise SystemExit(main())
