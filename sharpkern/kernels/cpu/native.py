"""The compiled CPU kernels in ``sharpkern._C``: tensors become addresses.

The interpreter lock is released while a kernel runs. A forked process runs them on one thread, as OpenMP's do not live
on in it.

Vector kernels are launched from ``kernels.vectors``. The others have a function here, with the name and the results of
the one in ``reference``.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..saved import CENTRED, FIXED, RMS, Standardised

try:
    from ... import _C
except ImportError as error:
    _C = None
    REASON: str | None = f"the compiled module is missing ({error}): reinstall with a C++ compiler present"
    # Once, as a module is imported once, and not where that is what was asked for.
    if os.environ.get("SHARPKERN_BACKEND") != "reference":
        warnings.warn(f"CPU kernels run in plain torch, right but slower: {REASON}.", RuntimeWarning, stacklevel=2)
else:
    REASON = None


def forced_backend() -> str | None:
    """Return the value of ``SHARPKERN_BACKEND``."""
    return os.environ.get("SHARPKERN_BACKEND")


if _C is not None:
    # In C: os.environ takes longer than a small kernel, and this is asked at every call.
    forced_backend = _C.forced_backend

_ALWAYS_FRESH = 32 << 20  # bytes, from which glibc's malloc maps new pages at each call

Recorder = Callable[[Any, tuple[Any, ...], tuple[Any, ...]], None]


class _Recorders(threading.local):
    """Those of each thread: a recording must not hold the calls of another one."""

    def __init__(self) -> None:
        self.stack: list[Recorder] = []


_recorders = _Recorders()


@contextmanager
def recorded(recorder: Recorder) -> Iterator[None]:
    """Within the block, show each call of a compiled kernel that this thread makes.

    Args:
        recorder: called as ``recorder(function, addresses, arguments)``.
    """
    _recorders.stack.append(recorder)
    try:
        yield
    finally:
        _recorders.stack.pop()


def launch(kernel: str, x: Tensor, *arguments: float | Tensor) -> None:
    """Call a vector kernel of x's dtype, with its arguments in the order of ``csrc/vectors.h``."""
    # ints first: asking whether something is a tensor costs more than an address
    addresses = [a if type(a) is int else a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    function = _function(kernel, x.dtype)
    # Copies made on the way here live until the call is over, since ``arguments`` holds them.
    function(*addresses, torch.get_num_threads())
    # After the call: a kernel that raises is not recorded.
    if _recorders.stack:
        _show(function, addresses, arguments)


def _call(x: Tensor, struct: tuple[dict[torch.dtype, Any], tuple[Any, ...]]) -> None:
    """Call a kernel of x's dtype with a struct of ``_structs``; None stands for absent."""
    functions, fields = struct
    addresses = [0 if a is None else a if type(a) is int else a.data_ptr() for a in fields]
    function = functions[x.dtype]
    function(*addresses, torch.get_num_threads())
    if _recorders.stack:
        _show(function, addresses, fields)


def _show(function: Any, addresses: list[float], arguments: tuple[Any, ...]) -> None:
    for recorder in _recorders.stack:
        # With the number of threads, which a replay is thus bound to.
        recorder(function, (*addresses, torch.get_num_threads()), arguments)


@functools.cache
def _function(kernel: str, dtype: torch.dtype) -> Any:
    # Two functions and no argument: the element type is a template parameter.
    return getattr(_C, f"{kernel}_f64" if dtype == torch.float64 else f"{kernel}_f32")


def _struct(kernel: str, names: tuple[str, ...]) -> Callable[..., Any]:
    """Return a function that takes a struct's fields by name, so that none can be swapped or forgotten.

    It returns the kernel's functions by dtype, and the fields in their order.
    """
    functions = {dtype: _function(kernel, dtype) for dtype in (torch.float32, torch.float64)}
    row = ", ".join(names)
    # compiled, as namedtuple does it: a dictionary of fields would take longer than a small kernel
    struct: Callable[..., Any] = eval(f"lambda *, {row}: (functions, ({row}))", {"functions": functions})
    return struct


_structs = SimpleNamespace(**{} if _C is None else {name: _struct(name, row) for name, row in _C.fields.items()})


def on_huge_pages(block: Tensor) -> Tensor:
    """Advise the system (Linux) to back a large block on the CPU, not yet written to, with pages of 2 MiB.

    Touching 4 KiB pages for the first time takes six times longer.
    """
    if _C is not None and block.nbytes >= _ALWAYS_FRESH and block.is_cpu:
        _C.use_huge_pages(block.data_ptr(), block.nbytes)
    return block


def level() -> str:
    """Return the instruction level in use: v2, v3, v4 (x86-64) or any."""
    return "none" if _C is None else str(_C.level())


# By name from the compiled module: the enumerations need not have the same order.
_MODES: dict[int, int] = {} if _C is None else dict(zip((FIXED, RMS, CENTRED), _C.norm_modes, strict=True))


def norm_tangent(
    s: Standardised, w: Tensor | None, dx: Tensor | None, dw: Tensor | None, db: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See ``kernels.norm.norm_tangent``."""
    (rows, D), x = s.xhat.shape, s.xhat
    # Kernels see addresses only, so strides must be known: tangents may be expanded or transposed. What a rule saved
    # (xhat, r, w) is contiguous already.
    dx, dw, db = [None if d is None else d.contiguous() for d in (dx, dw, db)]
    k = [d for d in (dx, dw, db) if d is not None][0].shape[0]  # a generator takes twice the time
    dy = x.new_empty(k, rows, D)
    dxhat = None if dx is None else torch.empty_like(dy)
    along = None if dx is None else x.new_empty(k, rows)
    fields = _structs.norm_tangent(
        k=k, rows=rows, D=D, groups=s.groups, inner=s.inner, mode=_MODES[s.mode], xhat=x, r=s.r,
        w=w, dx=dx, dw=dw, db=db, y=dy, dxhat=dxhat, along=along,
    )  # fmt: skip
    _call(x, fields)
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
    # None stands for a null pointer, by which the kernel leaves the work out.
    dgw = x.new_empty(k, s.channels) if needs[1] else None
    dgb = x.new_empty(k, s.channels) if needs[2] else None
    fields = _structs.norm_backward_tangent(
        k=k, rows=rows, D=D, groups=s.groups, inner=s.inner, mode=_MODES[s.mode],
        xhat=x, r=s.r, w=w, dw=dw, dxhat=dxhat, along=along, g=g, dg=dg, out=out, dgw=dgw, dgb=dgb,
    )  # fmt: skip
    _call(x, fields)
    return out, dgw, dgb


def slope_product(slope: Tensor, d: Tensor, curvature: Tensor | None = None, dz: Tensor | None = None) -> Tensor:
    """See ``kernels.pointwise``."""
    d, dz = d.contiguous(), None if dz is None else dz.contiguous()
    out = torch.empty_like(d)
    _call(
        d, _structs.slope_product(slope=slope, d=d, curvature=curvature, dz=dz, out=out, k=d.shape[0], n=slope.numel())
    )
    return out


_ACTIVATIONS: dict[str, int] = {} if _C is None else _C.activations


def activation_slope(name: str, x: Tensor, y: Tensor) -> Tensor:
    """See ``kernels.pointwise``."""
    x, y = x.contiguous(), y.contiguous()
    out = torch.empty_like(x)
    _call(x, _structs.activation_slope(activation=_ACTIVATIONS[name], n=x.numel(), x=x, y=y, out=out))
    return out


def activation_curvature(name: str, x: Tensor, g: Tensor) -> Tensor:
    """See ``kernels.pointwise``."""
    x, g = x.contiguous(), g.contiguous()
    out = torch.empty_like(x)
    _call(x, _structs.activation_curvature(activation=_ACTIVATIONS[name], n=x.numel(), x=x, g=g, out=out))
    return out


def softmax_jacobian(p: Tensor, u: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See ``kernels.softmax``."""
    # Logits' tangents come transposed where the classes are not the last dimension.
    u = u.contiguous()
    k, rows, C = u.shape
    out, mean = torch.empty_like(u), u.new_empty(k, rows)
    _call(p, _structs.softmax_jacobian(p=p, u=u, weight=weight, out=out, mean=mean, k=k, rows=rows, C=C))
    return out, mean


def softmax_backward_tangent(p: Tensor, dp: Tensor, inner: Tensor, dg: Tensor) -> Tensor:
    """See ``kernels.softmax``."""
    dp, dg = dp.contiguous(), dg.contiguous()
    out = torch.empty_like(dg)
    k, rows, C = dg.shape
    _call(p, _structs.softmax_backward_tangent(p=p, dp=dp, inner=inner, dg=dg, out=out, k=k, rows=rows, C=C))
    return out


def log_softmax_jacobian(p: Tensor, u: Tensor) -> Tensor:
    """See ``kernels.softmax``."""
    u = u.contiguous()
    out = torch.empty_like(u)
    k, rows, C = u.shape
    _call(p, _structs.log_softmax_jacobian(p=p, u=u, out=out, k=k, rows=rows, C=C))
    return out


def log_softmax_backward_tangent(p: Tensor, dl: Tensor, total: Tensor, dg: Tensor) -> Tensor:
    """See ``kernels.softmax``."""
    dl, total, dg = dl.contiguous(), total.contiguous(), dg.contiguous()
    out = torch.empty_like(dg)
    k, rows, C = dg.shape
    _call(p, _structs.log_softmax_backward_tangent(p=p, dl=dl, total=total, dg=dg, out=out, k=k, rows=rows, C=C))
    return out


def transpose(V: Tensor) -> Tensor:
    """See ``kernels.vectors``."""
    V = V.contiguous()
    n, k = V.shape
    out = V.new_empty(k, n)
    _call(V, _structs.transpose(columns=V, out=out, n=n, k=k))
    return out
