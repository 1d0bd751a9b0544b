"""Ops whose second derivative torch lacks become programs; each is compared with the same loss in other words."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from rule_truth import check, curved, double_backward
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpkern.rop.decompositions import explicit_attention


def weighted(y: Tensor) -> Tensor:
    """Weigh all entries differently, with second derivatives of their own."""
    w = torch.arange(1, y.numel() + 1, dtype=y.dtype).reshape(y.shape) / y.numel()
    return (w * y).sum() + (w * y * y).sum()


@pytest.mark.parametrize("p", [2.0])
def test_pairwise_distances(p: float) -> None:
    params = {"x": torch.randn(5, 3).double(), "y": torch.randn(4, 3).double()}
    program = check(
        params,
        lambda q, _: weighted(torch.cdist(curved(q["x"]), curved(q["y"]), p=p)),
        reference=lambda q, _: weighted(
            ((curved(q["x"])[:, None] - curved(q["y"])[None]).abs() ** p).sum(-1) ** (1 / p)
        ),
    )
    assert all("cdist" not in str(step.op) for step in program.steps)


def test_distances_within_a_matrix() -> None:
    i, j = torch.triu_indices(5, 5, 1)
    check(
        {"x": torch.randn(5, 3).double()},
        lambda q, _: weighted(F.pdist(curved(q["x"]))),
        reference=lambda q, _: weighted((curved(q["x"])[i] - curved(q["x"])[j]).square().sum(-1).sqrt()),
    )


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding", [None, 1])
@pytest.mark.parametrize("include_last", [False, True])
def test_embedding_bags_with_an_empty_bag(mode: str, padding: int | None, include_last: bool) -> None:
    indices = torch.tensor([0, 1, 2, 3, 1, 4, 4])
    offsets = [0, 3, 3] + [7] * include_last
    spans = [(0, 3), (3, 3), (3, 7)]

    def plain(q, _):
        bags = []
        for start, stop in spans:
            rows = [curved(q["w"])[i] for i in indices[start:stop].tolist() if i != padding]
            total = sum(rows, torch.zeros(3, dtype=torch.float64))
            bags.append(total / max(1, len(rows)) if mode == "mean" else total)
        return weighted(torch.stack(bags))

    check(
        {"w": torch.randn(6, 3).double()},
        lambda q, _: weighted(
            F.embedding_bag(
                indices,
                curved(q["w"]),
                torch.tensor(offsets),
                mode=mode,
                padding_idx=padding,
                include_last_offset=include_last,
            )
        ),
        reference=plain,
    )


def test_embedding_bag_with_weights() -> None:
    indices = torch.tensor([[0, 1], [2, 2], [4, 0]])
    check(
        {"w": torch.randn(6, 3).double(), "s": torch.randn(3, 2).double()},
        lambda q, _: weighted(F.embedding_bag(indices, curved(q["w"]), mode="sum", per_sample_weights=curved(q["s"]))),
        reference=lambda q, _: weighted((curved(q["w"])[indices] * curved(q["s"])[..., None]).sum(1)),
    )


def tent(t: Tensor) -> Tensor:
    return (1 - t.abs()).clamp(min=0)


def cubic(t: Tensor) -> Tensor:
    """Keys' convolution kernel with a = -3/4, as torch has it."""
    a, t = -0.75, t.abs()
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * (t**3 - 5 * t**2 + 8 * t - 4)
    return torch.where(t <= 1, near, torch.where(t < 2, far, 0.0))


def sampled(image: Tensor, grid: Tensor, kernel: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum over all pixels, each weighed by its distance from the point: zero outside, corners not aligned."""

    def weights(x: Tensor, size: int) -> Tensor:
        return kernel(((x + 1) * size - 1)[..., None] / 2 - torch.arange(size))

    rows, columns = image.shape[2:]
    return torch.einsum("bchw,bijh,bijw->bcij", image, weights(grid[..., 1], rows), weights(grid[..., 0], columns))


@pytest.mark.parametrize(("mode", "kernel"), [("bilinear", tent), ("bicubic", cubic)])
def test_grid_sample(mode: str, kernel: Callable[[Tensor], Tensor]) -> None:
    params = {"image": torch.randn(2, 2, 5, 4).double(), "grid": torch.randn(2, 3, 3, 2).double()}
    check(
        params,
        lambda q, _: weighted(F.grid_sample(curved(q["image"]), 0.4 * curved(q["grid"]), mode, align_corners=False)),
        reference=lambda q, _: weighted(sampled(curved(q["image"]), 0.4 * curved(q["grid"]), kernel)),
    )


@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_a_learned_mask(causal: bool) -> None:
    params = {name: torch.randn(2, 4, 3).double() for name in "qkv"} | {"m": torch.randn(4, 4).double()}
    forbid = torch.ones(4, 4, dtype=torch.bool).triu(1) & causal

    def plain(p, _):
        q, k, v = (curved(p[name]) for name in "qkv")
        scores = (q @ k.mT / math.sqrt(3) + curved(p["m"])).masked_fill(forbid, -math.inf)
        return weighted(torch.softmax(scores, -1) @ v)

    check(
        params,
        lambda p, _: weighted(
            F.scaled_dot_product_attention(
                *(curved(p[name]) for name in "qkv"), attn_mask=curved(p["m"]).masked_fill(forbid, -math.inf)
            )
        ),
        reference=plain,
    )


def test_a_learned_mask_in_which_a_row_sees_nothing() -> None:
    params = {name: torch.randn(2, 4, 3).double() for name in "qkv"} | {"m": torch.randn(4, 4).double()}
    dead = torch.zeros(4, 4, dtype=torch.bool)
    dead[1] = True

    def plain(p, _):
        q, k, v = (curved(p[name]) for name in "qkv")
        rows = torch.softmax(q @ k.mT / math.sqrt(3) + curved(p["m"]), -1) @ v
        return weighted(rows * (~dead[:, :1]))

    check(
        params,
        lambda p, _: weighted(
            F.scaled_dot_product_attention(
                *(curved(p[name]) for name in "qkv"), attn_mask=curved(p["m"]).masked_fill(dead, -math.inf)
            )
        ),
        reference=plain,
    )


@pytest.mark.parametrize("n", [1, 2, 5, 8, 13])
def test_products_and_running_products_with_zeros(n: int) -> None:
    x = torch.randn(n, 3).double()
    x[n // 2, 0] = 0.0
    x[0, 1] = x[-1, 1] = 0.0

    def shifted(q):
        return q["x"] + q["x"].square()  # zero where x is

    for f in (
        lambda y: y.prod(0),
        lambda y: y.prod(1, keepdim=True),
        lambda y: y.prod(),
        lambda y: y.cumprod(0),
        lambda y: y.T.cumprod(-1),
    ):
        check({"x": x}, lambda q, _, f=f: weighted(f(shifted(q))), truth=double_backward, values=1)


@pytest.mark.parametrize("hidden", ["query", "key"])
def test_explicit_attention_does_not_hide_a_nan_behind_its_mask(hidden: str) -> None:
    keep = torch.ones(3, 4, dtype=torch.bool)
    keep[1], keep[:, 2] = False, False
    q, k, v = (torch.randn(1, 2, n, 2, dtype=torch.float64) for n in (3, 4, 4))
    (q[0, 1, 1] if hidden == "query" else k[0, 1, 2])[0] = torch.nan
    with sdpa_kernel(SDPBackend.MATH):
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
    got = explicit_attention(q, k, v, keep)
    assert want.isnan().any()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, equal_nan=True)
