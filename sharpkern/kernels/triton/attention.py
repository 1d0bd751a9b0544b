"""Triton version of ``kernels.attention``: launches the kernels of ``attention_kernels``.

No atomics: the sums over queries and over keys are kernels of their own, so the same input gives the same bits. The
plain backward sweep is the tangent of the backward sweep with nothing of q, k, v moving and g in place of dg, so the
same kernels serve both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..dispatch import interpreted
from ..precision import allows_tf32
from ..saved import Heads
from . import attention_kernels as kernels
from . import attention_tiles as tiles

ROWS = 32  # of a program of row_sums
OPTIONS = {"num_warps": 4, "num_stages": 1, "maxnreg": 255}  # ptxas else spills a little for occupancy


# what a kernel is run over, and the width it sums
BY_KEYS = ("by_keys", "by_values")
SUMS_Q = ("by_queries", "by_keys")


class Blocks(NamedTuple):
    """Rows that a program owns and rows of the other side at a time; columns read at a time."""

    own: int
    other: int
    chunk: int


def blocks(precision: str) -> Blocks:
    """Choose blocks: the largest tried that spill nothing in any kernel, at any width, on any chip.

    A tensor core's warp takes 16 rows, so four warps own 64. Without tensor cores (ieee) operands stay in registers.
    The interpreter's cost is by program and operation.
    """
    return {
        "ieee": Blocks(32, 16, 16),
        "tf32": Blocks(64, 16, 16),
        "16-bit": Blocks(64, 16, 32),
        "interpreted": Blocks(64, 32, 64),
    }[precision]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Heads:
    """See ``kernels.attention``."""
    o = q.new_empty(*q.shape[:2], v.shape[2])
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    # Contiguous once here, and not at every sweep.
    h = Heads(q.contiguous(), k.contiguous(), v.contiguous(), o, lse, mask, causal, scale)
    _launch("forward", h, 1, o=o)
    return h


def attention_tangent(h: Heads, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``kernels.attention``."""
    tangents = next(d for d in (dq, dk, dv) if d is not None).shape[0]
    do, m = h.o.new_empty(tangents, *h.o.shape), h.lse.new_empty(tangents, *h.lse.shape)
    _launch("tangent", h, tangents, **_moving(h, dq, dk, dv), o=h.o.contiguous(), do=do, m=m)
    return do, m


def attention_backward(h: Heads, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ``kernels.attention``."""
    g = g.contiguous()
    D = _row_sums(g, h.o)
    return _backward(h, g.shape[0], **_moving(h, None, None, None), g=g, dg=g, m=D, D=D, dD=D)


def attention_backward_tangent(
    h: Heads,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    do: Tensor,
    m: Tensor,
    g: Tensor,
    dg: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``kernels.attention``."""
    g, dg = g.contiguous(), dg.contiguous()
    D, dD = _row_sums(g[None], h.o), _row_sums(dg, h.o, do, g)
    return _backward(h, dg.shape[0], **_moving(h, dq, dk, dv), g=g, dg=dg, m=m.contiguous(), D=D, dD=dD)


def _backward(h: Heads, tangents: int, **arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    dgq, dgk, dgv = (t.new_empty(tangents, *t.shape) for t in (h.q, h.k, h.v))
    _launch("by_queries", h, tangents, dgq=dgq, **arguments)
    _launch("by_keys", h, tangents, dgk=dgk, **arguments)
    _launch("by_values", h, tangents, dgv=dgv, **arguments)
    return dgq, dgk, dgv


def _row_sums(a: Tensor, b: Tensor, c: Tensor | None = None, d: Tensor | None = None) -> Tensor:
    """``<a, b> + <c, d>`` over the last axis, a and c with leading k: float32 ``[k, B, T]``."""
    a, b = a.contiguous(), b.contiguous()
    out = torch.empty(a.shape[:-1], dtype=torch.float32, device=a.device)
    tangents, rows = a.shape[0], out[0].numel()
    kernels.row_sums[(triton.cdiv(rows, ROWS) * tangents,)](
        a,
        b,
        a if c is None else c.contiguous(),
        b if d is None else d.contiguous(),
        out,
        tangents,
        rows,
        PAIRS=1 if c is None else 2,
        W=a.shape[-1],
        M=ROWS,
    )
    return out


def _moving(h: Heads, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None) -> dict[str, Any]:
    """Arguments of what moves; what does not stands for its tangent and is never read."""
    return {
        "dq": h.q if dq is None else dq.contiguous(),
        "dk": h.k if dk is None else dk.contiguous(),
        "dv": h.v if dv is None else dv.contiguous(),
        "DQ": dq is not None,
        "DK": dk is not None,
        "DV": dv is not None,
    }


def _launch(name: str, h: Heads, tangents: int, **arguments: Any) -> None:
    """Run a kernel over every head, tangent, block of rows and part of its result's columns."""
    B, T, width = h.q.shape
    S, width_v = h.v.shape[1:]
    # Expanded and not copied: strides of zero do it.
    mask = h.q if h.mask is None else h.mask.expand(B, T, S)
    strides = (0, 0, 0) if h.mask is None else mask.stride()
    arguments |= {
        "q": h.q.contiguous(),
        "k": h.k.contiguous(),
        "v": h.v.contiguous(),
        "lse": h.lse.contiguous(),
        "mask": mask,
        "tangents": tangents,
        "B": B,
        "T": T,
        "S": S,
        "mb": strides[0],
        "mt": strides[1],
        "ms": strides[2],
        "scale": float(h.scale),
        "MASKED": h.mask is not None,
        "CAUSAL": h.causal,
        **shape(name, width, width_v, _precision(h.q.dtype)),
    }
    kernel = getattr(kernels, name)
    rows = triton.cdiv(S, arguments["N"]) if name in BY_KEYS else triton.cdiv(T, arguments["M"])
    kernel[(rows * B * tangents * arguments["PARTS"],)](
        **{n: a for n, a in arguments.items() if n in kernel.arg_names}, **OPTIONS
    )


def shape(name: str, width: int, width_v: int, precision: str) -> dict[str, Any]:
    """Constants of a kernel that follow from the widths of q and v and from the precision of its products."""
    own, other, chunk = blocks(precision)
    result = width if name in SUMS_Q else width_v
    # A program sums at most 64 columns: its accumulator must fit into registers beside the operands.
    part = min(64, tiles.padded(result))
    return {
        "WIDE": precision == "interpreted",
        "PRECISION": "tf32" if precision == "tf32" else "ieee",  # of no effect on 16-bit operands
        "WQ": width,
        "WV": width_v,
        "M": other if name in BY_KEYS else own,
        "N": own if name in BY_KEYS else other,
        "CHUNK": min(chunk, tiles.padded(max(width, width_v))),
        "PART": part,
        "PARTS": triton.cdiv(result, part),
    }


def _precision(dtype: torch.dtype) -> str:
    if interpreted():
        return "interpreted"
    if dtype != torch.float32:
        return "16-bit"
    return "tf32" if allows_tf32() else "ieee"
