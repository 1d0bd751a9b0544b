"""The measurements of ``gpu_check.py``: each returns a row, with its result checked against the truth before it counts.

Every function takes a device and whether to run at full size; on the CPU, at tiny sizes, they run for the sake of the
code alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from gpu_attention import attention, attention_scan
from gpu_timing import Row, error_of, row, seconds
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import GPT, WORKLOADS, Workload

import sharpkern as sk
from sharpkern import kernels
from sharpkern.kernels import norm, pointwise, reference, softmax
from sharpkern.kernels.dispatch import choose
from sharpkern.kernels.linear import dual_gemm
from sharpkern.kernels.precision import tf32_products

# -- Hessian-vector products ----------------------------------------------------------------------------------------


def _to(batch: Any, device: torch.device) -> Any:
    return tuple(t.to(device) for t in batch)


def _small_gpt(context: int, d: int, blocks: int) -> Workload:
    tokens = torch.randint(0, 64, (2, context + 1))

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return Workload(GPT(64, d, 2, blocks, context), loss, (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))


def _product_of(model: nn.Module, loss_fn: Any, batch: Any, v: Tensor) -> Callable[[], Tensor]:
    """Double backward, with forward and gradient in each product; attention on the path that has derivatives."""
    params = list(model.parameters())

    def product() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            grads = torch.autograd.grad(loss_fn(model(batch[0]), batch[1]), params, create_graph=True)
            dot = torch.cat([g.reshape(-1) for g in grads]) @ v
            return torch.cat([t.reshape(-1) for t in torch.autograd.grad(dot, params)])

    return product


def _product_row(name: str, work: Workload, device: torch.device, full: bool, goal: str, against: str) -> Row:
    model, loss_fn, batch = work
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    wide = copy.deepcopy(model).double()
    inputs = tuple(t.double() if t.dtype.is_floating_point else t for t in batch)
    truth = _product_of(wide, loss_fn, inputs, v.double())()
    model, batch, v = model.to(device), _to(batch, device), v.to(device)
    H = sk.HessianOperator(model, loss_fn, batch)
    H.matvec(v)  # records
    params = list(model.parameters())
    calls: dict[str, Callable[[], object]] = {
        "HVP": lambda: H.matvec(v),
        "autograd twice": _product_of(model, loss_fn, batch, v),
        "gradient": lambda: torch.autograd.grad(loss_fn(model(batch[0]), batch[1]), params),
    }
    times = seconds(calls, device, full)
    value = min(times[against]) / min(times["HVP"])
    limit = {"autograd twice": 10.0, "gradient": 1 / 2.0}[against]
    error = error_of(H.matvec(v).cpu(), truth)
    result = row(name, goal, value, value >= limit, error, 5e-3, times)  # convolutions may be in TF32
    return result | {"recorded": bool(getattr(H._engine, "_recordings", None))}


def launch_bound(device: torch.device, full: bool) -> Iterator[Row]:
    """Products of networks too small to keep a GPU busy, as one CUDA graph."""
    goal = ">= 10x faster than autograd twice"
    gpt = _small_gpt(32, 64, 2) if full else _small_gpt(6, 8, 1)
    for name, work in (("HVP, small MLP", WORKLOADS["overhead"]()), ("HVP, small GPT", gpt)):
        yield _product_row(name, work, device, full, goal, "autograd twice")


def products(device: torch.device, full: bool) -> Iterator[Row]:
    """Products against gradients."""
    for name in ("mlp", "cnn", "gpt") if full else ("overhead",):
        yield _product_row(f"HVP, {name}", WORKLOADS[name](), device, full, ">= 0.5 HVPs per gradient", "gradient")


def tf32(device: torch.device, full: bool) -> Iterator[Row]:
    """Tangent sweeps that round to TF32, against float32, and by how much they are off."""
    model, loss_fn, batch = WORKLOADS["mlp" if full else "overhead"]()
    H = sk.HessianOperator(model.to(device), loss_fn, _to(batch, device))
    v = torch.randn(H.n, device=device)

    def rounded() -> Tensor:
        with tf32_products():
            return H.matvec(v)

    error = error_of(rounded(), H.matvec(v))
    times = seconds({"TF32": rounded, "float32": lambda: H.matvec(v)}, device, full)
    value = min(times["float32"]) / min(times["TF32"])
    yield row("HVP in TF32, mlp", ">= 1x of float32", value, value >= 1, error, 5e-3, times)


def waits(device: torch.device, full: bool) -> Iterator[Row]:  # noqa: ARG001
    """How often the host waits for the GPU in a product, and in a whole solve."""
    import warnings

    work = WORKLOADS["overhead"]()
    H = sk.HessianOperator(work.model.to(device), work.loss_fn, _to(work.batch, device))
    v = torch.randn(H.n, device=device)
    for _ in range(2):
        H.matvec(v)

    def count(call: Callable[[], Any]) -> tuple[int, Any]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                result = call()
            finally:
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(w.message) for w in caught), result

    product, _ = count(lambda: H.matvec(v))
    solve, found = count(lambda: sk.lanczos(H, tol=1e-2, max_matvecs=60))
    yield row("waits in an HVP", "0", product, product == 0, 0.0, 0.0, {})
    each = solve / max(1, found.matvecs)
    yield row("waits in a solve, per product", "<= 1", each, each <= 1, 0.0, 0.0, {}) | {"matvecs": found.matvecs}


# -- kernels --------------------------------------------------------------------------------------------------------


def gemms(device: torch.device, full: bool) -> Iterator[Row]:
    """The dual GEMM with its bias, against torch's two products alone."""
    size = 4096 if full else 32
    before = torch.backends.cuda.matmul.fp32_precision
    for name, dtype, precision in (
        ("bfloat16", torch.bfloat16, before),
        ("TF32", torch.float32, "tf32"),
        ("float32", torch.float32, "ieee"),
    ):
        torch.backends.cuda.matmul.fp32_precision = precision
        try:
            yield _gemm(f"dual GEMM and bias, {size}^3, {name}", size, dtype, device, full)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before


def _gemm(name: str, size: int, dtype: torch.dtype, device: torch.device, full: bool) -> Row:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    dx, W, x, dW = normal(1, size, size), normal(size, size), normal(size, size), normal(1, size, size)
    bias = normal(1, size)
    out = torch.empty(size, size, dtype=dtype, device=device)

    def two() -> Tensor:
        return torch.mm(dx[0], W.t(), out=out).addmm_(x, dW[0].t())

    calls: dict[str, Callable[[], object]] = {
        "fused": lambda: dual_gemm(dx, W.t(), x, dW.mT, bias),
        "without bias": lambda: dual_gemm(dx, W.t(), x, dW.mT),
        "two products of torch": two,
    }
    times = seconds(calls, device, full)
    got = dual_gemm(dx, W.t(), x, dW.mT, bias)[0, :64]
    d = [t.double() for t in (dx[0, :64], W, x[:64], dW[0], bias)]
    want = d[0] @ d[1].t() + d[2] @ d[3].t() + d[4]
    value = min(times["two products of torch"]) / min(times["fused"])
    limit = 1e-5 if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "ieee" else 1e-2
    return row(name, ">= 0.90 of torch's rate", value, value >= 0.9, error_of(got, want), limit, times) | {
        "backend": choose("dual_gemm", dx).__name__,
        "bias_seconds": min(times["fused"]) - min(times["without bias"]),
        "teraflops": 4e-12 * size**3 / min(times["fused"]),
    }


def _copy(numbers: int, device: torch.device) -> Callable[[], object]:
    """A copy that moves so many float32 numbers, read and written."""
    source = torch.ones(max(1, numbers // 2), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _against_copy(
    name: str, kernel: str, call: Callable[[], Any], want: Any, moved: int, x: Tensor, full: bool, limit: float = 1e-4
) -> Row:
    times = seconds({"kernel": call, "copy": _copy(moved, x.device)}, x.device, full)
    results, wants = (r if isinstance(r, tuple) else (r,) for r in (call(), want))
    error = max(error_of(a, b) for a, b in zip(results, wants, strict=True) if a is not None)
    value = min(times["copy"]) / min(times["kernel"])
    return row(name, ">= 0.85 of the copy bandwidth", value, value >= 0.85, error, limit, times) | {
        "backend": choose(kernel, x).__name__,
        "gigabytes_per_second": 4e-9 * moved / min(times["kernel"]),
    }


def vectors(device: torch.device, full: bool) -> Iterator[Row]:
    """Vector kernels."""
    n = 10_000_000 if full else 1000
    moment = {"bias_correction2": 0.5, "eps": 1e-8, "factor": 0.5}
    for k in (1, 8):
        V, W, d = torch.randn(k, n, device=device), torch.randn(k, n, device=device), torch.rand(n, device=device)
        V /= V.norm(dim=1, keepdim=True)
        C = torch.randn(k, k, dtype=torch.float64, device=device)
        cases: dict[str, tuple[tuple[Any, ...], dict[str, float], int]] = {
            "gram": ((V, W), {}, 2 * k * n),
            "power_step": ((V, W), {}, 5 * k * n),
            "combine": ((C, V), {}, 2 * k * n),
            "scale": ((V, d), {}, 2 * k * n + n),
        }
        if k == 1:
            cases["inv_sqrt_adam"] = ((d,), moment, 2 * n)
        for name, (args, options, moved) in cases.items():
            function = getattr(kernels, name)
            want = getattr(reference, name)(*args, **options)
            call = _bound(function, args, options)
            yield _against_copy(f"{name}, k = {k}, n = {n:.0e}", name, call, want, moved, V, full)


def _bound(function: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]) -> Callable[[], Any]:
    return lambda: function(*args, **options)


def rows_and_numbers(device: torch.device, full: bool) -> Iterator[Row]:
    """Norm, softmax and pointwise kernels, one tangent and four."""
    rows, D = (16384, 1024) if full else (6, 16)
    for k in (1, 4):
        x = torch.randn(rows, D, device=device)
        s = norm.Standardised(x, torch.rand(rows, device=device) + 0.5, 1, 1, norm.CENTRED)
        p = torch.softmax(x, 1)
        u, z = torch.randn(k, rows, D, device=device), torch.randn(k, rows, D, device=device)
        w, dw = torch.rand(D, device=device), torch.randn(k, D, device=device)
        _, dxhat, along = reference.norm_tangent(s, w, u, dw, dw)
        numbers = rows * D
        needs = (True, False, False)
        cases: dict[str, tuple[Any, tuple[Any, ...], int]] = {
            "slope_product": (pointwise.slope_product, (x, u, p, z), (2 + 3 * k) * numbers),
            "softmax_jacobian": (softmax.softmax_jacobian, (p, u), (1 + 2 * k) * numbers),
            "softmax_backward_tangent": (softmax.softmax_backward_tangent, (p, z, x, u), (2 + 3 * k) * numbers),
            "log_softmax_jacobian": (softmax.log_softmax_jacobian, (p, u), (1 + 2 * k) * numbers),
            "log_softmax_backward_tangent": (
                softmax.log_softmax_backward_tangent, (p, z, x[:, 0], u), (1 + 3 * k) * numbers,
            ),
            "norm_tangent": (norm.norm_tangent, (s, w, u, dw, dw), (1 + 3 * k) * numbers),
            "norm_backward_tangent": (
                norm.norm_backward_tangent, (s, w, dw, dxhat, along, x, u, needs), (2 + 3 * k) * numbers,
            ),
        }  # fmt: skip
        for name, (function, args, moved) in cases.items():
            want = getattr(reference, name)(*args)
            call = _bound(function, args, {})
            yield _against_copy(f"{name}, {k} x {rows} x {D}", name, call, want, moved, x, full)


MEASUREMENTS: tuple[Callable[[torch.device, bool], Iterator[Row]], ...] = (
    launch_bound, gemms, attention, attention_scan, vectors, rows_and_numbers, products, tf32, waits,
)  # fmt: skip
