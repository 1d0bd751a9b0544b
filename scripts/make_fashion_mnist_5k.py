"""Make sharpkern/train/assets/fashion_mnist_5k.npz from the full Fashion-MNIST (Debian: dataset-fashion-mnist).

500 training and 100 test images of each class, chosen with a fixed seed, kept in the original order.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sharpkern.train.idx import read_idx

ASSETS = Path(__file__).parent.parent / "sharpkern" / "train" / "assets"


def balanced(labels: NDArray[np.uint8], each: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Choose so many examples of every class."""
    chosen = [rng.choice(np.flatnonzero(labels == c), each, replace=False) for c in range(10)]
    return np.sort(np.concatenate(chosen))


def main(folder: Path) -> None:
    """Write the subset."""
    rng = np.random.default_rng(2026)
    arrays = {}
    for split, stem, each in [("train", "train", 500), ("test", "t10k", 100)]:
        images = read_idx(folder / f"{stem}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{stem}-labels-idx1-ubyte.gz")
        keep = balanced(labels, each, rng)
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[keep], labels[keep]
    np.savez_compressed(ASSETS / "fashion_mnist_5k.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "/usr/share/datasets/fashion-mnist"))
