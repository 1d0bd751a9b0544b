"""Compile what a kernel's Python function launches, as Triton would specialise it, from tensors without memory."""

from __future__ import annotations

from types import ModuleType
from typing import Any
from unittest import mock

import offline
import torch
from torch import Tensor

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}


def check_launches(chip: int, module: ModuleType, *kernels: str, call: Any) -> list[str]:
    """Call a function on meta tensors; each kernel launched is compiled, and must not spill. Returns their names."""
    launched: list[str] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.kernel = getattr(module, name)

        def __getitem__(self, grid: tuple[int]) -> Any:
            assert 0 < grid[0] < 2**31
            return self.launch

        def launch(self, *args: Any, num_warps: int, **constants: Any) -> None:
            launched.append(self.kernel.__name__)
            _check(chip, self.kernel, dict(zip(self.kernel.arg_names, args, strict=False)), constants, num_warps)

    with mock.patch.multiple(module, **{name: Kernel(name) for name in kernels}):
        call()
    return launched


def _check(chip: int, kernel: Any, args: dict[str, Any], constants: dict[str, Any], warps: int) -> None:
    ints = {name: value for name, value in args.items() if not isinstance(value, Tensor)}
    constants = constants | {name: 1 for name, value in ints.items() if value == 1}
    signature = {name: "i32" if value < 2**31 else "i64" for name, value in ints.items()}
    signature |= {name: f"*{_TYPES[t.dtype]}" for name, t in args.items() if isinstance(t, Tensor)}
    sixteens = [name for name, value in ints.items() if value != 1 and value % 16 == 0]

    def source(fn: Any, types: Any, values: Any, attributes: dict[tuple[int], Any]) -> Any:
        known = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in sixteens}
        return original(fn, types, values, attributes | known)

    original = offline.ASTSource
    with mock.patch.object(offline, "ASTSource", source):
        offline.check(chip, kernel, signature, constants, num_warps=warps)
