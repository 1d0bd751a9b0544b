"""Vector kernels against a copy of the same bytes and against what a user writes in torch.

``pytest benchmarks/bench_kernels.py`` times each call with pytest-benchmark; the ratios in ``extra_info`` come from
interleaved rounds, and each result is checked against the reference first. On 16 numbers a time is the call's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from interleave import interleave, ratio
from torch import Tensor

from sharpkern import kernels
from sharpkern.kernels import reference

SIZES = [(1, 16), (1, 1_200_000), (1, 10_000_000), (8, 10_000_000)]
KERNELS = ["gram", "gram of one block", "power_step", "combine", "scale", "inv_sqrt_adam", "orthonormalise"]


def _cases(
    V: Tensor, W: Tensor, d: Tensor
) -> dict[str, tuple[Callable[..., object], tuple[object, ...], int, Callable[[], object]]]:
    """Name -> (kernel, arguments, numbers moved, the same in plain torch). Results have memory of their own."""
    k, n = V.shape
    C = torch.randn(k, k, dtype=torch.float64)
    single, out, line = C.float(), torch.empty_like(V), torch.empty_like(d)

    def power_step() -> tuple[Tensor, Tensor, Tensor]:
        theta = (V * W).sum(1)
        return theta, (W - theta[:, None] * V).norm(dim=1), W / W.norm(dim=1, keepdim=True)

    def inv_sqrt_adam(v: Tensor) -> Tensor:
        return kernels.inv_sqrt_adam(v, bias_correction2=0.5, eps=1e-8, factor=0.3, out=line)

    return {
        "gram": (kernels.gram, (V, W), 2 * k * n, lambda: V @ W.t()),
        "gram of one block": (kernels.gram, (V, V), k * n, lambda: V @ V.t()),
        "power_step": (partial(kernels.power_step, out=out), (V, W), 5 * k * n, power_step),
        "combine": (partial(kernels.combine, out=out), (C, V), 2 * k * n, lambda: torch.mm(single, V, out=out)),
        "scale": (partial(kernels.scale, out=out), (V, d), 2 * k * n + n, lambda: torch.mul(V, d, out=out)),
        "inv_sqrt_adam": (
            inv_sqrt_adam,
            (d,),
            2 * n,
            lambda: torch.div(d, 0.5, out=line).sqrt_().add_(1e-8).mul_(0.3).rsqrt_(),
        ),
        "orthonormalise": (kernels.orthonormalise, (V,), 3 * k * n, lambda: torch.linalg.qr(V.t())),
    }


def _reference(kernel: str, args: tuple[object, ...]) -> object:
    if kernel == "inv_sqrt_adam":
        return reference.inv_sqrt_adam(args[0], bias_correction2=0.5, eps=1e-8, factor=0.3)
    return getattr(reference, kernel.split()[0])(*args)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel(benchmark, kernel: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    V, W, d = torch.randn(*size), torch.randn(*size), torch.rand(size[1])
    V /= V.norm(dim=1, keepdim=True)
    call, args, moved, plain = _cases(V, W, d)[kernel]
    want = _reference(kernel, args)
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
