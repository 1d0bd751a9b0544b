"""Softmax kernels on rows of probabilities: Jacobians of softmax and of log-softmax, and their change along a tangent.

J u  = p (u - <p, u>)                                                  the Jacobian of softmax, symmetric
dJ u = dp (u - <p, u>) - p <dp, u>,   with dp = J dz
L u  = u - <p, u>                                                      the Jacobian of log-softmax
dL'g = -dp sum g,                     with dp = p dl, dl = L dz        the tangent of its transpose, g - p sum g

The difference is taken before the product with p: where p is close to 1, p u - p <p, u> would cancel.
"""

from __future__ import annotations

from torch import Tensor

from .dispatch import COMPILED, choose, kernel, triton


@kernel(cpu=COMPILED, triton=triton("softmax"))
def softmax_jacobian(p: Tensor, u: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Multiply the Jacobian of softmax with k blocks of rows.

        out = weight p (u - mean),    mean = <p, u>

    Args:
        p: ``[rows, C]`` probabilities, contiguous.
        u: ``[k, rows, C]`` like p.
        weight: ``[rows]`` like p, or None for ones. Cross-entropy's second derivative has one.

    Returns:
        out ``[k, rows, C]`` and mean ``[k, rows]``, contiguous, in u's dtype. Sums of 16-bit floats are float32.

    Cost: reads 1 + k and writes k times the numbers of p, in one pass where a row fits into the cache.
    """
    result: tuple[Tensor, Tensor] = choose("softmax_jacobian", p).softmax_jacobian(p, u, weight)
    return result


@kernel(cpu=COMPILED, triton=triton("softmax"))
def softmax_backward_tangent(p: Tensor, dp: Tensor, inner: Tensor, dg: Tensor) -> Tensor:
    """Return the tangent of ``p (g - <p, g>)``.

        p (dg - <p, dg> - <dp, inner>) + dp inner,    inner = g - <p, g>

    Args:
        p: ``[rows, C]`` probabilities, contiguous.
        dp: ``[k, rows, C]``, the tangent of p: its rows sum to zero, so that <dp, g> = <dp, inner>.
        inner: ``[rows, C]``, from the primal's cotangent.
        dg: ``[k, rows, C]``.

    Returns:
        ``[k, rows, C]``, contiguous, in dg's dtype. Sums of 16-bit floats are float32.

    Cost: reads 2 + 2k and writes k times the numbers of p.
    """
    result: Tensor = choose("softmax_backward_tangent", p).softmax_backward_tangent(p, dp, inner, dg)
    return result


@kernel(cpu=COMPILED, triton=triton("softmax"))
def log_softmax_jacobian(p: Tensor, u: Tensor) -> Tensor:
    """Multiply the Jacobian of log-softmax with k blocks of rows: ``u - <p, u>``.

    Args:
        p: ``[rows, C]`` probabilities, contiguous.
        u: ``[k, rows, C]`` like p.

    Returns:
        ``[k, rows, C]``, contiguous, in u's dtype. Sums of 16-bit floats are float32.

    Cost: reads 1 + k and writes k times the numbers of p, in one pass where a row fits into the cache.
    """
    result: Tensor = choose("log_softmax_jacobian", p).log_softmax_jacobian(p, u)
    return result


@kernel(cpu=COMPILED, triton=triton("softmax"))
def log_softmax_backward_tangent(p: Tensor, dl: Tensor, total: Tensor, dg: Tensor) -> Tensor:
    """Return the tangent of ``g - p sum g``.

        dg - p (sum dg + dl total),    total = sum g

    Args:
        p: ``[rows, C]`` probabilities, contiguous.
        dl: ``[k, rows, C]``, the tangent of log p.
        total: ``[rows]`` like p, from the primal's cotangent.
        dg: ``[k, rows, C]``.

    Returns:
        ``[k, rows, C]``, contiguous, in dg's dtype. Sums of 16-bit floats are float32.

    Cost: reads 1 + 2k and writes k times the numbers of p.
    """
    result: Tensor = choose("log_softmax_backward_tangent", p).log_softmax_backward_tangent(p, dl, total, dg)
    return result
