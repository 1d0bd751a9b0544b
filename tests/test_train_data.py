"""Data: files written here byte by byte, damaged ones refused in one line, the packaged subset as published."""

from __future__ import annotations

import gzip
import hashlib
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from sharpkern.train import data
from sharpkern.train.cifar import TEST, TRAIN
from sharpkern.train.config import DataConfig
from sharpkern.train.data import load, standardise
from sharpkern.train.idx import read_idx

SHA256 = "83bc4d46afcc2a1894128e6548771ffb61bc2d37d32be02e3e3414846c693a53"


def random_bytes(*shape: int, below: int = 256) -> np.ndarray:
    return np.random.default_rng(torch.initial_seed() % 2**32).integers(0, below, shape, dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    header = b"\0\0\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


def write_idx_folder(folder: Path, *, gz: bool = False, train: int = 7, test: int = 3) -> dict[str, np.ndarray]:
    arrays = {
        "train-images-idx3": random_bytes(train, 5, 4),
        "train-labels-idx1": random_bytes(train, below=10),
        "t10k-images-idx3": random_bytes(test, 5, 4),
        "t10k-labels-idx1": random_bytes(test, below=10),
    }
    for name, array in arrays.items():
        content = gzip.compress(idx(array)) if gz else idx(array)
        (folder / f"{name}-ubyte{'.gz' if gz else ''}").write_bytes(content)
    return arrays


@pytest.mark.parametrize("shape", [(5,), (3, 2), (2, 3, 4)])
def test_idx_gives_back_what_was_written(tmp_path: Path, shape: tuple[int, ...]) -> None:
    want = random_bytes(*shape)
    raw, packed = idx(want), gzip.compress(idx(want))
    for name, content in [("raw", raw), ("packed.gz", packed), ("packed", packed), ("raw.gz", raw)]:
        (tmp_path / name).write_bytes(content)
        np.testing.assert_array_equal(read_idx(tmp_path / name), want)


def damaged() -> dict[str, tuple[bytes, str]]:
    good = idx(random_bytes(4, 3))
    packed = bytearray(gzip.compress(idx(random_bytes(4096)), mtime=0))
    cut = bytes(packed[:-9])
    packed[60:64] = bytes(255 - b for b in packed[60:64])
    return {
        "truncated": (good[:-2], "22 bytes, expected 24 for shape \\[4, 3\\]"),
        "too long": (good + b"\0", "25 bytes, expected 24 for shape \\[4, 3\\]"),
        "header cut": (good[:9], "9 bytes, expected a header of 12"),
        "wrong magic": (b"\x89PNG" + good[4:], "starts with 89504e47, expected 000008nn"),
        "of floats": (b"\0\0\x0d" + good[3:], "starts with 00000d02, expected 000008nn"),
        "empty": (b"", "starts with nothing"),
        "huge": (b"\0\0\x08\x04" + b"\x80\0\0\0" * 4, f"20 bytes, expected {20 + 2**124} for shape"),
        "gzip cut": (cut, "gzip file is damaged or truncated"),
        "gzip damaged": (bytes(packed), "gzip file is damaged or truncated"),
    }


@pytest.mark.parametrize("case", list(damaged()))
def test_damaged_idx_file_is_one_line_with_path_and_sizes(tmp_path: Path, case: str) -> None:
    content, message = damaged()[case]
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_idx(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_folder_loads_in_order(tmp_path: Path, name: str, gz: bool) -> None:
    arrays = write_idx_folder(tmp_path, gz=gz)
    loaded = load(DataConfig(name, dir=tmp_path))
    assert loaded.train_inputs.shape == (7, 1, 5, 4)
    assert loaded.test_inputs.shape == (3, 1, 5, 4)
    assert loaded.train_targets.tolist() == arrays["train-labels-idx1"].tolist()
    assert loaded.test_targets.tolist() == arrays["t10k-labels-idx1"].tolist()
    torch.testing.assert_close(loaded.train_inputs, standardise(arrays["train-images-idx3"]))


def test_fashion_mnist_is_found_where_debian_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx_folder(tmp_path, gz=True)
    monkeypatch.setattr(data, "_DEBIAN", tmp_path)
    assert len(load(DataConfig("fashion-mnist")).train_inputs) == 7
    monkeypatch.setattr(data, "_DEBIAN", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="apt install dataset-fashion-mnist"):
        load(DataConfig("fashion-mnist"))


def test_idx_folder_that_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    write_idx_folder(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    good = labels.read_bytes()
    for content, message in [
        (idx(random_bytes(6, below=10)), "images \\[7, 5, 4\\] and labels \\[6\\] do not match"),
        (idx(random_bytes(7, 5, 4)), "do not match"),
        (idx(np.full(7, 12, np.uint8)), "a label is 12, expected 0 to 9"),
    ]:
        labels.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load(DataConfig("mnist", dir=tmp_path))
    labels.write_bytes(good)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte: missing"):
        load(DataConfig("mnist", dir=tmp_path))
    write_idx_folder(tmp_path, test=0)
    with pytest.raises(ValueError, match="images \\[0, 5, 4\\], expected at least one"):
        load(DataConfig("mnist", dir=tmp_path))


def write_cifar(folder: Path, each: int = 2) -> dict[str, np.ndarray]:
    files = {}
    for name in TRAIN + TEST:
        records = random_bytes(each, 3073)
        records[:, 0] %= 10
        (folder / name).write_bytes(records.tobytes())
        files[name] = records
    return files


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin"])
def test_cifar_records_are_a_label_and_three_planes(tmp_path: Path, inner: str) -> None:
    folder = tmp_path / inner
    folder.mkdir(exist_ok=True)
    files = write_cifar(folder)
    loaded = load(DataConfig("cifar-10", dir=tmp_path))
    assert loaded.train_inputs.shape == (10, 3, 32, 32)
    third = files["data_batch_2.bin"][0]
    assert loaded.train_targets[2] == third[0]
    planes = [third[1 + 1024 * c : 1 + 1024 * (c + 1)].reshape(32, 32) for c in range(3)]
    torch.testing.assert_close(loaded.train_inputs[2], standardise(np.stack(planes)[None])[0])
    assert loaded.test_targets.tolist() == files["test_batch.bin"][:, 0].tolist()


def test_damaged_cifar_is_refused(tmp_path: Path) -> None:
    files = write_cifar(tmp_path)
    path = tmp_path / "data_batch_4.bin"
    for content, message in [
        (files[path.name].tobytes()[:-1], "data_batch_4.bin: 6145 bytes, expected a multiple of 3073"),
        (b"", "data_batch_4.bin: 0 bytes"),
        (b"\x0a" + bytes(3072), "data_batch_4.bin: a label is 10, expected 0 to 9"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load(DataConfig("cifar-10", dir=tmp_path))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_4.bin: missing"):
        load(DataConfig("cifar-10", dir=tmp_path))
    with pytest.raises(FileNotFoundError, match="needs --data-dir"):
        load(DataConfig("cifar-10"))


def test_pickles_are_never_read(tmp_path: Path) -> None:
    inner = tmp_path / "cifar-10-batches-py"
    inner.mkdir()
    (inner / "data_batch_1").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(FileNotFoundError, match="data_batch_1.bin: missing"):
        load(DataConfig("cifar-10", dir=tmp_path))


def test_packaged_fashion_mnist_is_the_published_balanced_subset() -> None:
    folder = resources.files("sharpkern.train") / "assets"
    packed = (folder / "fashion_mnist_5k.npz").read_bytes()
    assert hashlib.sha256(packed).hexdigest() == SHA256
    notice = (folder / "FASHION_MNIST_LICENSE.txt").read_text()
    assert "MIT" in notice
    assert "Zalando" in notice
    loaded = load(DataConfig("fashion-mnist-5k"))
    assert loaded.train_inputs.shape == (5000, 1, 28, 28)
    assert loaded.train_targets.bincount().tolist() == [500] * 10
    assert loaded.test_inputs.shape == (1000, 1, 28, 28)
    assert loaded.test_targets.bincount().tolist() == [100] * 10


def test_every_image_is_standardised_by_its_own_pixels() -> None:
    images = random_bytes(6, 3, 5, 5)
    images[2] = 17  # a constant image has nothing to divide by
    x = standardise(images).double()
    for i, image in enumerate(images.astype(np.float64)):
        want = (image - image.mean()) / (image.std() or 1.0)
        np.testing.assert_allclose(x[i].numpy(), want, atol=1e-5)


def test_text_targets_are_the_next_characters(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("naïve café ☕ " * 9, encoding="utf-8")
    loaded = load(DataConfig("text", text_file=path, context=5))
    assert loaded.classes == len(set("naïve café ☕ "))
    inputs = torch.cat([loaded.train_inputs, loaded.test_inputs]).flatten()
    targets = torch.cat([loaded.train_targets, loaded.test_targets]).flatten()
    assert torch.equal(inputs[1:], targets[:-1])
    letters = sorted(set("naïve café ☕ "))
    assert "".join(letters[i] for i in inputs[:14]) == "naïve café ☕ n"
    assert hashlib.sha256(path.read_bytes()).hexdigest()[:16] in loaded.note


def test_default_text_is_pythons_language_reference() -> None:
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    loaded = load(DataConfig("text", context=64))
    assert loaded.classes == len(set(text))
    assert f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}" in loaded.note


def test_bad_texts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "text"
    for content, message in [(b"abc\xff", "not UTF-8 at byte 3"), (b"", "is empty"), (b"abcdef", "has 6 characters")]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load(DataConfig("text", text_file=path))
    with pytest.raises(FileNotFoundError, match="no such text file"):
        load(DataConfig("text", text_file=tmp_path / "nowhere"))


def test_digits_come_from_scikit_learn_or_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    loaded = load(DataConfig("digits"))
    assert loaded.train_inputs.shape == (1500, 1, 8, 8)
    assert len(loaded.test_inputs) == 297
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match="pip install scikit-learn"):
        load(DataConfig("digits"))


def test_limit_and_names_are_checked() -> None:
    assert len(load(DataConfig("fashion-mnist-5k", limit=12)).train_inputs) == 12
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        load(DataConfig("fashion-mnist-5k", limit=0))
    with pytest.raises(ValueError, match="unknown data set 'fashion'"):
        load(DataConfig("fashion"))
