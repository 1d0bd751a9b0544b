"""Unary pointwise ops: activations and elementary functions.

y = f(x):   dy = f'(x) dx        gx = f'(x) g        d(gx) = f'(x) dg + g f''(x) dx
f'(x) is computed once per parameter value, g f''(x) once per backward sweep; a product then costs one multiplication
in the tangent sweep and one fused multiply-add in the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.pointwise import activation_curvature, activation_slope, slope_product
from ...kernels.precision import wide
from ..rule import RULES, LinearInArgs, Rule, inner, rule
from .fallback import UnsupportedOpError

aten = torch.ops.aten
Derivative = Callable[..., Tensor]
_ERF = 2 / math.sqrt(math.pi)  # erf'(0)


def _clamp_slope(low: float | Tensor) -> float:
    # The module may be imported under ``no_grad``.
    with torch.enable_grad():
        x = torch.zeros((), requires_grad=True)
        return float(torch.autograd.grad(torch.clamp(x, min=low), x)[0])


# torch 2.14 changed the slope of clamp where x equals a bound: from 1 to 0 at a number, to 1/2 at a tensor.
CLAMP_PASSES_AT_BOUND = _clamp_slope(0.0) == 1
CLAMP_SHARES_TIES = _clamp_slope(torch.zeros(())) == 0.5


class Function(NamedTuple):
    """First and second derivative, as functions of (x, y, *the op's other arguments); second None where zero."""

    first: Derivative
    second: Derivative | None


class Unary(Rule):
    """``y = f(x, *constants)``, with the derivatives from the table below."""

    keeps_cotangent = False  # it is part of the curvature
    freed_after_reverse = ("dx",)
    freed_before_tangent = ("point",)
    point: Any  # where the derivatives are evaluated: x, y and the constants

    def forward(self, x: Tensor, *constants: Any) -> Tensor:
        """Save what the derivatives are computed from."""
        y: Tensor = self._call(x, constants)
        self._start(FUNCTIONS[self.op], x, y, *constants)
        return y

    def _start(self, function: Function, *point: Any) -> None:
        self.function = function
        self.point = point
        # Computed when the first sweep asks for it: a forward pass alone should cost no more than torch's.
        self.slope: Tensor | None = None

    def _call(self, x: Tensor, constants: tuple[Any, ...]) -> Tensor:
        names = [a.name for a in self.op._schema.arguments if a.kwarg_only]
        split = len(constants) - len(names)
        y: Tensor = self.op(x, *constants[:split], **dict(zip(names, constants[split:], strict=True)))
        return y

    def _at_point(self, derivative: Derivative) -> Tensor:
        """Evaluate a derivative, 16-bit floats in float32: rounded terms would lose what torch's kernels keep."""
        x, y, *constants = self.point
        return derivative(wide(x), wide(y), *constants).to(x.dtype)

    def _slope(self) -> Tensor:
        if self.slope is None:
            # Contiguous, for the kernels walk over slope and tangents with one index.
            self.slope = self._at_point(self.function.first).contiguous()
        return self.slope

    def tangent(self, dx: Tensor) -> Tensor:
        """Return ``f'(x) dx``."""
        self.dx = dx
        return slope_product(self._slope(), dx)

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Return ``f'(x) g``."""
        return (slope_product(self._slope(), g),)

    def prepare(self, g: Tensor) -> None:
        """Multiply the second derivative with the cotangent."""
        # Here at the latest, because the point is freed before the first tangent sweep.
        self._slope()
        second = self.function.second
        # g f'' in one tensor: a product has no use for g then, whose memory the program frees.
        self.curvature = None if second is None else (self._at_point(second) * g[0]).contiguous()

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor]:
        """Return ``f'(x) dg + g f''(x) dx``."""
        return (slope_product(self._slope(), dg, self.curvature, self.dx),)

    def second_order(self, dargs: tuple[Any, ...], g: Tensor) -> Tensor | None:
        """Return ``<g f''(x), dx^2>``."""
        return None if self.curvature is None else inner(self.curvature * self.dx, self.dx)


@rule(aten.relu.default)
class ReLU(LinearInArgs):
    """``y = max(x, 0)``, whose slope is read off y: a layer behind it keeps y anyway, a slope would be kept besides."""

    def forward(self, x: Tensor) -> Tensor:
        """Save y."""
        self.y = torch.relu(x)
        return self.y

    def tangent(self, dx: Tensor) -> Tensor:
        """Return dx where y is positive, else zero."""
        # One pass, where a comparison and a product would be two; y is broadcast over k.
        dy: Tensor = aten.threshold_backward.default(dx, self.y, 0)
        return dy

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Return g where y is positive, else zero."""
        return (self.tangent(g),)


@rule(aten.pow.Scalar)
class Exponential(Unary):
    """``y = base ** x``: y' = log(base) y."""

    def forward(self, base: float, x: Tensor) -> Tensor:  # type: ignore[override]
        """Save y; only a positive base has derivatives everywhere."""
        if base <= 0:
            raise UnsupportedOpError(f"aten.pow.Scalar with base {base} has no derivative: use a positive base.")
        y: Tensor = self.op(base, x)
        rate = math.log(base)
        self._start(Function(lambda x, y: rate * y, lambda x, y: rate * rate * y), x, y)
        return y


@rule(
    aten.gelu.default, aten.silu.default, aten.tanh.default, aten.sigmoid.default, aten.softplus.default,
    aten.mish.default,
)  # fmt: skip
class Activation(Unary):
    """Smooth activations whose slope and curvature come from a kernel of one pass each."""

    @classmethod
    def for_(cls, template: list[Any]) -> type[Rule] | None:
        """Choose the formulas of the table for a softplus that is not the default one."""
        numbers = [a for a in template[1:] if isinstance(a, int | float)]
        return Unary if numbers not in ([], [1], [1, 20]) else cls

    def forward(self, x: Tensor, *constants: Any) -> Tensor:
        """Save x and y."""
        y = self._call(x, constants)
        self.name = "gelu_tanh" if constants[:1] == ("tanh",) else self.op._schema.name.removeprefix("aten::")
        self.point = x, y
        self.slope = None
        return y

    def _slope(self) -> Tensor:
        if self.slope is None:
            self.slope = activation_slope(self.name, *self.point)
        return self.slope

    def prepare(self, g: Tensor) -> None:
        """Multiply the second derivative with the cotangent."""
        self._slope()
        self.curvature = activation_curvature(self.name, self.point[0], g[0])


def _softplus_first(x: Tensor, y: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:  # noqa: ARG001
    slope: Tensor = aten.softplus_backward.default(torch.ones_like(x), x, beta, threshold)
    return slope


def _softplus_second(x: Tensor, y: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:  # noqa: ARG001
    s = torch.sigmoid(x * beta)
    # Above the threshold torch takes the line y = x.
    return (beta * s * (1 - s)).masked_fill_(x * beta >= threshold, 0)


def _elu_first(x: Tensor, y: Tensor, alpha: float = 1, scale: float = 1, inner: float = 1) -> Tensor:
    # From y, which saves the exponential, where its sign is that of x.
    signs = alpha >= 0 and scale > 0
    slope: Tensor = aten.elu_backward.default(torch.ones_like(x), alpha, scale, inner, signs, y if signs else x)
    return slope


def _elu_second(x: Tensor, y: Tensor, alpha: float = 1, scale: float = 1, inner: float = 1) -> Tensor:
    # The slope of the exponential times its rate; for x >= 0 the function is a line.
    return torch.where(x < 0, _elu_first(x, y, alpha, scale, inner).mul_(inner), 0)


def _within(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """1 where x lies between low and high, else 0; at a bound as in torch."""
    inside = torch.ones_like(x)
    if low is not None:
        inside.masked_fill_(x < low if CLAMP_PASSES_AT_BOUND else x <= low, 0)
    if high is not None:
        inside.masked_fill_(x > high if CLAMP_PASSES_AT_BOUND else x >= high, 0)
    return inside


def _strictly_within(x: Tensor, low: float, high: float, value: float = 1) -> Tensor:
    inside: Tensor = aten.hardtanh_backward.default(torch.full_like(x, value), x, low, high)
    return inside


def _erfinv_first(y: Tensor) -> Tensor:
    return torch.exp(y * y) / _ERF


FUNCTIONS: dict[Any, Function] = {
    aten.leaky_relu.default: Function(
        lambda x, y, slope=0.01: aten.leaky_relu_backward.default(torch.ones_like(x), x, slope, False), None
    ),
    # At a bound, here as in the others, the side that torch takes.
    aten.hardtanh.default: Function(lambda x, y, low=-1, high=1: _strictly_within(x, low, high), None),
    aten.hardsigmoid.default: Function(lambda x, y: _strictly_within(x, -3, 3, 1 / 6), None),
    aten.hardswish.default: Function(
        lambda x, y: aten.hardswish_backward.default(torch.ones_like(x), x),
        lambda x, y: _strictly_within(x, -3, 3, 1 / 3),
    ),
    aten.clamp.default: Function(lambda x, y, low=None, high=None: _within(x, low, high), None),
    aten.abs.default: Function(lambda x, y: torch.sign(x), None),
    aten.neg.default: Function(lambda x, y: torch.full_like(x, -1), None),
    # sigmoid(-x) and not 1 - sigmoid(x), which is zero from x = 18 on in float32.
    aten.log_sigmoid.default: Function(
        lambda x, y: torch.sigmoid(-x), lambda x, y: -torch.sigmoid(x) * torch.sigmoid(-x)
    ),
    aten.softplus.default: Function(_softplus_first, _softplus_second),
    aten.elu.default: Function(_elu_first, _elu_second),
    aten.celu.default: Function(
        lambda x, y, alpha=1: _elu_first(x, y, alpha, 1, 1 / alpha),
        lambda x, y, alpha=1: _elu_second(x, y, alpha, 1, 1 / alpha),
    ),
    aten.exp.default: Function(lambda x, y: y, lambda x, y: y),
    aten.exp2.default: Function(lambda x, y: math.log(2) * y, lambda x, y: math.log(2) ** 2 * y),
    aten.expm1.default: Function(lambda x, y: y + 1, lambda x, y: y + 1),
    aten.log.default: Function(lambda x, y: 1 / x, lambda x, y: -1 / (x * x)),
    aten.log2.default: Function(lambda x, y: 1 / (math.log(2) * x), lambda x, y: -1 / (math.log(2) * x * x)),
    aten.log10.default: Function(lambda x, y: 1 / (math.log(10) * x), lambda x, y: -1 / (math.log(10) * x * x)),
    aten.log1p.default: Function(lambda x, y: 1 / (1 + x), lambda x, y: -1 / (1 + x) ** 2),
    # x y = x^(3/2): a power would take far longer. Likewise below.
    aten.sqrt.default: Function(lambda x, y: 0.5 / y, lambda x, y: -0.25 / (x * y)),
    aten.rsqrt.default: Function(lambda x, y: -0.5 * y / x, lambda x, y: 0.75 * y / (x * x)),
    aten.reciprocal.default: Function(lambda x, y: -y * y, lambda x, y: 2 * y**3),
    aten.square.default: Function(lambda x, y: 2 * x, lambda x, y: torch.full_like(x, 2)),
    # p = 0 (and 1 for the second) by itself: at x = 0 the formula would be zero times infinity.
    aten.pow.Tensor_Scalar: Function(
        lambda x, y, p: p * x ** (p - 1) if p else torch.zeros_like(x),
        lambda x, y, p: p * (p - 1) * x ** (p - 2) if p not in (0, 1) else torch.zeros_like(x),
    ),
    aten.sin.default: Function(lambda x, y: torch.cos(x), lambda x, y: -y),
    aten.cos.default: Function(lambda x, y: -torch.sin(x), lambda x, y: -y),
    aten.tan.default: Function(lambda x, y: 1 + y * y, lambda x, y: 2 * y * (1 + y * y)),
    aten.asin.default: Function(lambda x, y: torch.rsqrt(1 - x * x), lambda x, y: x * (1 - x * x) ** -1.5),
    aten.acos.default: Function(lambda x, y: -torch.rsqrt(1 - x * x), lambda x, y: -x * (1 - x * x) ** -1.5),
    aten.atan.default: Function(lambda x, y: 1 / (1 + x * x), lambda x, y: -2 * x / (1 + x * x) ** 2),
    aten.sinh.default: Function(lambda x, y: torch.cosh(x), lambda x, y: y),
    aten.cosh.default: Function(lambda x, y: torch.sinh(x), lambda x, y: y),
    aten.asinh.default: Function(lambda x, y: torch.rsqrt(1 + x * x), lambda x, y: -x * (1 + x * x) ** -1.5),
    aten.atanh.default: Function(lambda x, y: 1 / (1 - x * x), lambda x, y: 2 * x / (1 - x * x) ** 2),
    aten.lgamma.default: Function(lambda x, y: torch.digamma(x), lambda x, y: torch.polygamma(1, x)),
    aten.digamma.default: Function(lambda x, y: torch.polygamma(1, x), lambda x, y: torch.polygamma(2, x)),
    aten.erfinv.default: Function(lambda x, y: _erfinv_first(y), lambda x, y: 2 * y * _erfinv_first(y).square()),
    aten.erf.default: Function(lambda x, y: _ERF * torch.exp(-x * x), lambda x, y: -2 * _ERF * x * torch.exp(-x * x)),
    aten.erfc.default: Function(lambda x, y: -_ERF * torch.exp(-x * x), lambda x, y: 2 * _ERF * x * torch.exp(-x * x)),
}
RULES.update(dict.fromkeys(FUNCTIONS.keys() - RULES.keys(), Unary))
