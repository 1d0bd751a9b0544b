"""Compile a Triton kernel for a chip that is not there, and read what it needs of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
CHIPS = (80, 90, 100)  # A100, H100, B200
# Bytes of stack a thread: before 3.9 triton's ptxas keeps two registers there across the main loop of a few kernels.
_STACK_LIMIT = 8 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9) else 0
_SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of shared memory one block may use


class Resources(NamedTuple):
    """Registers a thread, bytes of stack a thread (spills live there), bytes of shared memory a block."""

    registers: int
    stack: int
    shared: int


def check(chip: int, kernel: Any, signature: dict[str, str], constants: dict[str, Any], **options: int) -> None:
    """Fail unless the kernel compiles for a chip, keeps its tiles in registers and fits into its shared memory."""
    used = resources(chip, kernel, signature, constants, **options)
    assert used.stack <= _STACK_LIMIT, f"{kernel.__name__} {constants} spills on sm_{chip}: {used}"
    assert used.shared <= _SHARED_LIMIT[chip], f"{kernel.__name__} {constants} on sm_{chip}: {used}"


def resources(
    chip: int, kernel: Any, signature: dict[str, str], constants: dict[str, Any], **options: int
) -> Resources:
    """Compile ``kernel`` to a cubin for ``sm_<chip>`` and read what it uses.

    Args:
        chip: 80, 90 or 100.
        kernel: a ``triton.jit`` function, not interpreted.
        signature: name to type of the arguments that are not constexpr, such as ``*fp32``, ``i32``, ``fp32``.
        constants: name to value of the constexpr arguments.
        options: num_warps and num_stages, as at launch.
    """
    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    # as at launch: torch's memory is aligned, which lets loads be vectorised
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if types[name][0] == "*"}
    source = ASTSource(kernel, types, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, aligned)
    done = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [_CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", listing)[1]) for word in ("REG", "STACK"))
    return Resources(registers, stack, done.metadata.shared)
