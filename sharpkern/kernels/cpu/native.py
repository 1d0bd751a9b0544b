"""Tensors to addresses for the compiled kernels in ``sharpkern._C``; same names and results as ``reference``."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..cholesky_qr import cholesky_qr
from ..saved import Standardised

try:
    from ... import _C
except ImportError as error:
    _C = None
    REASON: str | None = f"the compiled module is missing ({error}): reinstall with a C++ compiler present"
else:
    REASON = None


def forced_backend() -> str | None:
    """Return the value of ``SHARPKERN_BACKEND``."""
    return os.environ.get("SHARPKERN_BACKEND")


if _C is not None:
    forced_backend = _C.forced_backend

_ALWAYS_FRESH = 32 << 20  # bytes, from which glibc's malloc maps new pages at each call

Recorder = Callable[[Any, tuple[Any, ...], tuple[Any, ...]], None]
_recorders: list[Recorder] = []


@contextmanager
def recorded(recorder: Recorder) -> Iterator[None]:
    """Within the block, show each call of a compiled kernel: ``recorder(function, addresses, arguments)``."""
    _recorders.append(recorder)
    try:
        yield
    finally:
        _recorders.pop()


def _call(kernel: str, x: Tensor, *arguments: float | Tensor | None) -> None:
    """Call a compiled kernel of x's dtype; tensors become addresses, None becomes 0."""
    function = _function(kernel, x.dtype)
    # the common type first: asking whether something is a tensor costs more than an address
    addresses = tuple([a if type(a) is int else a.data_ptr() if isinstance(a, Tensor) else a or 0 for a in arguments])
    function(*addresses)
    for recorder in _recorders:
        recorder(function, addresses, arguments)


@functools.cache
def _function(kernel: str, dtype: torch.dtype) -> Any:
    return getattr(_C, f"{kernel}_f64" if dtype == torch.float64 else f"{kernel}_f32")


def on_huge_pages(block: Tensor) -> Tensor:
    """Advise the system (Linux) to back a large block, not yet written to, with pages of 2 MiB.

    Touching 4 KiB pages for the first time takes six times longer.
    """
    if _C is not None and block.nbytes >= _ALWAYS_FRESH:
        _C.use_huge_pages(block.data_ptr(), block.nbytes)
    return block


def gram(V: Tensor, W: Tensor) -> Tensor:
    """See ``kernels.gram``."""
    (k, n), m = V.shape, W.shape[0]
    out = torch.empty(k, m, dtype=torch.float64)
    _call("gram", V, V, k, W, m, n, out, torch.get_num_threads())
    return out


def power_step(V: Tensor, HV: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """See ``kernels.power_step``."""
    k, n = V.shape
    theta = torch.empty(k, dtype=torch.float64)
    residual = torch.empty_like(theta)  # views of one allocation would cost more
    out = on_huge_pages(torch.empty_like(V)) if out is None else out
    _call("power_step", V, V, HV, k, n, theta, residual, out, torch.get_num_threads())
    return theta, residual, out


def combine(C: Tensor, V: Tensor, out: Tensor | None = None) -> Tensor:
    """See ``kernels.combine``."""
    (m, k), n = C.shape, V.shape[1]
    out = on_huge_pages(V.new_empty(m, n)) if out is None else out
    _call("combine", V, C, m, k, V, n, out, torch.get_num_threads())
    return out


def orthonormalise(V: Tensor) -> Tensor:
    """See ``kernels.orthonormalise``."""
    return cholesky_qr(V, gram, combine)


def scale(V: Tensor, d: Tensor, out: Tensor | None = None) -> Tensor:
    """See ``kernels.scale``."""
    out = on_huge_pages(torch.empty_like(V)) if out is None else out
    _call("scale", V, V, *V.shape, d, out, torch.get_num_threads())
    return out


def inv_sqrt_adam(
    v: Tensor, *, bias_correction2: float, eps: float, factor: float, out: Tensor | None = None
) -> Tensor:
    """See ``kernels.inv_sqrt_adam``."""
    out = on_huge_pages(torch.empty_like(v)) if out is None else out
    _call("inv_sqrt_adam", v, v, v.numel(), bias_correction2, eps, factor, out, torch.get_num_threads())
    return out


def level() -> str:
    """Return the instruction level in use: v2, v3, v4 (x86-64) or any."""
    return "none" if _C is None else str(_C.level())


def norm_tangent(
    s: Standardised, w: Tensor | None, dx: Tensor | None, dw: Tensor | None, db: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See ``kernels.norm.norm_tangent``."""
    k = next(d for d in (dx, dw, db) if d is not None).shape[0]
    (rows, D), x = s.xhat.shape, s.xhat
    dy = x.new_empty(k, rows, D)
    dxhat = None if dx is None else torch.empty_like(dy)
    along = None if dx is None else x.new_empty(k, rows)
    dx, dw, db = (None if d is None else d.contiguous() for d in (dx, dw, db))
    _call(
        "norm_tangent", x, k, rows, D, s.groups, s.inner, s.mode, torch.get_num_threads(),
        x, s.r, w, dx, dw, db, dy, dxhat, along,
    )  # fmt: skip
    return dy, dxhat, along


def norm_backward_tangent(
    s: Standardised,
    w: Tensor | None,
    dw: Tensor | None,
    dxhat: Tensor | None,
    along: Tensor | None,
    g: Tensor | None,
    dg: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See ``kernels.norm.norm_backward_tangent``."""
    k, (rows, D), x = dg.shape[0], s.xhat.shape, s.xhat
    dg, g, dw = dg.contiguous(), None if g is None else g.contiguous(), None if dw is None else dw.contiguous()
    out = torch.empty_like(dg) if needs[0] else None
    dgw = x.new_empty(k, s.channels) if needs[1] else None
    dgb = x.new_empty(k, s.channels) if needs[2] else None
    _call(
        "norm_backward_tangent", x, k, rows, D, s.groups, s.inner, s.mode, torch.get_num_threads(),
        x, s.r, w, dw, dxhat, along, g, dg, out, dgw, dgb,
    )  # fmt: skip
    return out, dgw, dgb


def slope_product(slope: Tensor, d: Tensor, curvature: Tensor | None = None, dz: Tensor | None = None) -> Tensor:
    """See ``kernels.pointwise``."""
    d, dz = d.contiguous(), None if dz is None else dz.contiguous()
    out = torch.empty_like(d)
    threads = torch.get_num_threads()
    _call("slope_product", d, slope, d, curvature, dz, d.shape[0], slope.numel(), out, threads)
    return out


_ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "silu": 2}  # csrc/activation.h


def activation_slope(name: str, x: Tensor, y: Tensor) -> Tensor:
    """See ``kernels.pointwise``."""
    return _activation("activation_slope", name, x, y)


def activation_curvature(name: str, x: Tensor, g: Tensor) -> Tensor:
    """See ``kernels.pointwise``."""
    return _activation("activation_curvature", name, x, g)


def _activation(kernel: str, name: str, x: Tensor, other: Tensor) -> Tensor:
    x, other = x.contiguous(), other.contiguous()
    out = torch.empty_like(x)
    _call(kernel, x, _ACTIVATIONS[name], x, other, x.numel(), out, torch.get_num_threads())
    return out


def softmax_jacobian(p: Tensor, u: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See ``kernels.softmax``."""
    u = u.contiguous()
    k, rows, C = u.shape
    out, mean = torch.empty_like(u), u.new_empty(k, rows)
    _call("softmax_jacobian", p, p, u, weight, k, rows, C, out, mean, torch.get_num_threads())
    return out, mean


def softmax_backward_tangent(p: Tensor, dp: Tensor, inner: Tensor, dg: Tensor) -> Tensor:
    """See ``kernels.softmax``."""
    dp, dg = dp.contiguous(), dg.contiguous()
    out = torch.empty_like(dg)
    _call("softmax_backward_tangent", p, p, dp, inner, dg, *dg.shape, out, torch.get_num_threads())
    return out
