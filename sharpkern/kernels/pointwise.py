"""Pointwise kernels: an activation's two tangent sweeps, from its slope and curvature.

For y = f(z) with f'(z) and g f''(z) kept from the primal sweeps (as many bytes as recomputing both from z and g):

    dy = f'(z) dz                       d(gz) = f'(z) dg + g f''(z) dz

and the slope and curvature of the activations that take several passes of torch.
"""

from __future__ import annotations

from torch import Tensor

from .dispatch import COMPILED, choose, kernel, triton


@kernel(cpu=COMPILED, triton=triton("pointwise"))
def slope_product(slope: Tensor, d: Tensor, curvature: Tensor | None = None, dz: Tensor | None = None) -> Tensor:
    """Return ``slope d + curvature dz`` in one pass, for k tangents at once.

    Args:
        slope: ``[*shape]``, contiguous.
        d: ``[k, *shape]`` like slope.
        curvature: ``[*shape]`` like slope, or None for zero; goes with dz ``[k, *shape]``.

    Returns:
        ``[k, *shape]``, contiguous. 16-bit floats are computed in float32 and rounded once.

    Cost: reads 2 + 2k and writes k times the numbers of slope (1 + k and k without curvature).
    """
    result: Tensor = choose("slope_product", slope).slope_product(slope, d, curvature, dz)
    return result


@kernel(cpu=COMPILED, triton=triton("pointwise"))
def activation_slope(name: str, x: Tensor, y: Tensor) -> Tensor:
    """Return ``f'(x)`` of a smooth activation.

    Args:
        name: ``"gelu"``, ``"gelu_tanh"`` (its approximation), ``"silu"``, ``"tanh"``, ``"sigmoid"``, ``"softplus"``
            (torch's default: the line y = x above 20) or ``"mish"``.
        x: ``[*shape]``.
        y: ``f(x)`` like x: saves the error function, ``f'(x) = y / x + x phi(x)`` for GELU.

    Returns:
        ``[*shape]``, contiguous. 16-bit floats are computed in float32 and rounded once.

    Cost: reads two and writes one number for each of x.
    """
    result: Tensor = choose("activation_slope", x).activation_slope(name, x, y)
    return result


@kernel(cpu=COMPILED, triton=triton("pointwise"))
def activation_curvature(name: str, x: Tensor, g: Tensor) -> Tensor:
    """Return ``g f''(x)`` of a smooth activation.

    Args:
        name: as for ``activation_slope``.
        x: ``[*shape]``.
        g: ``[*shape]`` like x, the primal's cotangent.

    Returns:
        ``[*shape]``, contiguous. 16-bit floats are computed in float32 and rounded once.

    Cost: reads two and writes one number for each of x, and one exponential.
    """
    result: Tensor = choose("activation_curvature", x).activation_curvature(name, x, g)
    return result
