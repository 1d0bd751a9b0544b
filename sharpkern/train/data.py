"""Data sets by name: real images in the package, users' files, and text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cifar import TEST, TRAIN, read_cifar10
from .config import DataConfig
from .idx import read_idx
from .text import read_text

_DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts its files


@dataclass(frozen=True)
class Dataset:
    """Training and test data on the CPU.

    Attributes:
        train_inputs: images ``[N, C, H, W]`` float32, each standardised to mean 0 and standard deviation 1 over all its
            pixels and channels; or tokens ``[N, context]`` int64.
        train_targets: classes ``[N]`` int64, or the next tokens ``[N, context]``.
        test_inputs, test_targets: likewise.
        classes: number of classes, or size of the vocabulary.
        note: where the data came from.
    """

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    classes: int
    note: str


def load(config: DataConfig) -> Dataset:
    """Load a data set.

    Args:
        config: which, and where. fashion-mnist-5k is in the package: 5,000 + 1,000 real images. fashion-mnist and mnist
            are IDX files in ``dir``, Fashion-MNIST also where Debian's package puts them. cifar-10 is its binary
            version in ``dir``. digits needs scikit-learn. text is ``text_file``, or Python's language reference.

    Raises:
        ValueError: unknown name, a limit below 1, or a damaged file.
        FileNotFoundError: a file is missing.
    """
    # Checked, for a slice would take a negative limit as "all but the last".
    if config.limit is not None and config.limit < 1:
        raise ValueError(f"limit must be at least 1, got {config.limit}.")
    data = _text(config.text_file, config.context) if config.name == "text" else _images(config.name, config.dir)
    # Cut after the images were standardised, which changes nothing: each is standardised by itself.
    return replace(
        data, train_inputs=data.train_inputs[: config.limit], train_targets=data.train_targets[: config.limit]
    )


def _images(name: str, folder: Path | None) -> Dataset:
    readers: dict[str, Callable[[], Arrays]] = {
        "fashion-mnist-5k": _packaged,
        "fashion-mnist": lambda: _idx(folder or _DEBIAN, "Fashion-MNIST"),
        "mnist": lambda: _idx(folder, "MNIST"),
        "cifar-10": lambda: _cifar(folder),
        "digits": _digits,
    }
    if name not in readers:
        raise ValueError(f"unknown data set {name!r}; known are {', '.join([*readers, 'text'])}.")
    train_x, train_y, test_x, test_y = readers[name]()
    return Dataset(
        standardise(train_x), torch.from_numpy(train_y.astype(np.int64)),
        standardise(test_x), torch.from_numpy(test_y.astype(np.int64)), 10, name,
    )  # fmt: skip


def standardise(images: NDArray[np.uint8]) -> Tensor:
    """Turn bytes ``[N, ...]`` into float32 ``[N, C, H, W]``, each image with mean 0 and standard deviation 1."""
    x = torch.from_numpy(images.astype(np.float32))
    x = x[:, None] if x.ndim == 3 else x
    flat = x.flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    # An image of one colour has no deviation. The clamp leaves it zero, where a division would make it NaN.
    flat = flat / flat.std(1, keepdim=True, correction=0).clamp(min=1e-6)
    return flat.view_as(x)


Arrays = tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]


def _packaged() -> Arrays:
    # Found through the package and not beside this file, so that an installation in a zip works too.
    with resources.files("sharpkern.train").joinpath("assets/fashion_mnist_5k.npz").open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        return arrays["train_images"], arrays["train_labels"], arrays["test_images"], arrays["test_labels"]


def _idx(folder: Path | None, what: str) -> Arrays:
    if folder is None:
        raise FileNotFoundError(f"{what} needs --data-dir with its IDX files.")
    arrays = []
    for stem in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        # Some mirrors write "train-images.idx3-ubyte".
        names = [f"{stem}-ubyte", f"{stem}-ubyte.gz", f"{stem}-ubyte".replace("-idx", ".idx")]
        found = next((folder / name for name in names if (folder / name).is_file()), None)
        if found is None:
            hint = " (Debian: apt install dataset-fashion-mnist)" if what.startswith("Fashion") else ""
            raise FileNotFoundError(f"{folder / names[0]}: missing, with or without .gz{hint}.")
        arrays.append(read_idx(found))
    for images, labels in (arrays[:2], arrays[2:]):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise ValueError(f"{folder}: images {list(images.shape)} and labels {list(labels.shape)} do not match.")
        # Before the labels are looked at, as ``max()`` of nothing raises an error of its own.
        if images.size == 0:
            raise ValueError(f"{folder}: images {list(images.shape)}, expected at least one.")
        # EMNIST comes in the same format with more classes; it would fail later, in the loss.
        if labels.max() > 9:
            raise ValueError(f"{folder}: a label is {labels.max()}, expected 0 to 9: is this {what}?")
    return arrays[0], arrays[1], arrays[2], arrays[3]


def _cifar(folder: Path | None) -> Arrays:
    if folder is None:
        raise FileNotFoundError("CIFAR-10 needs --data-dir with the files of its binary version.")
    return (*read_cifar10(folder, TRAIN), *read_cifar10(folder, TEST))


def _digits() -> Arrays:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("the data set 'digits' needs scikit-learn: pip install scikit-learn.") from error
    images, labels = load_digits(return_X_y=True)
    # A fixed order, whatever the run's seed: which examples are test data must not change from run to run.
    order = np.random.default_rng(0).permutation(len(images))
    # From 0..16 to bytes; the factor drops out when the image is standardised.
    x, y = (images.reshape(-1, 8, 8) * 15).astype(np.uint8)[order], labels.astype(np.uint8)[order]
    return x[:1500], y[:1500], x[1500:], y[1500:]


def _text(path: Path | None, context: int) -> Dataset:
    if context < 1:
        raise ValueError(f"context must be at least 1, got {context}.")
    text = read_text(path)
    count = (len(text.tokens) - 1) // context
    if count < 2:
        raise ValueError(f"the text has {len(text.tokens)} characters, too few for two sequences of {context}.")
    # One token more than the inputs have, for the last target.
    tokens = torch.from_numpy(text.tokens[: count * context + 1])
    inputs, targets = tokens[:-1].view(count, context), tokens[1:].view(count, context)
    # The test text is the end. Sequences picked at random would lie between training text that continues in them.
    cut = max(1, count * 9 // 10)
    source = "pydoc_data.topics" if path is None else str(path)
    note = f"{source}, sha256 {text.sha256[:16]}"
    return Dataset(inputs[:cut], targets[:cut], inputs[cut:], targets[cut:], len(text.vocabulary), note)
