"""Read CIFAR-10 in its binary version. No pickle is ever loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# A record: one byte of label, then the planes of red, green and blue, 32 rows of 32 pixels each.
_RECORD = 1 + 3 * 32 * 32
TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST = ("test_batch.bin",)


def read_cifar10(folder: Path, names: tuple[str, ...]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read some of the binary files.

    Args:
        folder: holds the .bin files, or a folder ``cifar-10-batches-bin`` that does.
        names: file names.

    Returns:
        images ``[N, 3, 32, 32]`` and labels ``[N]``, uint8.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated, or a label is above 9.
    """
    # The archive unpacks into a folder of this name: the folder above it will do as well.
    inner = folder / "cifar-10-batches-bin"
    folder = inner if inner.is_dir() else folder
    parts = []
    for name in names:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; the binary version of CIFAR-10 has {', '.join(TRAIN + TEST)}.")
        data = np.fromfile(path, np.uint8)
        # A file that was cut short would read without an error, and all records behind the cut would be missing.
        if data.size == 0 or data.size % _RECORD:
            raise ValueError(f"{path}: {data.size} bytes, expected a multiple of {_RECORD}.")
        part = data.reshape(-1, _RECORD)
        # Any file of a fitting length passes for images. CIFAR-100 does not get here: its records are one byte longer.
        if part[:, 0].max() > 9:
            raise ValueError(f"{path}: a label is {part[:, 0].max()}, expected 0 to 9: is this CIFAR-10?")
        parts.append(part)
    records = np.concatenate(parts)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]
