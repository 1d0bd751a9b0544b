"""Unary pointwise rules: products, and torch's conventions where a function has no derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_truth import check, check_op, curved, positive, within_one
from torch import Tensor

from sharpkern.rop.rules import pointwise
from sharpkern.rop.rules.pointwise import Activation, Unary
from sharpkern.rop.rules.selection import Clamp

aten = torch.ops.aten

SMOOTH: dict[str, tuple[Callable[..., Tensor], Any, Callable[[Tensor], Tensor]]] = {
    "gelu": (F.gelu, aten.gelu.default, curved),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), aten.gelu.default, curved),
    "silu": (F.silu, aten.silu.default, curved),
    "mish": (F.mish, aten.mish.default, curved),
    "tanh": (torch.tanh, aten.tanh.default, lambda p: p + 0.3 * p * p),
    "sigmoid": (torch.sigmoid, aten.sigmoid.default, curved),
    "softplus": (F.softplus, aten.softplus.default, curved),
    "softplus_beta_threshold": (lambda x: F.softplus(x, 1.7, 1.1), Unary, curved),
    "log_sigmoid": (F.logsigmoid, None, curved),
    "elu": (lambda x: F.elu(x, 0.7), aten.elu.default, curved),
    "celu": (lambda x: F.celu(x, 2.0), aten.celu.default, curved),
    "selu": (F.selu, aten.elu.default, curved),
    "elu_scaled": (lambda x: aten.elu(x, 0.7, 1.4, 1.9), aten.elu.default, curved),
    "lgamma": (torch.lgamma, aten.lgamma.default, positive),
    "digamma": (torch.digamma, aten.digamma.default, positive),
    "erfinv": (torch.erfinv, aten.erfinv.default, within_one),
    "exp": (torch.exp, aten.exp.default, curved),
    "exp2": (torch.exp2, aten.exp2.default, curved),
    "expm1": (torch.expm1, aten.expm1.default, curved),
    "log": (torch.log, aten.log.default, positive),
    "log2": (torch.log2, aten.log2.default, positive),
    "log10": (torch.log10, aten.log10.default, positive),
    "log1p": (torch.log1p, aten.log1p.default, positive),
    "sqrt": (torch.sqrt, aten.sqrt.default, positive),
    "rsqrt": (torch.rsqrt, aten.rsqrt.default, positive),
    "reciprocal": (torch.reciprocal, aten.reciprocal.default, positive),
    "square": (torch.square, None, curved),
    "pow_2": (lambda x: x**2, aten.pow.Tensor_Scalar, curved),
    "pow_3": (lambda x: x**3, aten.pow.Tensor_Scalar, curved),
    "pow_1": (lambda x: torch.pow(x, 1), aten.pow.Tensor_Scalar, curved),
    "pow_0": (lambda x: torch.pow(x, 0) * x, aten.pow.Tensor_Scalar, curved),
    "pow_-2": (lambda x: x**-2, aten.pow.Tensor_Scalar, positive),
    "pow_2.7": (lambda x: x**2.7, aten.pow.Tensor_Scalar, positive),
    "pow_base": (lambda x: 1.7**x, aten.pow.Scalar, curved),
    "sin": (torch.sin, aten.sin.default, curved),
    "cos": (torch.cos, aten.cos.default, curved),
    "tan": (torch.tan, aten.tan.default, within_one),
    "sinh": (torch.sinh, aten.sinh.default, curved),
    "cosh": (torch.cosh, aten.cosh.default, curved),
    "asin": (torch.asin, aten.asin.default, within_one),
    "acos": (torch.acos, aten.acos.default, within_one),
    "atan": (torch.atan, aten.atan.default, curved),
    "asinh": (torch.asinh, aten.asinh.default, curved),
    "atanh": (torch.atanh, aten.atanh.default, within_one),
    "erf": (torch.erf, aten.erf.default, curved),
    "erfc": (torch.erfc, aten.erfc.default, curved),
    "logit": (lambda x: torch.logit(x + 1.0, eps=1e-3), None, lambda p: within_one(p) * 0.5 - 0.5),
    "softsign": (F.softsign, None, curved),
    "tanhshrink": (F.tanhshrink, None, curved),
    "neg": (torch.neg, aten.neg.default, curved),
    "hardswish": (lambda x: F.hardswish(2 * x), aten.hardswish.default, curved),
}

KINKED: dict[str, tuple[Callable[..., Tensor], Any]] = {
    "relu": (F.relu, aten.relu.default),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.23), aten.leaky_relu.default),
    "hardtanh": (lambda x: F.hardtanh(x, -0.7, 1.1), aten.hardtanh.default),
    "relu6": (lambda x: F.relu6(5 * x), None),
    "clamp": (lambda x: x.clamp(-0.7, 1.1), aten.clamp.default),
    "clamp_low": (lambda x: x.clamp(min=-0.7), aten.clamp.default),
    "clamp_high": (lambda x: x.clamp(max=0.7), aten.clamp.default),
    "clamp_min": (lambda x: x.clamp_min(-0.4), None),
    "clamp_max": (lambda x: x.clamp_max(0.4), None),
    "abs": (torch.abs, aten.abs.default),
    "hardsigmoid": (lambda x: F.hardsigmoid(2 * x), aten.hardsigmoid.default),
    "softshrink": (lambda x: F.softshrink(x, 0.4), None),
    "hardshrink": (lambda x: F.hardshrink(x, 0.4), None),
    "threshold": (lambda x: F.threshold(x, 0.4, 0.2), None),
}

# torch's own derivative of hardsigmoid multiplies by 1/6 rounded to float32
REFERENCES = {"hardsigmoid": lambda x: F.hardtanh(2 * x / 6 + 0.5, 0.0, 1.0)}


@pytest.mark.parametrize("name", SMOOTH)
def test_products_of_smooth_functions(name: str) -> None:
    f, op, inner = SMOOTH[name]
    kind = {"rule": op} if op is Unary else {"op": op}  # softplus with other constants has no kernel
    check_op(f, (3, 7), **kind, inner=inner)


@pytest.mark.parametrize("name", KINKED)
def test_products_of_kinked_functions(name: str) -> None:
    f, op = KINKED[name]
    check_op(f, (3, 7), op=op, reference=REFERENCES.get(name))


def test_products_of_a_scalar_argument() -> None:
    check_op(torch.tanh, (), op=aten.tanh.default, rule=Activation, inner=lambda p: p + 0.3 * p * p)


@pytest.mark.parametrize("name", KINKED)
def test_kinks_follow_torch(name: str) -> None:
    at_kinks = torch.tensor([0.0, -0.7, 1.1, 0.7, 0.4, -0.4, 1.2, 1.5, -1.5, 3.0], dtype=torch.float64)
    gradient_at(KINKED[name][0], at_kinks, REFERENCES.get(name))


@pytest.mark.parametrize(
    ("name", "point"),
    [("elu", 0.0), ("celu", 0.0), ("selu", 0.0), ("softplus_beta_threshold", 1.1 / 1.7), ("hardswish", 1.5)]
    + [("hardswish", -1.5), ("pow_2", 0.0), ("pow_3", 0.0), ("pow_1", 0.0), ("pow_0", 0.0), ("square", 0.0)],
)  # fmt: skip
def test_seams_of_piecewise_smooth_functions_follow_torch(name: str, point: float) -> None:
    gradient_at(SMOOTH[name][0], torch.full((2,), point, dtype=torch.float64))


def gradient_at(f: Callable[..., Tensor], point: Tensor, reference: Callable[..., Tensor] | None = None) -> None:
    """Check gradient and products at exactly this point."""
    weights = torch.randn_like(point)

    def loss_of(f: Callable[..., Tensor]) -> Any:
        def loss(p: Any, _: Any) -> Tensor:
            return (weights * f(p["x"])).sum() + (weights * p["x"] ** 2).sum() + (f(p["x"]) ** 2).sum()

        return loss

    check({"x": point}, loss_of(f), reference=None if reference is None else loss_of(reference), values=1)


@pytest.mark.parametrize("size", [30.0, 300.0])
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "softplus", "elu", "log_sigmoid"])
def test_saturated_activations_stay_finite(name: str, size: float) -> None:
    far = size * torch.tensor([-1.0, 1.0, -0.9, 0.8], dtype=torch.float64)
    gradient_at(SMOOTH[name][0], far)


@pytest.mark.parametrize(("passes", "slopes"), [(True, [0, 1, 1, 1, 0]), (False, [0, 0, 1, 0, 0])])
def test_clamp_at_a_number_follows_the_convention_of_torch(
    passes: bool, slopes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pointwise, "CLAMP_PASSES_AT_BOUND", passes)
    rule = pointwise.Unary(aten.clamp.default, (True,))
    rule.forward(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]), -1.0, 1.0)
    assert rule.backward(torch.ones(1, 5))[0].tolist() == [slopes]
    assert rule.tangent(torch.ones(1, 5)).tolist() == [slopes]


@pytest.mark.parametrize(
    ("shares", "x", "low", "high"),
    [
        (True, [0, 0.5, 1, 0.5, 0], [1, 0.5, 0, 0, 0], [0, 0, 0, 0.5, 1]),
        (False, [0, 1, 1, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]),
    ],
)
def test_clamp_at_a_tensor_follows_the_convention_of_torch(
    shares: bool, x: list[float], low: list[float], high: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pointwise, "CLAMP_SHARES_TIES", shares)
    rule = Clamp(aten.clamp.Tensor, (True, True, True))
    rule.forward(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]), -torch.ones(5), torch.ones(5))
    assert [g.tolist() for g in rule.backward(torch.ones(1, 5))] == [[x], [low], [high]]
    infinite = torch.full((1, 5), torch.inf).where(torch.tensor(low) == 0, 1.0)  # where low has no share
    moved = rule.tangent(torch.zeros(1, 5), infinite, torch.zeros(1, 5))
    assert moved.tolist() == [low]


def test_the_conventions_are_those_of_the_torch_that_runs() -> None:
    x = torch.tensor([-1.0, 1.0], requires_grad=True)
    at_numbers = torch.autograd.grad(x.clamp(-1.0, 1.0).sum(), x)[0]
    at_tensors = torch.autograd.grad(x.clamp(-torch.ones(2), torch.ones(2)).sum(), x)[0]
    assert at_numbers.tolist() == [float(pointwise.CLAMP_PASSES_AT_BOUND)] * 2
    assert at_tensors.tolist() == [0.5 if pointwise.CLAMP_SHARES_TIES else 1.0] * 2
