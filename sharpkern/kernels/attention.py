"""Attention kernels in flash style: the scores are formed block by block and never kept, memory is O(T) per head.

With S = scale q k' + mask, P = exp(S - lse), o = P v, <.,.> a sum over keys, and g the cotangent of o:

    dS = scale (dq k' + q dk')      m = <P, dS>             do = (P dS) v - m o + P dv
    D  = <g, o>                     dD = <dg, o> + <g, do>  dP = P (dS - m)
    gS = P (g v' - D)               dgS = dP (g v' - D) + P (dg v' + g dv' - dD)
    dgq = scale (dgS k + gS dk)     dgk = scale (dgS' q + gS' dq)     dgv = P' dg + dP' g

In ``do`` the products P dS are pointwise, in front of v. Everything a block needs is known for its row beforehand
(lse, m, D, dD), so one pass over the blocks suffices in each sweep. Source: Dao et al., FlashAttention (2022), for the
primal; the tangents are its derivatives.
"""

from __future__ import annotations

from torch import Tensor

from .dispatch import Version, choose, kernel, triton
from .saved import Heads as Heads

# The CPU version is plain torch in blocks: it serves other devices and dtypes too.
IN_BLOCKS = Version("cpu.blocked_attention")


@kernel(cpu=IN_BLOCKS, triton=triton("attention"))
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float = 1.0
) -> Heads:
    """Run attention and keep what its tangents need.

    Args:
        q: ``[B, T, d]``; k ``[B, S, d]``; v ``[B, S, e]``.
        mask: float, broadcasting to ``[B, T, S]``, or None.
        causal: query i sees keys up to i.
        scale: factor of the scores.

    Returns:
        The operands as given, o ``[B, T, e]`` and lse ``[B, T]``, see ``Heads``.

    Cost: 2 B T S (d + e) operations, half with ``causal``. Memory: o and lse, and blocks of a fixed size.
    """
    result: Heads = choose("attention", _smallest(q, k, v)).attention(q, k, v, mask, causal, scale)
    return result


@kernel(cpu=IN_BLOCKS, triton=triton("attention"))
def attention_tangent(h: Heads, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the tangent of o, and what ``attention_backward_tangent`` needs.

    Args:
        h: the primal.
        dq: ``[k, B, T, d]``, dk ``[k, B, S, d]``, dv ``[k, B, S, e]``; None where nothing moves, not all of them.

    Returns:
        ``do`` ``[k, B, T, e]`` in q's dtype, and ``m = <P, dS>`` ``[k, B, T]``, float32 for 16-bit floats.

    Cost: up to 2 B T S (d + k (2 d + 2 e)) operations.
    """
    module = choose("attention_tangent", _smallest(h.q, h.k, h.v, dq, dk, dv))
    result: tuple[Tensor, Tensor] = module.attention_tangent(h, dq, dk, dv)
    return result


@kernel(cpu=IN_BLOCKS, triton=triton("attention"))
def attention_backward(h: Heads, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cotangents of q, k and v.

    Args:
        h: the primal.
        g: ``[k, B, T, e]``, k cotangents of o.

    Returns:
        ``[k, B, T, d]``, ``[k, B, S, d]``, ``[k, B, S, e]`` in q's dtype.

    Cost: 2 B T S (d + k (2 d + 2 e)) operations.
    """
    module = choose("attention_backward", _smallest(h.q, h.k, h.v, g))
    result: tuple[Tensor, Tensor, Tensor] = module.attention_backward(h, g)
    return result


@kernel(cpu=IN_BLOCKS, triton=triton("attention"))
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
    """Return the tangents of the cotangents of q, k and v.

    Args:
        h: the primal; dq, dk, dv as given to ``attention_tangent``, do and m as it returned them.
        g: ``[B, T, e]``, the primal's cotangent of o.
        dg: ``[k, B, T, e]``, its tangent.

    Returns:
        ``[k, B, T, d]``, ``[k, B, S, d]``, ``[k, B, S, e]``.

    Cost: up to 2 B T S (d + e + k (6 d + 4 e)) operations.
    """
    module = choose("attention_backward_tangent", _smallest(h.q, h.k, h.v, dg))
    result: tuple[Tensor, Tensor, Tensor] = module.attention_backward_tangent(h, dq, dk, dv, do, m, g, dg)
    return result


def _smallest(*operands: Tensor | None) -> Tensor:
    """Return the operand by which a backend is chosen: an empty one if there is any, such as keys of which none is."""
    return min((t for t in operands if t is not None), key=Tensor.numel)
