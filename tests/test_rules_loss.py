"""Loss and softmax rules: every reduction, weighting, masking and target form."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_truth import check, check_op, double_backward
from torch import Tensor

from sharpkern.rop.rules.loss import MSE, BinaryCrossEntropy, CrossEntropy
from sharpkern.rop.rules.softmax import LogSoftmax, Softmax

aten = torch.ops.aten
TRUTH = {"truth": double_backward}
SHAPES = {"[N, C]": (6, 4), "[C]": (4,), "[N, C, d]": (2, 4, 3), "[N, C, d, e]": (2, 4, 2, 3)}


def targets_for(shape: tuple[int, ...], soft: bool) -> Tensor:
    classes = shape[0] if len(shape) == 1 else shape[1]
    if soft:
        return torch.randn(shape, dtype=torch.float64).softmax(0 if len(shape) == 1 else 1)
    return torch.randint(0, classes, shape[:1] + shape[2:] if len(shape) > 1 else ())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("form", "soft", "weighted", "smoothing"),
    [
        *itertools.product(["[N, C]", "[N, C, d]"], [False, True], [False, True], [0.0, 0.2]),
        ("[C]", False, False, 0.0),
        ("[C]", True, True, 0.1),
        ("[N, C, d, e]", False, True, 0.1),
    ],
)
def test_cross_entropy(form: str, soft: bool, weighted: bool, smoothing: float, reduction: str) -> None:
    shape = SHAPES[form]
    target = targets_for(shape, soft)
    weight = torch.rand(4, dtype=torch.float64) + 0.3 if weighted else None
    check_op(
        lambda z: F.cross_entropy(z, target, weight, reduction=reduction, label_smoothing=smoothing),
        shape,
        rule=CrossEntropy,
        **TRUTH,
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_positions_have_no_influence(smoothing: float, reduction: str) -> None:
    target = torch.tensor([1, -100, 3, 0, -100, 2])
    weight = torch.rand(4, dtype=torch.float64) + 0.3
    for w, ignore in [(None, -100), (weight, -100), (weight, 3), (None, 255), (weight, 255)]:
        t = {-100: target, 3: target.clamp(min=0), 255: target.where(target >= 0, 255)}[ignore]
        check_op(
            lambda z, t=t, w=w, ignore=ignore: F.cross_entropy(
                z, t, w, ignore_index=ignore, reduction=reduction, label_smoothing=smoothing
            ),
            (6, 4),
            rule=CrossEntropy,
            **TRUTH,
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mean_squared_error_with_active_targets(reduction: str) -> None:
    check_op(lambda x, y: F.mse_loss(x, y, reduction=reduction), (3, 4), (3, 4), rule=MSE, **TRUTH)
    target = torch.randn(3, 4).double()
    check_op(lambda x: F.mse_loss(x, target, reduction=reduction), (3, 4), rule=MSE, **TRUTH)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("weighted", "positive"), list(itertools.product([False, True], repeat=2)))
def test_binary_cross_entropy_with_logits(weighted: bool, positive: bool, reduction: str) -> None:
    target = torch.rand(5, 3, dtype=torch.float64)
    weight = torch.rand(5, 3, dtype=torch.float64) if weighted else None
    q = torch.rand(3, dtype=torch.float64) + 0.5 if positive else None
    check_op(
        lambda z: F.binary_cross_entropy_with_logits(z, target, weight, reduction=reduction, pos_weight=q),
        (5, 3),
        rule=BinaryCrossEntropy,
        **TRUTH,
    )


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: F.huber_loss(x, y, delta=0.4),
        lambda x, y: F.smooth_l1_loss(x, y, beta=0.4),
        lambda x, y: F.l1_loss(x, y, reduction="sum") ** 2,
        lambda x, y: F.soft_margin_loss(x, y.sign()),
        lambda x, y: F.kl_div(x.log_softmax(1), y.softmax(1), reduction="batchmean"),
        lambda x, y: F.poisson_nll_loss(x, y.abs()),
        lambda x, y: F.nll_loss(x.log_softmax(1), y.argmax(1)),
        lambda x, y: F.binary_cross_entropy((x / 3).sigmoid(), y.sigmoid()),
        lambda x, y: F.cosine_embedding_loss(x, y, torch.ones(len(y), dtype=y.dtype)),
    ],
    ids=["huber", "smooth_l1", "l1", "soft_margin", "kl_div", "poisson", "nll", "bce", "cosine"],
)
def test_losses_made_of_other_rules(loss) -> None:
    target = torch.randn(4, 3, dtype=torch.float64)
    params = {"w": torch.randn(4, 5, dtype=torch.float64), "u": torch.randn(5, 3, dtype=torch.float64)}
    check(params, lambda p, y: loss(torch.tanh(p["w"]) @ p["u"], y), target, **TRUTH)


@pytest.mark.parametrize(("shape", "dim"), [((3, 5), 1), ((3, 5), 0), ((2, 3, 4), -2), ((5,), 0)], ids=str)
def test_softmax_and_log_softmax(shape: tuple[int, ...], dim: int) -> None:
    check_op(lambda x: torch.softmax(x, dim), shape, rule=Softmax, **TRUTH)
    check_op(lambda x: torch.log_softmax(x, dim), shape, rule=LogSoftmax, **TRUTH)


@pytest.mark.parametrize("cls", [MSE, BinaryCrossEntropy])
def test_mean_over_many_float16_rows_is_torchs_where_their_sum_is_infinite(cls: Any) -> None:
    op, f = {
        MSE: (aten.mse_loss.default, F.mse_loss),
        BinaryCrossEntropy: (aten.binary_cross_entropy_with_logits.default, F.binary_cross_entropy_with_logits),
    }[cls]
    x, t, d = 1 + torch.rand(70_000).half(), torch.zeros(70_000).half(), 1 + torch.rand(1, 70_000).half()
    needs = (True, False, False, False)[: sum("Tensor" in str(a.type) for a in op._schema.arguments)]
    rule = cls(op, needs)
    want = f(x, t)
    assert float((t + 1).sum()) == torch.inf
    torch.testing.assert_close(rule.forward(x, t), want, rtol=2e-3, atol=0)
    _, dwant = torch.func.jvp(lambda x: f(x, t.double()), (x.double(),), (d[0].double(),))
    got = rule.tangent(d, *[None] * (len(needs) - 1))
    assert got.dtype == torch.float16
    torch.testing.assert_close(got[0].double(), dwant, rtol=3e-3, atol=0)
