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
        # By the first bytes and not by the name: what unpacks a download on the way often keeps the ".gz" in its name.
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    # gzip raises another error for each way to be damaged: cut short, a wrong checksum, a stream that does not decode.
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: the gzip file is damaged or truncated ({error}).") from error
    # The header: two zero bytes, the type (08 is unsigned bytes), the number of dimensions, and as many sizes.
    if len(data) < 4 or data[:3] != b"\0\0\x08" or not data[3]:
        raise ValueError(
            f"{path}: not an IDX file of bytes; it starts with {data[:4].hex() or 'nothing'}, expected 000008nn."
        )
    dims = data[3]
    if len(data) < 4 + 4 * dims:
        raise ValueError(f"{path}: {len(data)} bytes, expected a header of {4 + 4 * dims}.")
    # Big-endian whatever the machine. Python's integers do not overflow, so an absurd size fails the comparison below.
    shape = tuple(int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims))
    expected = 4 + 4 * dims + math.prod(shape)
    if len(data) != expected:
        raise ValueError(f"{path}: {len(data)} bytes, expected {expected} for shape {list(shape)}.")
    try:
        # A read-only view of the bytes, no copy: whoever trains on it converts to float32 anyway.
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)
    except ValueError as error:  # more dimensions than NumPy has, or one of 0 beside huge ones
        raise ValueError(f"{path}: NumPy has no array of shape {list(shape)} ({error}).") from error
