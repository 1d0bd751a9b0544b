"""Convolutions of one to three dimensions, plain and transposed, against reverse over reverse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_truth import check, check_op, double_backward

from sharpkern.rop import UnsupportedOpError
from sharpkern.rop.rules.conv import Convolution

aten = torch.ops.aten
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
OP = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
NAMED = {1: aten.conv1d.padding, 2: aten.conv2d.padding, 3: aten.conv3d.padding}
TRANSPOSE_OP = {
    1: aten.conv_transpose1d.default,
    2: aten.conv_transpose2d.input,
    3: aten.conv_transpose3d.input,
}


def same(f: Any, *shapes: tuple[int, ...], op: Any) -> None:
    check_op(f, *shapes, op=op, rule=Convolution, truth=double_backward)


def sizes(rank: int, *values: int) -> tuple[int, ...]:
    return values[:rank]


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"groups": 2}, {"groups": 2, "stride": 3}],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False])
def test_conv(rank: int, options: dict[str, int], bias: bool) -> None:
    g = options.get("groups", 1)
    shapes = [(2, 2 * g, *sizes(rank, 7, 6, 5)), (3 * g, 2, *sizes(rank, 3, 2, 2))]
    shapes += [(3 * g,)] if bias else []
    same(lambda x, w, b=None: CONV[rank](x, w, b, **options), *shapes, op=OP[rank])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("dilation", [1, 3])
def test_conv_with_named_padding(rank: int, padding: str, dilation: int) -> None:
    kernel = sizes(rank, 2, 3, 2)  # an even kernel makes "same" one-sided
    shapes = [(2, 2, *sizes(rank, 7, 8, 5)), (3, 2, *kernel), (3,)]
    same(lambda x, w, b: CONV[rank](x, w, b, padding=padding, dilation=dilation), *shapes, op=NAMED[rank])


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1, "output_padding": 1}, {"groups": 2, "stride": 2}, {"dilation": 2}],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False])
def test_conv_transpose(rank: int, options: dict[str, int], bias: bool) -> None:
    g = options.get("groups", 1)
    shapes = [(2, 2 * g, *sizes(rank, 4, 3, 3)), (2 * g, 3, *sizes(rank, 3, 2, 2))]
    shapes += [(3 * g,)] if bias else []
    same(lambda x, w, b=None: TRANSPOSE[rank](x, w, b, **options), *shapes, op=TRANSPOSE_OP[rank])


@pytest.mark.parametrize("transposed", [True, False])
def test_convolution_itself(transposed: bool) -> None:
    def f(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return aten.convolution.default(x, w, b, [2, 1], [1, 0], [1, 2], transposed, [0, 0], 1)

    same(f, (2, 3, 6, 5), (3, 3, 3, 2), (3,), op=aten.convolution.default)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("active", ["x", "w", "b", "xw", "xb", "wb"])
def test_conv_with_some_arguments_constant(active: str, stride: int, transposed: bool) -> None:
    """What does not depend on the parameters is skipped: the first layer's input, a frozen weight."""
    f = F.conv_transpose2d if transposed else F.conv2d
    shapes = {"x": (3, 2, 5, 6), "w": (2, 4, 3, 2) if transposed else (4, 2, 3, 2), "b": (4,)}
    values = {name: torch.randn(*s, dtype=torch.float64) for name, s in shapes.items()}
    batch = [value for name, value in values.items() if name not in active]
    names = [name for name in values if name not in active]

    def loss(p: Any, batch: list[torch.Tensor]) -> torch.Tensor:
        args = {**dict(zip(names, batch, strict=True)), **{name: 2 * torch.tanh(p[name]) for name in active}}
        y = f(args["x"], args["w"], args["b"], stride=stride)
        return (y**3).sum() / 6 + torch.sin(y).sum()

    params = {name: values[name] for name in active}
    check(params, loss, batch, rule=Convolution, truth=double_backward)


def test_layers_of_convolutions_share_a_weight() -> None:
    """A weight used twice, channels-last activations, and parameters written to directly."""

    def loss(p: Any, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(F.conv2d(x.to(memory_format=torch.channels_last), p["first"], p["b"], padding=1))
        x = torch.tanh(F.conv2d(x, p["w"], p["b"], padding=1))
        return F.conv2d(x, p["w"], stride=2).square().mean()

    params = {"first": torch.randn(4, 3, 3, 3), "w": torch.randn(4, 4, 3, 3), "b": torch.randn(4)}
    params = {name: p.double() for name, p in params.items()}
    check(params, loss, torch.randn(2, 3, 7, 7).double(), rule=Convolution, truth=double_backward)


def test_conv_without_batch_dimension_is_refused() -> None:
    with pytest.raises(UnsupportedOpError, match=r"aten.conv2d.default without a batch dimension"):
        same(lambda x, w: F.conv2d(x, w), (2, 5, 5), (3, 2, 2, 2), op=OP[2])
