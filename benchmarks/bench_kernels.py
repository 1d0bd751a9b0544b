"""Vector kernels against a copy of the same bytes and against what a user writes in torch.

``pytest benchmarks/bench_kernels.py`` times each call with pytest-benchmark; the ratios in ``extra_info`` come from
interleaved rounds, and each result is checked against the reference first. On 16 numbers a time is the call's own.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from interleave import interleave, ratio
from torch import Tensor

from sharpkern import kernels
from sharpkern.kernels import reference

SIZES = [(1, 16), (1, 1_200_000), (4, 1_200_000), (1, 20_000_000)]


def _cases(
    V: Tensor, W: Tensor, d: Tensor
) -> dict[str, tuple[Callable[..., object], tuple[object, ...], int, Callable[[], object]]]:
    """Name -> (kernel, arguments, numbers moved, the same in plain torch)."""
    k, n = V.shape
    C = torch.randn(k, k, dtype=torch.float64)

    def power_step() -> tuple[Tensor, Tensor, Tensor]:
        theta = (V * W).sum(1)
        return theta, (W - theta[:, None] * V).norm(dim=1), W / W.norm(dim=1, keepdim=True)

    return {
        "gram": (kernels.gram, (V, W), 2 * k * n, lambda: V @ W.t()),
        "power_step": (kernels.power_step, (V, W), 5 * k * n, power_step),
        "combine": (kernels.combine, (C, V), 2 * k * n, lambda: C.float() @ V),
        "scale": (kernels.scale, (V, d), 2 * k * n + n, lambda: V * d),
    }


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("kernel", ["gram", "power_step", "combine", "scale"])
def test_kernel(benchmark, kernel: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    V, W, d = torch.randn(*size), torch.randn(*size), torch.rand(size[1])
    V /= V.norm(dim=1, keepdim=True)
    call, args, moved, plain = _cases(V, W, d)[kernel]
    want = getattr(reference, kernel)(*args)
    got = call(*args)
    for g, w in zip(got if isinstance(got, tuple) else [got], want if isinstance(want, tuple) else [want], strict=True):
        assert torch.allclose(g.double(), w.double(), rtol=1e-4, atol=1e-4 * float(w.abs().max()))
    source = torch.randn(moved // 2)
    target = torch.empty_like(source)
    seconds = interleave({"kernel": lambda: call(*args), "copy": lambda: target.copy_(source), "torch": plain}, 15)
    benchmark.extra_info["to_copy"] = ratio(seconds, "kernel", "copy")
    benchmark.extra_info["to_torch"] = ratio(seconds, "kernel", "torch")
    benchmark.extra_info["gigabytes_per_second"] = 4e-9 * moved / min(seconds["kernel"])
    benchmark.pedantic(call, args=args, rounds=10, warmup_rounds=1)
