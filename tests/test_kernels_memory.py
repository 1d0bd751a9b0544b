"""Large blocks of vectors are on huge pages, small ones are left to malloc."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sharpkern import kernels
from sharpkern.kernels.cpu import native
from sharpkern.kernels.cpu.huge_pages import empty


def flags(address: int) -> list[str]:
    """Return the kernel's flags of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, stop = (int(part, 16) for part in head.split("-"))
            inside = start <= address < stop
        elif inside and head == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.skipif(native.REASON is not None, reason="the advice is given by compiled code")
@pytest.mark.skipif(bool(native.forced_backend()), reason="only the CPU backend's results are")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no huge pages")
def test_large_blocks_and_large_results_are_advised() -> None:
    large = empty(3, 5_000_000, torch.float32, torch.device("cpu"))
    assert "hg" in flags(large[1].data_ptr())
    block = torch.randn(2, 5_000_000)
    for result in (kernels.power_step(block, block)[2], kernels.combine(torch.eye(2).double(), block)):
        assert "hg" in flags(result[1].data_ptr())


def test_small_blocks_are_not_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(native, "_C", SimpleNamespace(use_huge_pages=lambda _address, size: asked.append(size)))
    empty(2, 4 << 20, torch.float32, torch.device("cpu"))
    empty(1, 4 << 20, torch.float32, torch.device("cpu"))
    assert asked == [32 << 20]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_block_holds_what_is_written(dtype: torch.dtype) -> None:
    block = empty(2, 6_000_001, dtype, torch.device("cpu"))
    values = torch.randn(2, 6_000_001, dtype=dtype)
    assert torch.equal(block.copy_(values), values)
    assert empty(0, 7, dtype, torch.device("cpu")).shape == (0, 7)
