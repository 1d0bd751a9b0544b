"""The precision that kernels compute in: float32 for 16-bit floats, and TF32 products where they are allowed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_inside = 0  # blocks of tf32_products, of all threads
_before: list[str] = []  # torch's settings outside of them
_lock = threading.Lock()


def wide(t: Tensor) -> Tensor:
    """Return bfloat16 and float16 as float32, in which sums and differences of them are formed; others as they are."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def allows_tf32() -> bool:
    """Return torch's present setting for matrix products on a GPU."""
    # unlike allow_tf32, this can be read whichever of torch's interfaces the user has set the precision with
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def within_tf32_products() -> bool:
    """Whether a ``tf32_products`` block is being run; asking torch takes 5 us."""
    return _inside > 0


@contextmanager
def tf32_products(on: bool = True) -> Iterator[None]:
    """Let float32 matrix products and convolutions on a GPU round their factors to TF32 within the block.

    The setting is torch's, of the whole process: other threads' products are rounded too while a block is open.
    """
    global _inside  # noqa: PLW0603
    if not on:
        yield
        return
    # Both, for a convolution's products are cuDNN's.
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    # A count, since blocks may be nested, and those of threads may end in any order: the first one keeps the settings,
    # the last one brings them back.
    with _lock:
        if not _inside:
            _before[:] = [setting.fp32_precision for setting in settings]
            for setting in settings:
                setting.fp32_precision = "tf32"
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                for setting, precision in zip(settings, _before, strict=True):
                    setting.fp32_precision = precision
