"""Ops that move numbers: forward, tangent and cotangent go to the right places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_truth import check_op, double_backward
from torch import Tensor

aten = torch.ops.aten


def times_place(y: Tensor) -> Tensor:
    """Weigh each entry by its place, so that a permuted result is seen."""
    return y * torch.linspace(0.3, 1.7, max(1, y.numel()), dtype=y.dtype).reshape(y.shape)


CASES: dict[str, tuple[Any, tuple[int, ...], Any]] = {
    "view": (lambda x: x.view(2, -1), (4, 3), aten.view.default),
    "view_scalar": (lambda x: x.view(()), (1, 1), aten.view.default),
    "reshape_of_transposed": (lambda x: x.t().reshape(2, 6), (4, 3), None),
    "flatten": (lambda x: x.flatten(1), (2, 3, 2), None),
    "unflatten": (lambda x: x.unflatten(-1, (2, 3)), (2, 6), None),
    "unsqueeze": (lambda x: x.unsqueeze(-2), (4, 3), aten.unsqueeze.default),
    "unsqueeze_scalar": (lambda x: x.unsqueeze(0), (), aten.unsqueeze.default),
    "squeeze": (lambda x: x.squeeze(), (1, 4, 1, 3), None),
    "squeeze_dim": (lambda x: x.squeeze(-2), (4, 1, 3), None),
    "squeeze_dim_not_one": (lambda x: x.squeeze(0), (4, 1, 3), None),
    "squeeze_dims": (lambda x: x.squeeze((0, 2)), (1, 4, 1, 3), aten.squeeze.dims),
    "permute": (lambda x: x.permute(2, 0, -2), (2, 3, 4), aten.permute.default),
    "transpose": (lambda x: x.transpose(-1, 0), (2, 3, 4), aten.transpose.int),
    "t": (lambda x: x.t(), (2, 3), None),
    "t_vector": (lambda x: x.t(), (3,), None),
    "mT": (lambda x: x.mT, (2, 3, 4), None),
    "movedim": (lambda x: x.movedim(0, -1), (2, 3, 4), None),
    "expand": (lambda x: x.expand(2, -1, 5), (3, 1), aten.expand.default),
    "expand_scalar": (lambda x: x.expand(2, 3), (), aten.expand.default),
    "expand_same": (lambda x: x.expand(2, 3), (2, 3), None),
    "broadcast_to": (lambda x: torch.broadcast_to(x, (2, 3)), (3,), None),
    "repeat": (lambda x: x.repeat(2, 1, 3), (3, 2), aten.repeat.default),
    "tile": (lambda x: x.tile(3), (3, 2), None),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, dim=1), (3, 2), None),
    "select": (lambda x: x[:, -2], (3, 4, 2), aten.select.int),
    "slice": (lambda x: x[1:-1, ::2], (5, 6), aten.slice.Tensor),
    "slice_with_none": (lambda x: x[..., None, :3], (5, 6), aten.slice.Tensor),
    "narrow": (lambda x: x.narrow(-1, 1, 2), (3, 4), None),
    "diagonal": (lambda x: x.diagonal(1, -2, -1), (2, 3, 4), aten.diagonal.default),
    "diag": (lambda x: torch.diag(x), (3, 3), None),
    "diag_of_vector": (lambda x: torch.diag(x), (3,), None),
    "diag_embed": (lambda x: torch.diag_embed(x, 1), (2, 3), None),
    "trace": (lambda x: torch.trace(x), (3, 3), None),
    "flip": (lambda x: x.flip(0, -1), (2, 3, 4), aten.flip.default),
    "roll": (lambda x: x.roll((1, -2), (0, -1)), (3, 4), aten.roll.default),
    "roll_flat": (lambda x: x.roll(5), (3, 4), aten.roll.default),
    "rot90": (lambda x: x.rot90(), (3, 4), None),
    "tril": (lambda x: x.tril(-1), (2, 3, 4), aten.tril.default),
    "triu": (lambda x: x.triu(1), (3, 4), aten.triu.default),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 3), value=0.7), (2, 3, 4), aten.constant_pad_nd.default),
    "crop": (lambda x: F.pad(x, (-1, 2, 1, -1)), (3, 4), aten.constant_pad_nd.default),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), (1, 8, 2, 3), None),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 2), (1, 4, 2, 3), None),
}


@pytest.mark.parametrize("name", CASES)
def test_one_argument(name: str) -> None:
    f, shape, op = CASES[name]
    check_op(lambda x: times_place(f(x)), shape, op=op)


def test_unfold_is_right_on_the_fallback() -> None:
    fallback = ("aten.unfold.default",)
    check_op(lambda x: times_place(x.unfold(1, 3, 2)), (2, 7), fallback=fallback, truth=double_backward)


SEVERAL: dict[str, tuple[Any, tuple[int, ...], Any]] = {
    "split": (lambda x: x.split(2, -1), (3, 5), None),
    "split_with_sizes": (lambda x: x.split([1, 3, 1], 1), (3, 5), None),
    "chunk": (lambda x: x.chunk(3, 1), (2, 7), None),
    "unbind": (lambda x: x.unbind(1), (3, 4), None),
    "tensor_split": (lambda x: x.tensor_split(3, -1), (3, 5), None),
    "iterate": (lambda x: tuple(row * row for row in x), (3, 4), None),
    "one_part_of_split": (lambda x: x.split(2, -1)[1], (3, 5), None),
    "two_parts_of_unbind": (lambda x: (x.unbind(0)[2], x.unbind(0)[0]), (3, 5), None),
    "qkv": (lambda x: (lambda q, k, v: q * k + v)(*x.chunk(3, -1)), (2, 6), None),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_results(name: str) -> None:
    f, shape, op = SEVERAL[name]
    check_op(lambda x: tuple(times_place(y) for y in f(x)), shape, op=op)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_concatenation_and_stacking_with_a_constant_part(dim: int) -> None:
    constant = torch.randn(2, 3, dtype=torch.float64)
    check_op(lambda a, b: times_place(torch.cat([a, constant, b, a], dim)), (2, 3), (2, 3), op=aten.cat.default)
    check_op(lambda a, b: times_place(torch.stack([constant, a, b, a], dim)), (2, 3), (2, 3))


def test_concatenation_of_unequal_sizes_empty_tensors_and_mixed_dtypes() -> None:
    low = torch.randn(2, 2)
    check_op(lambda a, b: times_place(torch.cat([a, b], -1)), (2, 3), (2, 1), op=aten.cat.default)
    check_op(lambda a, b: torch.cat([a.float(), b, low], -1), (2, 3), (2, 1), op=aten.cat.default, tolerance=1e-5)
    check_op(lambda a: torch.cat([a.float(), low.double()], -1), (2, 3), op=aten.cat.default, tolerance=1e-5)
    check_op(lambda a: torch.cat([torch.zeros(0, dtype=a.dtype), a], -1), (2, 3), op=aten.cat.default)
    check_op(lambda a, b: torch.stack([a.float().double(), b], -1), (2, 3), (2, 3), tolerance=1e-5)


@pytest.mark.parametrize("active", ["both", "x", "src"])
def test_assignments_to_parts(active: str) -> None:
    fixed_x, fixed_src = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def part(assign: Any) -> Any:
        def f(*args: Tensor) -> Tensor:
            x = fixed_x if active == "src" else args[0]
            src = fixed_src if active == "x" else args[-1]
            y = x.clone()
            assign(y, src)
            return times_place(y)

        return f

    shapes = {"both": ((4, 4), (4,)), "x": ((4, 4),), "src": ((4,),)}[active]

    def to_row(y: Tensor, src: Tensor) -> None:
        y[:, -1] = src

    def to_slice(y: Tensor, src: Tensor) -> None:
        y[1:3, ::2] = src[:2]

    def to_diagonal(y: Tensor, src: Tensor) -> None:
        y.diagonal(0, -2, -1).copy_(src)

    for assign in (to_row, to_slice, to_diagonal):
        check_op(part(assign), *shapes)
    check_op(part(lambda y, s: y.select(0, 1).mul_(s)), *shapes)


def test_a_part_that_a_constant_replaced_moves_no_more() -> None:
    """The square of the sum mixes all entries, so that a tangent left in the part would be seen."""
    fixed = torch.randn(4, dtype=torch.float64)

    def replaced(x: Tensor) -> Tensor:
        y = x.clone()
        y[:, -1] = fixed
        return times_place(y).sum().square()

    check_op(replaced, (4, 4), op=aten.select_scatter.default)
    check_op(lambda x: torch.select_scatter(x, fixed, 0, 1).sum().square(), (4, 4), op=aten.select_scatter.default)


def test_scatters_of_parts_called_by_name() -> None:
    check_op(lambda x, s: times_place(torch.select_scatter(x, s, -2, -1)), (2, 3, 4), (2, 4))
    check_op(lambda x, s: times_place(torch.slice_scatter(x, s, -1, 1, 4, 2)), (2, 5), (2, 2))
    check_op(lambda x, s: times_place(torch.diagonal_scatter(x, s, 1, 0, -1)), (3, 2, 4), (2, 3))
