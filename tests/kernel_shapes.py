"""Arguments for every registered kernel at small sizes, zero and one among them, and the shapes of its results."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sharpkern import kernels
from sharpkern.kernels import attention, dispatch, embedding, linear, norm, pointwise, reference, softmax

FAMILIES = (kernels, attention, embedding, linear, norm, pointwise, softmax)
SIZES = (2, 3, 5, 4, 6, 7, 3)  # of a kernel's dimensions, where none is 0 or 1
Given = tuple[tuple[Any, ...], dict[str, Any], list[tuple[int, ...]]]


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64) + 0.1


def gram(k: int, m: int, n: int) -> Given:
    return (rand(k, n), rand(m, n)), {}, [(k, m)]


def power_step(k: int, n: int) -> Given:
    return (rand(k, n), rand(k, n)), {}, [(k,), (k,), (k, n)]


def combine(m: int, k: int, n: int) -> Given:
    return (rand(m, k), rand(k, n)), {}, [(m, n)]


def orthonormalise(k: int, more: int) -> Given:
    return (rand(k, k + more) + 2 * torch.eye(k, k + more),), {}, [(k, k + more)]


def transpose(k: int, n: int) -> Given:
    return (rand(n, k),), {}, [(k, n)]


def scale(k: int, n: int) -> Given:
    return (rand(k, n), rand(n)), {}, [(k, n)]


def inv_sqrt_adam(n: int) -> Given:
    return (rand(n),), {"bias_correction2": 0.5, "eps": 1e-3, "factor": 0.1}, [(n,)]


def standardised(rows: int, width: int, mode: int, groups: int, inner: int) -> tuple[norm.Standardised, int]:
    s = norm.Standardised(rand(rows * groups, width * inner) - 0.6, rand(rows * groups), groups, inner, mode)
    return s, groups * width


def norm_tangent(k: int, rows: int, width: int, **layout: int) -> Given:
    s, channels = standardised(rows, width, **layout)
    shape = (k, *s.xhat.shape)
    return (s, rand(channels), rand(*shape), rand(k, channels), rand(k, channels)), {}, [shape, shape, shape[:2]]


def norm_backward_tangent(k: int, rows: int, width: int, **layout: int) -> Given:
    s, channels = standardised(rows, width, **layout)
    shape = (k, *s.xhat.shape)
    # as ``norm_tangent`` gives them: fixed statistics do not move
    moved = rand(k, channels), rand(*shape), rand(*shape[:2]) * (s.mode != norm.FIXED)
    args = (s, rand(channels), *moved, rand(*shape[1:]), rand(*shape), (True, True, True))
    return args, {}, [shape, (k, channels), (k, channels)]


def slope_product(k: int, n: int, *, curved: bool) -> Given:
    return (rand(n), rand(k, n), *((rand(n), rand(k, n)) if curved else ())), {}, [(k, n)]


def activation_slope(n: int, *, name: str) -> Given:
    x = rand(n) - 0.6
    kind = {"approximate": "tanh"} if name == "gelu_tanh" else {}
    return (name, x, getattr(torch.nn.functional, name.removesuffix("_tanh"))(x, **kind)), {}, [(n,)]


def activation_curvature(n: int, *, name: str) -> Given:
    return (name, rand(n) - 0.6, rand(n)), {}, [(n,)]


def softmax_jacobian(k: int, rows: int, C: int, *, weighted: bool) -> Given:
    p = rand(rows, C).softmax(-1)
    return (p, rand(k, rows, C), *((rand(rows),) if weighted else ())), {}, [(k, rows, C), (k, rows)]


def softmax_backward_tangent(k: int, rows: int, C: int) -> Given:
    p = rand(rows, C).softmax(-1)
    return (p, rand(k, rows, C), rand(rows, C), rand(k, rows, C)), {}, [(k, rows, C)]


def log_softmax_jacobian(k: int, rows: int, C: int) -> Given:
    return (rand(rows, C).softmax(-1), rand(k, rows, C)), {}, [(k, rows, C)]


def log_softmax_backward_tangent(k: int, rows: int, C: int) -> Given:
    args = rand(rows, C).softmax(-1), rand(k, rows, C), rand(rows), rand(k, rows, C)
    return args, {}, [(k, rows, C)]


def dual_gemm(k: int, M: int, K: int, N: int, L: int, *, second: bool) -> Given:
    more = (rand(M, L), rand(k, L, N), rand(k, N)) if second else ()
    return (rand(k, M, K), rand(K, N), *more), {}, [(k, M, N)]


def heads(B: int, T: int, S: int, d: int, e: int, *, causal: bool, masked: bool) -> Any:
    mask = rand(T, S) if masked else None
    return reference.attention(rand(B, T, d), rand(B, S, d), rand(B, S, e), mask, causal, 0.5)


def attention_(B: int, T: int, S: int, d: int, e: int, **kind: bool) -> Given:
    h = heads(B, T, S, d, e, **kind)
    return (h.q, h.k, h.v, h.mask, h.causal, h.scale), {}, [(B, T, e), (B, T)]


def attention_tangent(k: int, B: int, T: int, S: int, d: int, e: int, **kind: bool) -> Given:
    h = heads(B, T, S, d, e, **kind)
    return (h, rand(k, B, T, d), rand(k, B, S, d), rand(k, B, S, e)), {}, [(k, B, T, e), (k, B, T)]


def attention_backward(k: int, B: int, T: int, S: int, d: int, e: int, **kind: bool) -> Given:
    h = heads(B, T, S, d, e, **kind)
    return (h, rand(k, B, T, e)), {}, [(k, B, T, d), (k, B, S, d), (k, B, S, e)]


def attention_backward_tangent(k: int, B: int, T: int, S: int, d: int, e: int, **kind: bool) -> Given:
    h = heads(B, T, S, d, e, **kind)
    moving = rand(k, B, T, d), rand(k, B, S, d), rand(k, B, S, e)
    do, m = reference.attention_tangent(h, *moving)
    return (h, *moving, do, m, rand(B, T, e), rand(k, B, T, e)), {}, [(k, B, T, d), (k, B, S, d), (k, B, S, e)]


def embedding_(k: int, rows: int, tokens: int, D: int) -> Given:
    index = torch.randint(0, max(1, rows), (tokens if rows else 0,))
    return (rand(k, rows, D), index), {}, [(k, len(index), D)]


def embedding_backward(k: int, rows: int, tokens: int, D: int) -> Given:
    index = torch.randint(0, max(1, rows), (tokens if rows else 0,))
    return (rand(k, len(index), D), index, rows), {}, [(k, rows, D)]


_LAYOUTS = [
    {"mode": mode, "groups": groups, "inner": inner}
    for mode in (norm.FIXED, norm.RMS, norm.CENTRED)
    for groups, inner in ((1, 1), (2, 3))
]
_HEADS = [{"causal": c, "masked": m} for c, m in ((False, False), (True, False), (False, True))]
_ACTIVATIONS = [{"name": name} for name in ("gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "softplus", "mish")]
# Kernel: the function that makes its arguments from the sizes, and the options to try.
CASES: dict[str, tuple[Callable[..., Given], list[dict[str, Any]]]] = {
    "gram": (gram, [{}]),
    "power_step": (power_step, [{}]),
    "combine": (combine, [{}]),
    "orthonormalise": (orthonormalise, [{}]),
    "transpose": (transpose, [{}]),
    "scale": (scale, [{}]),
    "inv_sqrt_adam": (inv_sqrt_adam, [{}]),
    "norm_tangent": (norm_tangent, _LAYOUTS),
    "norm_backward_tangent": (norm_backward_tangent, _LAYOUTS),
    "slope_product": (slope_product, [{"curved": False}, {"curved": True}]),
    "activation_slope": (activation_slope, _ACTIVATIONS),
    "activation_curvature": (activation_curvature, _ACTIVATIONS),
    "softmax_jacobian": (softmax_jacobian, [{"weighted": False}, {"weighted": True}]),
    "softmax_backward_tangent": (softmax_backward_tangent, [{}]),
    "log_softmax_jacobian": (log_softmax_jacobian, [{}]),
    "log_softmax_backward_tangent": (log_softmax_backward_tangent, [{}]),
    "dual_gemm": (dual_gemm, [{"second": False}, {"second": True}]),
    "attention": (attention_, _HEADS),
    "attention_tangent": (attention_tangent, _HEADS),
    "attention_backward": (attention_backward, _HEADS),
    "attention_backward_tangent": (attention_backward_tangent, _HEADS),
    "embedding": (embedding_, [{}]),
    "embedding_backward": (embedding_backward, [{}]),
}


def all_sizes(count: int, together: int) -> Iterator[tuple[int, ...]]:
    """Sizes of so many dimensions: none is special, up to ``together`` of them are 0 or 1, all are."""
    plain = SIZES[:count]
    yield plain
    yield (0,) * count
    yield (1,) * count
    for at in (at for n in range(1, together + 1) for at in itertools.combinations(range(count), n)):
        for values in itertools.product((0, 1), repeat=len(at)):
            yield tuple(values[at.index(i)] if i in at else size for i, size in enumerate(plain))


def given(kernel: str, *, few: bool = False) -> Iterator[Given]:
    """The arguments of a kernel, in float64, at all sizes and options; ``few``: each size with one option."""
    make, options = CASES[kernel]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD,)
    names = [p.name for p in inspect.signature(make).parameters.values() if p.kind in kinds]
    sizes = sorted(set(all_sizes(len(names), 1 if few else 2)))
    chosen = zip(sizes, itertools.cycle(options)) if few else itertools.product(sizes, options)  # noqa: B905
    for size, option in chosen:
        yield make(*size, **option)


def cast(x: Any, dtype: torch.dtype) -> Any:
    """The same arguments in another dtype; tuples, named or not, in depth."""
    if isinstance(x, Tensor):
        return x.to(dtype) if x.dtype.is_floating_point else x
    if isinstance(x, tuple):
        parts = [cast(part, dtype) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x


def tensors(result: Any) -> list[Tensor]:
    """A kernel's results; of attention, which returns its operands too, o and lse."""
    if isinstance(result, Tensor):
        return [result]
    return [result.o, result.lse] if hasattr(result, "lse") else list(result)


def check(kernel: str, dtype: torch.dtype, *, few: bool = False) -> int:
    """Run a kernel, on the backend that is chosen now, on every case; compare with its definition in float64."""
    public = next(getattr(f, kernel) for f in FAMILIES if callable(getattr(f, kernel, None)))
    count = 0
    for args, keywords, shapes in given(kernel, few=few):
        low = cast(args, dtype)
        if kernel == "combine":
            low = (args[0], *low[1:])  # its coefficients are float64
        got = tensors(public(*low, **keywords))
        want = tensors(getattr(reference, kernel)(*args, **keywords))
        assert [tuple(t.shape) for t in got] == shapes, (kernel, shapes)
        for a, b in zip(got, want, strict=True):
            size = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 0.0
            torch.testing.assert_close(a.double(), b, rtol=0, atol=200 * torch.finfo(dtype).eps * (1 + size))
        count += 1
    return count


def registered() -> list[str]:
    return sorted(dispatch._versions)
