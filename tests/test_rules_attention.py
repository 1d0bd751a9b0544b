"""Attention: masks, scales, grouped queries, dropout, odd shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rule_truth import check_op, double_backward
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sharpkern as sk
from sharpkern.rop.rules import attention
from sharpkern.rop.rules.attention import Attention


@pytest.fixture(autouse=True, params=["kept", "blocked"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run every case with the probabilities kept and with them formed in blocks."""
    if request.param == "blocked":
        monkeypatch.setattr(attention, "MAX_KEPT", 0)
    return str(request.param)


def attend(*shapes: tuple[int, ...], **options) -> None:
    with sdpa_kernel(SDPBackend.MATH):  # for the truth: flash attention has no second derivative
        check_op(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options),
            *shapes,
            rule=Attention,
            truth=double_backward,
        )


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4)),
        ((1, 2, 3, 4), (1, 2, 6, 4), (1, 2, 6, 5)),
        ((2, 1, 1, 3), (2, 1, 7, 3), (2, 1, 7, 3)),
        ((3, 5, 2), (3, 4, 2), (3, 4, 3)),
    ],
    ids=str,
)
def test_plain_attention(shapes) -> None:
    attend(*shapes)


@pytest.mark.parametrize("lengths", [(5, 5), (3, 6), (6, 3)], ids=str)
def test_causal_attention(lengths: tuple[int, int]) -> None:
    q, k = lengths
    attend((2, 2, q, 4), (2, 2, k, 4), (2, 2, k, 4), is_causal=True, scale=0.3)


@pytest.mark.parametrize("shape", [(5, 6), (2, 1, 5, 6), (2, 3, 5, 6)], ids=str)
def test_masked_attention(shape: tuple[int, ...]) -> None:
    shapes = ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 4))
    keep = torch.rand(shape) > 0.4
    keep[..., 0] = True
    attend(*shapes, attn_mask=keep)
    attend(*shapes, attn_mask=torch.randn(shape, dtype=torch.float64))


def test_broadcasting_batch_dimensions() -> None:
    attend((2, 3, 5, 4), (1, 3, 6, 4), (2, 1, 6, 3))
    keep = torch.rand(2, 1, 5, 6) > 0.4
    keep[..., 0] = True
    attend((1, 3, 5, 4), (2, 3, 6, 4), (2, 1, 6, 4), attn_mask=keep)
    keep = torch.rand(2, 1, 1, 6) > 0.4  # padding
    keep[..., 0] = True
    attend((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 4), attn_mask=keep)


@pytest.mark.parametrize(
    ("shape", "options", "blocks"),
    [
        ((1, 1, 512, 2), {}, False),
        ((1, 1, 513, 2), {}, True),
        ((1, 1, 256, 2), {"causal": True}, False),
        ((1, 1, 257, 2), {"causal": True}, True),
        ((1, 1, 257, 2), {"causal": True, "dropout": 0.5}, False),
        ((80, 1, 512, 2), {}, True),
    ],
    ids=str,
)
def test_long_sequences_take_the_blocks(
    shape: tuple[int, ...], options: dict[str, float], blocks: bool, way: str
) -> None:
    q = torch.randn(shape)
    op = Attention(torch.ops.aten.scaled_dot_product_attention.default, (True, True, True))
    op.forward(q, q, q, **options)
    forced = way == "blocked" and "dropout" not in options
    assert isinstance(op.way, attention.Blocked if blocks or forced else attention.Kept)


def test_grouped_queries() -> None:
    attend((2, 6, 4, 3), (2, 2, 5, 3), (2, 2, 5, 3), enable_gqa=True)
    attend((1, 4, 4, 3), (1, 1, 4, 3), (1, 1, 4, 3), enable_gqa=True, is_causal=True)


def test_row_that_may_attend_to_nothing_gives_zero() -> None:
    keep = torch.ones(3, 4, dtype=torch.bool)
    keep[1] = False
    q, k, v = (torch.randn(1, 1, n, 2, dtype=torch.float64) for n in (3, 4, 4))
    H = sk.HessianOperator(
        None,
        lambda p, b: F.scaled_dot_product_attention(p["q"], p["k"], p["v"], attn_mask=keep).pow(2).sum(),
        torch.zeros(1, dtype=torch.float64),
        params={"q": q, "k": k, "v": v},
    )
    assert H.gradient.isfinite().all()
    assert torch.equal(H.gradient[2:4], torch.zeros(2, dtype=torch.float64))
    assert (H @ torch.randn(H.n, dtype=torch.float64)).isfinite().all()


def test_dropout_of_attention_keeps_its_mask() -> None:
    def loss(p: dict[str, Tensor], _: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(p["q"], p["k"], p["v"], dropout_p=0.25).pow(3).sum()

    params = {name: torch.randn(1, 2, 5, 3, dtype=torch.float64) for name in "qkv"}
    H = sk.HessianOperator(None, loss, torch.zeros(1, dtype=torch.float64), params=params)
    dense = H @ torch.eye(H.n, dtype=torch.float64)
    assert float((dense - dense.T).abs().max() / dense.abs().max()) <= 1e-12
    shift, v = 1e-6, torch.randn(H.n, dtype=torch.float64)
    mask = next(step.rule for step in H._engine.program.live if isinstance(step.rule, Attention)).way.D
    assert mask.unique().tolist() == [0.0, 1 / 0.75]

    def gradient(sign: float) -> Tensor:  # the same mask by hand, on the math path
        moved = [
            (params[n] + sign * shift * part.view_as(params[n])).requires_grad_()
            for n, part in zip("qkv", v.split(30), strict=True)
        ]
        q, k, value = moved
        out = (torch.softmax(q @ k.mT / 3**0.5, -1) * mask) @ value
        return torch.cat([g.flatten() for g in torch.autograd.grad(out.pow(3).sum(), moved)])

    truth = (gradient(1) - gradient(-1)) / (2 * shift)
    assert float((H @ v - truth).norm() / truth.norm()) <= 1e-7


@pytest.mark.parametrize("boolean", [True, False], ids=["boolean", "float"])
@pytest.mark.parametrize(
    "where",
    ["nowhere", "query", "hidden query", "hidden key", "hidden value", "infinite query", "minus infinite scores"],
)
def test_only_rows_that_the_mask_hides_become_zero_and_nan_stays_nan(where: str, boolean: bool) -> None:
    keep = torch.rand(5, 6) > 0.4
    keep[:, 0], keep[1], keep[:, 4] = True, False, False
    mask = keep if boolean else torch.zeros(5, 6, dtype=torch.float64).masked_fill(~keep, -torch.inf)
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (5, 6, 6))
    tensor, row = {"query": (q, 0), "hidden query": (q, 1), "hidden key": (k, 4), "hidden value": (v, 4)}.get(
        where, (q, 2)
    )
    if where != "nowhere":
        tensor[0, 1, row, 2] = torch.inf if "infinite" in where else torch.nan
    if "infinite" in where:  # a score of +inf makes the row NaN; a row whose seen scores are all -inf becomes zeros
        k[0, 1, :, 2] = k[0, 1, :, 2].abs() * (-1 if where.startswith("minus") else 1)
    with sdpa_kernel(SDPBackend.MATH):
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert bool(want.isnan().any()) == (where not in ("nowhere", "minus infinite scores"))
    assert torch.equal(want[1, 0, 1], torch.zeros(4, dtype=torch.float64))
    rule = Attention(torch.ops.aten.scaled_dot_product_attention.default, (True, True, True))
    torch.testing.assert_close(rule.forward(q, k, v, mask), want, rtol=1e-12, atol=1e-12, equal_nan=True)
