"""Text as character tokens: any UTF-8 file, or Python's own language reference."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Text(NamedTuple):
    """Tokens ``[N]`` int64, the characters they stand for, and the text's SHA-256."""

    tokens: NDArray[np.int64]
    vocabulary: str
    sha256: str


def read_text(path: Path | None = None) -> Text:
    """Read a text and number its characters.

    Args:
        path: a UTF-8 file; None for the topics of CPython's language reference (PSF licence), which every Python
            carries. That text differs between Python versions, hence the digest.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, or empty.
    """
    if path is None:
        # Three quarters of a megabyte of Python source: imported only by a run that trains on it.
        from pydoc_data.topics import topics

        # Sorted, so that the tokens do not hang on the order in which the module lists its topics.
        text = "\n".join(topics[name] for name in sorted(topics))
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: no such text file.")
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 at byte {error.start}.") from error
    if not text:
        raise ValueError(f"{path}: the text is empty.")
    # Sorted, as a set's order of strings differs between processes: a resumed run must number characters as before.
    vocabulary = "".join(sorted(set(text)))
    number = {c: i for i, c in enumerate(vocabulary)}
    tokens = np.fromiter((number[c] for c in text), np.int64, len(text))
    # The digest is of the decoded text: a file with other line ends gives the same tokens and the same digest.
    return Text(tokens, vocabulary, hashlib.sha256(text.encode()).hexdigest())
