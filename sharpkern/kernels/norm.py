"""Norm kernels: one pass over each row for the tangent, one for the backward tangent.

A norm standardises the D numbers of each row, ``xhat = (x - mean) r``, then scales and shifts by channel,
``y = xhat w + b``. The channel of number d of row i is ``(i % groups) (D / inner) + d / inner``: layer norm has
groups = inner = 1, group norm its groups and inner = pixels, batch norm with its channels as rows groups = channels and
inner = D.

    J u  = r (u - mean u - xhat mean(xhat u))                    the Jacobian of x -> xhat, symmetric
    dJ u = -r [mean(xhat dx) J u + dxhat mean(xhat u) + xhat mean(dxhat u)],   dxhat = J dx
"""

from __future__ import annotations

from torch import Tensor

from .dispatch import COMPILED, choose, kernel, triton
from .saved import CENTRED as CENTRED
from .saved import FIXED as FIXED
from .saved import RMS as RMS
from .saved import Standardised as Standardised


@kernel(cpu=COMPILED, triton=triton("norm"))
def norm_tangent(
    s: Standardised, w: Tensor | None, dx: Tensor | None, dw: Tensor | None, db: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the tangent of ``xhat w + b``, and what ``norm_backward_tangent`` needs.

        dy = J dx w + xhat dw + db

    Args:
        s: the primal.
        w: ``[channels]``, or None for ones.
        dx: ``[k, rows, D]``; None if x does not move, likewise dw and db ``[k, channels]``; not all of them.

    Returns:
        dy ``[k, rows, D]``; with dx also dxhat ``[k, rows, D]`` and mean(xhat dx) ``[k, rows]``, else None.

    Cost: reads (1 + k) and writes 2k times the numbers of x.
    """
    result: tuple[Tensor, Tensor | None, Tensor | None] = choose("norm_tangent", s.xhat).norm_tangent(s, w, dx, dw, db)
    return result


@kernel(cpu=COMPILED, triton=triton("norm"))
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
    """Return the tangents of the cotangents of x, w and b.

        J (dg w + g dw) + dJ (g w)        sum dg xhat + g dxhat        sum dg

    Args:
        s: the primal.
        w: ``[channels]``, or None for ones.
        dw: ``[k, channels]`` or None; dxhat and along: from ``norm_tangent``, or None.
        g: the primal's cotangent ``[rows, D]``; None gives the part linear in dg, which is the plain backward.
        dg: ``[k, rows, D]``.
        needs: which of the three to compute.

    Returns:
        ``[k, rows, D]``, ``[k, channels]``, ``[k, channels]``; None where not needed.

    Cost: reads (2 + 2k) and writes k times the numbers of x.
    """
    module = choose("norm_backward_tangent", s.xhat)
    result: tuple[Tensor | None, Tensor | None, Tensor | None]
    result = module.norm_backward_tangent(s, w, dw, dxhat, along, g, dg, needs)
    return result
