"""Norm rules: every affine form, group count and mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from rule_truth import check, check_op, double_backward
from torch import Tensor

from sharpkern.rop.rule import Rule
from sharpkern.rop.rules.norm import BatchNorm, GroupNorm, LayerNorm, RMSNorm

TRUTH = {"truth": double_backward}  # jvp(jacrev) of layer norm is silently wrong in torch 2.13


@pytest.mark.parametrize("affine", ["both", "weight", "none"])
@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5), (5,), (3, 2)], ids=str)
def test_layer_norm(shape: tuple[int, ...], affine: str) -> None:
    d = shape[-1]
    shapes = {"both": (shape, (d,), (d,)), "weight": (shape, (d,)), "none": (shape,)}[affine]
    check_op(lambda x, *wb: F.layer_norm(x, (d,), *wb, eps=0.1), *shapes, rule=LayerNorm, **TRUTH)


def test_layer_norm_over_two_dimensions() -> None:
    check_op(lambda x, w, b: F.layer_norm(x, (3, 4), w, b), (2, 3, 4), (3, 4), (3, 4), rule=LayerNorm, **TRUTH)


@pytest.mark.parametrize("active", [(0,), (1,), (2,), (1, 2), (0, 2)], ids=str)
def test_layer_norm_with_some_arguments_active(active: tuple[int, ...]) -> None:
    fixed = [torch.randn(s, dtype=torch.float64) for s in ((3, 4), (4,), (4,))]
    params = {str(i): fixed[i].clone() for i in active}
    target = torch.randn(3, 4, dtype=torch.float64)

    def loss(p: dict[str, Tensor], _: object) -> Tensor:
        x, w, b = (2 * torch.tanh(p[str(i)]) if i in active else fixed[i] for i in range(3))
        return ((F.layer_norm(x, (4,), w, b) - target) ** 3).sum()

    check(params, loss, rule=LayerNorm, **TRUTH)


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("eps", [None, 0.2])
def test_rms_norm(shape: tuple[int, ...], weighted: bool, eps: float | None) -> None:
    shapes = (shape, (5,)) if weighted else (shape,)
    check_op(lambda x, *w: F.rms_norm(x, (5,), *w, eps=eps), *shapes, rule=RMSNorm, **TRUTH)


@pytest.mark.parametrize(
    ("norm", "rule"),
    [
        (lambda x, w: F.layer_norm(x, (5,), w), LayerNorm),
        (lambda x, w: F.rms_norm(x, (5,), w), RMSNorm),
        (lambda x, w: F.group_norm(x, 1, w), GroupNorm),
        (lambda x, w: F.batch_norm(x, None, None, w, training=True), BatchNorm),
    ],
    ids=["layer", "rms", "group", "batch"],
)
def test_norms_of_a_transposed_x(norm: Callable[[Tensor, Tensor], Tensor], rule: type[Rule]) -> None:
    # x = p' keeps p's strides; kernels read the saved rows by address.
    check_op(lambda p, w: norm(p.t(), w), (5, 4), (5,), rule=rule, **TRUTH)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("shape", [(2, 4, 3, 2), (3, 4, 5), (2, 4, 1, 2)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm(shape: tuple[int, ...], groups: int, affine: bool) -> None:
    shapes = (shape, (4,), (4,)) if affine else (shape,)
    check_op(lambda x, *wb: F.group_norm(x, groups, *wb, eps=0.1), *shapes, rule=GroupNorm, **TRUTH)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2), (2, 3, 4, 3)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm(shape: tuple[int, ...], training: bool, affine: bool) -> None:
    mean, var = torch.randn(3).double(), torch.rand(3).double() + 0.5

    def norm(x: Tensor, *wb: Tensor) -> Tensor:
        return F.batch_norm(x, mean.clone(), var.clone(), *wb, training=training, eps=0.1)

    shapes = (shape, (3,), (3,)) if affine else (shape,)
    check_op(norm, *shapes, rule=BatchNorm, **TRUTH)


def test_batch_norm_without_running_statistics() -> None:
    check_op(lambda x: F.batch_norm(x, None, None, training=True), (4, 3, 2), rule=BatchNorm, **TRUTH)


@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm(affine: bool) -> None:
    shapes = ((2, 3, 5), (3,), (3,)) if affine else ((2, 3, 5),)
    check_op(lambda x, *wb: F.instance_norm(x, None, None, *wb), *shapes, **TRUTH)


def test_batch_norm_in_16_bits_keeps_statistics_in_32() -> None:
    x = 40 + torch.randn(64, 3, 5).bfloat16()
    rule = BatchNorm(torch.ops.aten._native_batch_norm_legit.no_stats, (True, False, False))
    rule.forward(x, None, None, True, 0.1, 1e-5)
    rows = x.double().transpose(0, 1).reshape(3, -1)
    want = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(rule.s.xhat.double(), want, rtol=1e-5, atol=1e-4)
