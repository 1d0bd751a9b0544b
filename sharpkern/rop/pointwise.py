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

from .rule import RULES, Rule

aten = torch.ops.aten
Derivative = Callable[..., Tensor]


class Function(NamedTuple):
    """First and second derivative, as functions of (x, y, *the op's other arguments); second None where zero."""

    first: Derivative
    second: Derivative | None


class Unary(Rule):
    """``y = f(x, *constants)``, with the derivatives from the table below."""

    def forward(self, x: Tensor, *constants: Any) -> Tensor:
        """Save what the derivatives are computed from."""
        y: Tensor = self._call(x, constants)
        self.point = (x, y, *constants)
        self.function = FUNCTIONS[self.op]
        self.slope: Tensor | None = None
        self.curvature: Tensor | None = None
        return y

    def _call(self, x: Tensor, constants: tuple[Any, ...]) -> Tensor:
        names = [a.name for a in self.op._schema.arguments if a.kwarg_only]
        split = len(constants) - len(names)
        y: Tensor = self.op(x, *constants[:split], **dict(zip(names, constants[split:], strict=True)))
        return y

    def _slope(self) -> Tensor:
        if self.slope is None:
            self.slope = self.function.first(*self.point)
            if self.function.second is None:
                self.point = ()  # nothing will ask for it again
        return self.slope

    def tangent(self, dx: Tensor) -> Tensor:
        """Return ``f'(x) dx``."""
        self.dx = dx if self.function.second is not None else None
        return self._slope() * dx

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Return ``f'(x) g``."""
        return (self._slope() * g,)

    def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor]:
        """Return ``f'(x) dg + g f''(x) dx``."""
        dgx = self._slope() * dg
        if self.function.second is not None:
            if self.curvature is None:
                self.curvature = self.function.second(*self.point) * g
            dgx.addcmul_(self.curvature, self.dx)
        return (dgx,)


def _gelu_first(x: Tensor, y: Tensor, approximate: str = "none") -> Tensor:  # noqa: ARG001
    if approximate == "tanh":
        t, du = _gelu_tanh(x)
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * du
    return torch.special.ndtr(x) + x * _normal_density(x)


def _gelu_second(x: Tensor, y: Tensor, approximate: str = "none") -> Tensor:  # noqa: ARG001
    if approximate == "tanh":
        t, du = _gelu_tanh(x)
        d2u = 6 * math.sqrt(2 / math.pi) * 0.044715 * x
        return (1 - t * t) * (du + 0.5 * x * (d2u - 2 * t * du * du))
    return (2 - x * x) * _normal_density(x)


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = math.sqrt(2 / math.pi)
    return torch.tanh(scale * (x + 0.044715 * x**3)), scale * (1 + 3 * 0.044715 * x * x)


def _normal_density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _softplus_first(x: Tensor, y: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:  # noqa: ARG001
    return torch.where(x * beta > threshold, 1.0, torch.sigmoid(x * beta)).to(x.dtype)


def _softplus_second(x: Tensor, y: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:  # noqa: ARG001
    s = torch.sigmoid(x * beta)
    return torch.where(x * beta > threshold, 0.0, beta * s * (1 - s)).to(x.dtype)


def _elu_first(x: Tensor, y: Tensor, alpha: float = 1, scale: float = 1, inner: float = 1) -> Tensor:  # noqa: ARG001
    return torch.where(x > 0, scale, scale * alpha * inner * torch.exp(inner * x)).to(x.dtype)


def _elu_second(x: Tensor, y: Tensor, alpha: float = 1, scale: float = 1, inner: float = 1) -> Tensor:  # noqa: ARG001
    return torch.where(x > 0, 0.0, scale * alpha * inner * inner * torch.exp(inner * x)).to(x.dtype)


def _silu_first(x: Tensor, y: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s + y * (1 - s)


def _silu_second(x: Tensor, y: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s) * (2 + (x - 2 * y))


def _inside(x: Tensor, low: float | None, high: float | None) -> Tensor:
    inside = torch.ones_like(x, dtype=torch.bool)
    if low is not None:
        inside &= x >= low
    if high is not None:
        inside &= x <= high
    return inside.to(x.dtype)


FUNCTIONS: dict[Any, Function] = {
    aten.relu.default: Function(lambda x, y: (y > 0).to(x.dtype), None),
    aten.leaky_relu.default: Function(lambda x, y, slope=0.01: torch.where(x > 0, 1.0, slope).to(x.dtype), None),
    aten.hardtanh.default: Function(
        lambda x, y, low=-1, high=1: ((x > low) & (x < high)).to(x.dtype), None
    ),
    aten.clamp.default: Function(lambda x, y, low=None, high=None: _inside(x, low, high), None),
    aten.abs.default: Function(lambda x, y: torch.sign(x), None),
    aten.neg.default: Function(lambda x, y: torch.full_like(x, -1), None),
    aten.gelu.default: Function(_gelu_first, _gelu_second),
    aten.silu.default: Function(_silu_first, _silu_second),
    aten.tanh.default: Function(lambda x, y: 1 - y * y, lambda x, y: -2 * y * (1 - y * y)),
    aten.sigmoid.default: Function(lambda x, y: y * (1 - y), lambda x, y: y * (1 - y) * (1 - 2 * y)),
    aten.softplus.default: Function(_softplus_first, _softplus_second),
    aten.elu.default: Function(_elu_first, _elu_second),
    aten.exp.default: Function(lambda x, y: y, lambda x, y: y),
    aten.expm1.default: Function(lambda x, y: y + 1, lambda x, y: y + 1),
    aten.log.default: Function(lambda x, y: 1 / x, lambda x, y: -1 / (x * x)),
    aten.log1p.default: Function(lambda x, y: 1 / (1 + x), lambda x, y: -1 / (1 + x) ** 2),
    aten.sqrt.default: Function(lambda x, y: 0.5 / y, lambda x, y: -0.25 / (x * y)),
    aten.rsqrt.default: Function(lambda x, y: -0.5 * y / x, lambda x, y: 0.75 * y / (x * x)),
    aten.reciprocal.default: Function(lambda x, y: -y * y, lambda x, y: 2 * y**3),
    aten.sin.default: Function(lambda x, y: torch.cos(x), lambda x, y: -y),
    aten.cos.default: Function(lambda x, y: -torch.sin(x), lambda x, y: -y),
    aten.erf.default: Function(
        lambda x, y: 2 / math.sqrt(math.pi) * torch.exp(-x * x),
        lambda x, y: -4 / math.sqrt(math.pi) * x * torch.exp(-x * x),
    ),
    aten.square.default: Function(lambda x, y: 2 * x, lambda x, y: torch.full_like(x, 2)),
    aten.pow.Tensor_Scalar: Function(
        lambda x, y, p: p * x ** (p - 1) if p else torch.zeros_like(x),
        lambda x, y, p: p * (p - 1) * x ** (p - 2) if p not in (0, 1) else torch.zeros_like(x),
    ),
    aten.log_sigmoid.default: Function(
        lambda x, y: torch.sigmoid(-x), lambda x, y: -torch.sigmoid(x) * torch.sigmoid(-x)
    ),
}
RULES.update(dict.fromkeys(FUNCTIONS, Unary))
