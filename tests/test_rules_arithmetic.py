"""Binary rules: products under every kind of broadcasting, ties, scalars, mixed dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rule_truth import check, check_op, curved, double_backward, positive
from torch import Tensor, nn

from sharpkern.curvature.losses import FunctionalLoss
from sharpkern.rop import Program, export
from sharpkern.rop.rule import RULES

aten = torch.ops.aten

# full, trailing, leading, outer product, scalar on either side, size-1 dims
SHAPES = [
    ((3, 5), (3, 5)), ((3, 5), (5,)), ((5,), (2, 3, 5)), ((4, 1), (1, 3)), ((2, 1, 3), (5, 1)),
    ((), (3, 2)), ((3, 2), ()), ((1,), (4, 3)), ((), ()), ((1, 1), (1,)),
]  # fmt: skip

BINARY = {
    "add": (torch.add, aten.add.Tensor, curved),
    "add_alpha": (lambda a, b: torch.add(a, b, alpha=-1.7), aten.add.Tensor, curved),
    "sub": (torch.sub, aten.sub.Tensor, curved),
    "sub_alpha": (lambda a, b: torch.sub(a, b, alpha=2.3), aten.sub.Tensor, curved),
    "rsub": (lambda a, b: torch.rsub(a, b, alpha=0.6), aten.rsub.Tensor, curved),
    "mul": (torch.mul, aten.mul.Tensor, curved),
    "div": (torch.div, aten.div.Tensor, positive),
    "pow": (torch.pow, aten.pow.Tensor_Tensor, positive),
    "atan2": (torch.atan2, aten.atan2.default, curved),
    "maximum": (torch.maximum, aten.maximum.default, curved),
    "minimum": (torch.minimum, aten.minimum.default, curved),
    "where": (lambda a, b: torch.where(a + b > 0.2, a, b), aten.where.self, curved),
    "lerp": (lambda a, b: torch.lerp(a, b, 0.3), None, curved),
    "clamp_low": (lambda a, b: torch.clamp(a, min=b), None, curved),
    "clamp_high": (lambda a, b: torch.clamp(a, max=b), None, curved),
    "logaddexp": (torch.logaddexp, None, curved),
    "xlogy": (torch.xlogy, None, positive),
    "subtract_detached": (lambda a, b: a - b.detach() + b, aten.sub.Tensor, curved),
}


FEW = [((3, 5), (5,)), ((4, 1), (1, 3)), ((), (3, 2))]
CASES = [(name, shapes) for name in BINARY for shapes in (SHAPES if name in ("add", "mul", "div") else FEW)]


@pytest.mark.parametrize(("name", "shapes"), CASES, ids=str)
def test_products_with_both_arguments_active(name: str, shapes: tuple[Any, Any]) -> None:
    f, op, inner = BINARY[name]
    check_op(f, *shapes, op=op, inner=inner)


@pytest.mark.parametrize("shapes", [((3, 5), (5,)), ((), (3, 2))], ids=str)
@pytest.mark.parametrize("active", [0, 1])
@pytest.mark.parametrize("name", [n for n in BINARY if n != "subtract_detached"])
def test_products_with_one_argument_active(name: str, active: int, shapes: tuple[Any, Any]) -> None:
    f, op, inner = BINARY[name]
    other = inner(torch.randn(shapes[1 - active], dtype=torch.float64))
    check_op(lambda x: f(x, other) if active == 0 else f(other, x), shapes[active], op=op, inner=inner)


@pytest.mark.parametrize(
    ("f", "op"),
    [
        (lambda x: x + 1.7, aten.add.Tensor),
        (lambda x: torch.sub(x, 0.7, alpha=2), aten.sub.Tensor),
        (lambda x: 1.3 - x, aten.rsub.Scalar),
        (lambda x: aten.rsub(x, 1.3, 0.4), aten.rsub.Scalar),
        (lambda x: aten.add.Scalar(x, 1.7, 0.4), aten.add.Scalar),
        (lambda x: aten.sub.Scalar(x, 1.7, 0.4), aten.sub.Scalar),
        (lambda x: -2.3 * x, aten.mul.Tensor),
        (lambda x: aten.mul.Scalar(x, -2.3), aten.mul.Scalar),
        (lambda x: x / 1.9, aten.div.Tensor),
        (lambda x: aten.div.Scalar(x, 1.9), aten.div.Scalar),
        (lambda x: 1.9 / (x + 3), None),
        (lambda x: x * x, aten.mul.Tensor),
        (lambda x: x / (x + 3), aten.div.Tensor),
        (lambda x: x + x, aten.add.Tensor),
    ],
)
def test_products_with_numbers_and_with_itself(f: Any, op: Any) -> None:
    check_op(f, (3, 4), op=op)


@pytest.mark.parametrize("divisor", [torch.tensor(3), torch.tensor([2, 7, 3]), torch.tensor([2.0, 7.0, 3.0])], ids=str)
def test_quotient_by_integers_and_by_lower_precision_is_exact(divisor: Tensor) -> None:
    check_op(lambda x: x / divisor, (4, 3), op=aten.div.Tensor)
    check_op(lambda x: (x * divisor) ** 2, (4, 3), op=aten.mul.Tensor)


def test_addcmul_addcdiv_and_tensor_lerp() -> None:
    check_op(lambda a, b, c: torch.addcmul(a, b, c, value=0.6), (3, 4), (4,), (3, 1))
    check_op(lambda a, b, c: torch.addcdiv(a, b, c + 3, value=0.6), (3, 4), (4,), (3, 1))
    check_op(lambda a, b, c: torch.lerp(a, b, c), (3, 4), (4,), (3, 1))


@pytest.mark.parametrize("active", [(0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
def test_clamp_between_tensors(active: tuple[int, ...]) -> None:
    shapes = ((4, 5), (5,), (4, 1))
    fixed = [torch.randn(s, dtype=torch.float64) for s in shapes]

    def f(*xs: Tensor) -> Tensor:
        args = list(fixed)
        for i, x in zip(active, xs, strict=True):
            args[i] = x
        return torch.clamp(args[0], args[1] - 0.5, args[2] + 0.5)

    check_op(f, *(shapes[i] for i in active), op=aten.clamp.Tensor)


def at(point: dict[str, Tensor], f: Any) -> None:
    """Check f and its square at exactly this point; the truth is torch's gradient twice."""
    w = torch.randn(f(**point).shape, dtype=torch.float64)

    def loss(p: Any, _: Any) -> Tensor:
        y = f(**{name: p[name] for name in point})
        return (w * y).sum() + (w * y * y).sum()

    check(point, loss, truth=double_backward, values=1)


@pytest.mark.parametrize("f", [torch.maximum, torch.minimum, lambda a, b: torch.clamp(a, min=b)])
def test_ties_follow_torch(f: Any) -> None:
    a = torch.tensor([1.0, 2.0, 3.0, -1.0], dtype=torch.float64)
    at({"a": a, "b": torch.tensor([1.0, 1.5, 3.0, -1.0], dtype=torch.float64)}, lambda a, b: f(a, b))


def test_clamp_at_bounds_and_with_crossed_bounds_follows_torch() -> None:
    x = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.5, -1.0, 4.0, 1.0], dtype=torch.float64)
    low = torch.tensor([0.0, 0.0, 2.5, 2.5, 0.5, 0.5, 0.5, 1.0], dtype=torch.float64)
    high = torch.tensor([1.0, 1.0, 1.5, 1.5, 0.5, 0.5, 0.5, 1.0], dtype=torch.float64)
    at({"x": x, "low": low, "high": high}, lambda x, low, high: torch.clamp(x, low, high))


def test_power_of_zero_follows_torch() -> None:
    base = torch.tensor([0.0, 0.0, 0.0, 1.3], dtype=torch.float64)
    exponent = torch.tensor([2.0, 3.0, 2.5, 0.0], dtype=torch.float64)
    at({"base": base}, lambda base: torch.pow(base, exponent))


@pytest.mark.parametrize("shapes", [((3, 4), (3, 4)), ((3, 4), (4,)), ((4,), (3, 1)), ((), (3, 4))], ids=str)
def test_where_with_broadcast_condition_and_values(shapes: tuple[Any, Any]) -> None:
    condition = torch.tensor([True, False, True, True])
    check_op(lambda a, b: torch.where(condition, a, b), *shapes, op=aten.where.self)
    check_op(lambda a: torch.where(condition, a, 0.4), shapes[0], op=None)
    check_op(lambda a: torch.where(condition, 0.4, a), shapes[0], op=None)


def test_masked_fill() -> None:
    mask = torch.rand(3, 4) > 0.5
    check_op(lambda a: a.masked_fill(mask, 0.7), (3, 4))
    check_op(lambda a: a.masked_fill(mask, 0.7), (2, 1, 4))
    check_op(lambda a, value: a.masked_fill(mask, value), (3, 4), ())


def test_infinite_branch_that_is_not_taken_leaves_products_finite() -> None:
    x = torch.tensor([0.0, 2.0, 3.0], dtype=torch.float64)

    def loss(p: Any, _: Any) -> Tensor:
        safe = torch.where(x > 0, p["x"], 1.0)
        return (torch.where(x > 0, torch.sqrt(safe), 0.3 * p["x"]) ** 3).sum()

    check({"x": x}, loss)
    rule = Program(*_program({"x": x}, lambda p, _: torch.where(x > 0, p["x"], p["x"] ** 2).sum())).live[-2].rule
    dx = torch.tensor([[torch.inf, 1.0, 2.0]], dtype=torch.float64)
    rule.forward(x > 0, x, x)
    assert torch.isfinite(rule.tangent(dx, torch.zeros_like(dx))).all()


def _program(params: dict[str, Tensor], loss: Any) -> tuple[Any, dict[str, Tensor]]:
    params = {name: nn.Parameter(p) for name, p in params.items()}
    module = FunctionalLoss(params, loss)
    return export(module, (None,)), dict(zip(params, module.values, strict=True))


def test_assignments_in_place() -> None:
    def f(a: Tensor, b: Tensor) -> Tensor:
        y = a.clone()
        y.copy_(b * a)
        y += b
        y.mul_(a)
        z = torch.zeros_like(y)
        z[:] = y
        return z.contiguous()

    check_op(f, (3, 4), (4,))


def test_detached_and_copied_tensors() -> None:
    check_op(lambda a: torch.tensor([1.0, 2.0], dtype=torch.float64) * aten.alias(a.clone()) * a.detach(), (3, 2))


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16], ids=str)
def test_casts_and_mixed_dtypes_keep_every_dtype(low: torch.dtype) -> None:
    """The watched rules assert shapes and dtypes; the numbers agree as far as the lower dtype goes."""
    temperature = torch.tensor(1.7, dtype=torch.float64)

    def f(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        x, y = a.to(low), b.to(low)
        mixed = (x * b + y) / (2 + y * y) - a + torch.where(a > 0, x.double(), b)
        return mixed * torch.maximum(x, y) * t + (t * x).double() + (x / t) + torch.add(x, t, alpha=0.7)

    w = torch.randn(3, 4, dtype=torch.float64)

    def loss(p: Any, _: Any) -> Tensor:
        return (w * f(torch.tanh(p["a"]), torch.tanh(p["b"]), p["t"]) ** 2).sum()

    params = {"a": torch.randn(3, 4), "b": torch.randn(4), "t": temperature}
    params = {name: p.double() for name, p in params.items()}
    check(params, loss, tolerance=1e-4 if low == torch.float32 else 0.15)


@pytest.mark.parametrize("op", [aten.maximum.default, aten.minimum.default], ids=str)
def test_infinite_derivatives_of_what_is_not_chosen_are_dropped(op: Any) -> None:
    a, b = torch.tensor([1.0, 2.0, 3.0, -1.0]).double(), torch.tensor([2.0, 2.0, 0.5, -1.0]).double()
    rule = RULES[op](op, (True, True))
    rule.forward(a, b)
    loses = a < b if op is aten.maximum.default else a > b
    da = torch.where(loses, torch.inf, torch.randn(1, 4).double())
    db = torch.where(loses | (a == b), torch.randn(1, 4).double(), -torch.inf)
    want = torch.where(a == b, (da + db) / 2, torch.where(loses, db, da))
    assert torch.equal(rule.tangent(da, db), want)
    assert bool(want.isfinite().all())
    leaves = [a.clone().requires_grad_(), b.clone().requires_grad_()]
    g = torch.full((1, 4), torch.inf).double()
    wanted = torch.autograd.grad(op(*leaves), leaves, g[0])
    assert [r.tolist() for r in rule.backward(g)] == [[w.tolist()] for w in wanted]
