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
from sharpkern.kernels import pointwise, reference, softmax
from sharpkern.rop.rule import RULES

aten = torch.ops.aten
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


ACTIVATIONS = ["gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "softplus", "mish"]


def _row_cases() -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Name -> (kernel, its definition in plain torch), on 786,432 numbers or near."""
    x, g = torch.randn(2, 1536, 512)
    p, u, z = torch.randn(1536, 512).softmax(1), torch.randn(1, 1536, 512), torch.randn(1, 1536, 512)
    total, columns = torch.randn(1536), torch.randn(200_000, 4)
    cases: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {}
    for name, args in {
        **{f"activation_slope {a}": (a, x, torch.nn.functional.gelu(x)) for a in ACTIVATIONS},  # only GELU's is read
        **{f"activation_curvature {a}": (a, x, g) for a in ACTIVATIONS},
        "softmax_jacobian": (p, u),
        "softmax_backward_tangent": (p, z, x, u),
        "log_softmax_jacobian": (p, u),
        "log_softmax_backward_tangent": (p, z, total, u),
        "transpose": (columns,),
    }.items():
        kernel = name.split()[0]
        family = next(f for f in (pointwise, softmax, kernels) if hasattr(f, kernel))
        cases[name] = partial(getattr(family, kernel), *args), partial(getattr(reference, kernel), *args)
    return cases


@pytest.mark.parametrize("name", _row_cases())
def test_row_kernel(benchmark, name: str) -> None:
    """Of the program's rules: a kernel's time over that of its definition in plain torch."""
    torch.manual_seed(0)
    call, plain = _row_cases()[name]
    for g, w in zip(_tensors(call()), _tensors(plain()), strict=True):
        assert torch.allclose(g, w, rtol=1e-3, atol=1e-5 * float(w.abs().max()))
    seconds = interleave({"kernel": call, "torch": plain}, 100)
    benchmark.extra_info["to_torch"] = ratio(seconds, "kernel", "torch")
    benchmark.pedantic(call, rounds=10, warmup_rounds=1)


def _tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]


OPS = {
    "gelu": aten.gelu.default, "silu": aten.silu.default, "tanh": aten.tanh.default, "sigmoid": aten.sigmoid.default,
    "softplus": aten.softplus.default, "mish": aten.mish.default, "elu": aten.elu.default,
    "leaky_relu": aten.leaky_relu.default, "hardswish": aten.hardswish.default,
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_activation_primal(benchmark, name: str) -> None:
    """Value, gradient, and what products need, over torch's own value and gradient."""
    torch.manual_seed(0)
    x, g = torch.randn(2, 256, 512)
    rule, leaf = RULES[OPS[name]](OPS[name], (True,)), x.clone().requires_grad_()
    constants = ("none",) if name == "gelu" else ()

    def primal() -> None:
        with torch.no_grad():
            rule.forward(x, *constants)
            rule.backward(g[None])
            rule.prepare(g[None])

    def plain() -> None:
        torch.autograd.grad(OPS[name](leaf), leaf, g)

    seconds = interleave({"rule": primal, "torch": plain}, 200)
    benchmark.extra_info["to_torch"] = ratio(seconds, "rule", "torch")
    benchmark.pedantic(primal, rounds=10, warmup_rounds=1)
