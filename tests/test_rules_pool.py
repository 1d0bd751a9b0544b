"""Pooling in one to three dimensions, with and without a batch dimension, against reverse over reverse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_truth import check_op, double_backward

from sharpkern.rop.rules.pool import AdaptiveAvgPool, AdaptiveMaxPool, AvgPool, MaxPool1d, MaxPool2d, MaxPool3d

aten = torch.ops.aten
PIXELS = (7, 6, 5)
MAX = {1: MaxPool1d, 2: MaxPool2d, 3: MaxPool3d}


def shape(rank: int, batched: bool) -> tuple[int, ...]:
    return (*((2, 3) if batched else (3,)), *PIXELS[:rank])


def named(name: str, rank: int) -> Any:
    return getattr(aten, name.format(rank)).default


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 1}, {"kernel_size": 3, "stride": 2, "padding": 1}, {"ceil_mode": True}, {"dilation": 2}],
    ids=str,
)
def test_max_pool(rank: int, batched: bool, options: dict[str, Any]) -> None:
    """Overlapping windows add up in the backward sweep."""
    options = {"kernel_size": 2, **options}
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[rank]
    kernel = options.pop("kernel_size")
    program = check_op(
        lambda x: pool(x, kernel, **options), shape(rank, batched), rule=MAX[rank], truth=double_backward
    )
    assert program.fallback_ops == []


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("batched", [True, False])
def test_max_pool_with_indices(rank: int, batched: bool) -> None:
    op = named("max_pool{}d_with_indices", rank)
    check_op(
        lambda x: op(x, [2] * rank, [1] * rank)[0],
        shape(rank, batched), op=None if rank == 1 else op, rule=MAX[rank], truth=double_backward,
    )  # fmt: skip


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("size", [1, 3])
def test_adaptive_max_pool(rank: int, batched: bool, size: int) -> None:
    pool = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}[rank]
    check_op(lambda x: pool(x, size), shape(rank, batched), rule=AdaptiveMaxPool, truth=double_backward)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 1}, {"padding": 1}, {"padding": 1, "count_include_pad": False}, {"ceil_mode": True}],
    ids=str,
)
def test_avg_pool(rank: int, batched: bool, options: dict[str, Any]) -> None:
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[rank]
    check_op(
        lambda x: pool(x, 2, **options),
        shape(rank, batched), op=named("avg_pool{}d", rank), rule=AvgPool, truth=double_backward,
    )  # fmt: skip


@pytest.mark.parametrize("rank", [2, 3])
def test_avg_pool_with_a_divisor(rank: int) -> None:
    pool = {2: F.avg_pool2d, 3: F.avg_pool3d}[rank]
    check_op(lambda x: pool(x, 2, divisor_override=3), shape(rank, True), rule=AvgPool, truth=double_backward)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_adaptive_avg_pool(rank: int, batched: bool, size: int) -> None:
    pool = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[rank]
    check_op(
        lambda x: pool(x, size),
        shape(rank, batched),
        op=named("adaptive_avg_pool{}d", rank),
        rule=AdaptiveAvgPool,
        truth=double_backward,
    )


def test_pools_of_channels_last() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        x = x.to(memory_format=torch.channels_last)
        return F.adaptive_avg_pool2d(torch.tanh(F.avg_pool2d(F.max_pool2d(x, 2, 1), 2, 1)), (2, 1))

    check_op(f, (2, 3, 7, 6), rule=MaxPool2d, truth=double_backward)
