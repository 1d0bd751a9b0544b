"""Read IDX files (MNIST, Fashion-MNIST, ...), gzipped or not."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes.

    Args:
        path: the file, gzipped or not, whatever its name says.

    Returns:
        uint8 array of the shape in the header.

    Raises:
        ValueError: not an IDX file of bytes, or of the wrong length.

    Source: the IDX format, described with the MNIST database.
    """
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: the gzip file is damaged or truncated ({error}).") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08" or not data[3]:
        raise ValueError(
            f"{path}: not an IDX file of bytes; it starts with {data[:4].hex() or 'nothing'}, expected 000008nn."
        )
    dims = data[3]
    if len(data) < 4 + 4 * dims:
        raise ValueError(f"{path}: {len(data)} bytes, expected a header of {4 + 4 * dims}.")
    shape = tuple(int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims))
    expected = 4 + 4 * dims + math.prod(shape)
    if len(data) != expected:
        raise ValueError(f"{path}: {len(data)} bytes, expected {expected} for shape {list(shape)}.")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)
