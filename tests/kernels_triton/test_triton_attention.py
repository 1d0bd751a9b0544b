"""``triton_attention`` in the interpreter: against the definition in float64, and against torch's own derivatives."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sharpkern.kernels import attention as contract
from sharpkern.kernels import reference
from sharpkern.kernels.triton import attention as triton_attention

INF = math.inf
# of the largest number of a result; 16 bits: results, o and do are rounded, and on a GPU P and its like too
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Case(NamedTuple):
    T: int
    S: int
    d: int
    e: int
    k: int
    causal: bool
    mask: tuple[int, ...] | None  # its shape
    moving: str  # which of q, k and v
    dtype: torch.dtype = torch.float32


SHAPES = [
    Case(1, 1, 8, 8, 1, False, None, "qkv"),
    Case(1, 7, 8, 20, 2, True, None, "qkv"),
    Case(7, 1, 20, 8, 1, False, (7, 1), "qkv"),
    Case(63, 65, 20, 8, 2, False, (63, 65), "qkv"),
    Case(65, 63, 8, 20, 1, True, (2, 1, 63), "qkv"),
    Case(130, 65, 64, 20, 1, True, None, "qkv"),
    Case(65, 130, 20, 64, 1, True, (2, 65, 130), "qkv"),
    Case(63, 7, 64, 128, 1, False, (7,), "qkv"),
    Case(7, 65, 100, 20, 1, False, None, "qkv"),
]
ABSENT = [Case(7, 33, 8, 20, 2, True, (7, 33), moving) for moving in ("q", "k", "v", "qk", "qv", "kv")]
LOW = [
    Case(63, 65, 20, 8, 2, False, (63, 65), "qkv", dtype)._replace(causal=causal)
    for dtype in (torch.bfloat16, torch.float16)
    for causal in (False, True)
]


def name(case: Case) -> str:
    return "-".join(str(part) for part in case)


def close(got: Tensor, want: Tensor, dtype: torch.dtype, what: str) -> None:
    """``<=``, so that NaN fails."""
    error, size = (got.double() - want).abs().max().item(), max(want.abs().max().item(), 1.0)  # with one key gq is 0
    assert error <= TOLERANCE[dtype] * size, f"{what}: off by {error:.2g} of {size:.2g}"


def scattered(*shape: int) -> Tensor:
    """Random numbers, not contiguous."""
    return torch.randn(*shape, 2)[..., 1]


def inputs(case: Case, device: str) -> dict[str, Tensor | None]:
    """q, k, v, mask, tangents, cotangents. A mask forbids its row 0 everything, or if it has one row, key 0 to all."""
    B, T, S, d, e = 2, case.T, case.S, case.d, case.e
    shapes = {"q": (B, T, d), "k": (B, S, d), "v": (B, S, e)}
    numbers: dict[str, Tensor | None] = {n: scattered(*shape) for n, shape in shapes.items()}
    for n, shape in shapes.items():
        numbers["d" + n] = scattered(case.k, *shape) if n in case.moving else None
    numbers |= {"g": scattered(B, T, e), "dg": scattered(case.k, B, T, e), "gs": scattered(case.k, B, T, e)}
    numbers["mask"] = None
    if case.mask is not None:
        mask = scattered(*case.mask)
        mask[torch.rand_like(mask) < 0.2] = -INF
        if len(case.mask) > 1 and case.mask[-2] > 1:
            mask[..., 0, :] = -INF
        else:
            mask[..., 0] = -INF
        numbers["mask"] = mask
    return {n: None if t is None else t.to(device, case.dtype) for n, t in numbers.items()}


@pytest.mark.parametrize("case", SHAPES + ABSENT + LOW, ids=name)
def test_four_sweeps_agree_with_the_definition(device: str, case: Case) -> None:
    torch.manual_seed(0)
    n = inputs(case, device)
    w = {key: None if t is None else t.double() for key, t in n.items()}
    h = triton_attention.attention(n["q"], n["k"], n["v"], n["mask"], case.causal, 0.3)
    H = reference.attention(w["q"], w["k"], w["v"], w["mask"], case.causal, 0.3)
    do, m = triton_attention.attention_tangent(h, n["dq"], n["dk"], n["dv"])
    DO, M = reference.attention_tangent(H, w["dq"], w["dk"], w["dv"])
    got = [h.o, do, m, *triton_attention.attention_backward(h, n["gs"])]
    want = [H.o, DO, M, *reference.attention_backward(H, w["gs"])]
    got += triton_attention.attention_backward_tangent(h, n["dq"], n["dk"], n["dv"], do, m, n["g"], n["dg"])
    want += reference.attention_backward_tangent(H, w["dq"], w["dk"], w["dv"], DO, M, w["g"], w["dg"])
    assert h.lse.dtype == m.dtype == torch.float32
    torch.testing.assert_close(h.lse.double(), H.lse, rtol=1e-5, atol=1e-5)
    for a, b, what in zip(got, want, ["o", "do", "m", "gq", "gk", "gv", "dgq", "dgk", "dgv"], strict=True):
        assert a.dtype == (torch.float32 if what == "m" else case.dtype)
        close(a, b, case.dtype, what)


def test_query_that_sees_nothing_gives_zeros(device: str) -> None:
    n = inputs(Case(7, 9, 8, 8, 1, False, (7, 9), "qkv"), device)
    h = triton_attention.attention(n["q"], n["k"], n["v"], n["mask"], False, 0.3)
    do, m = triton_attention.attention_tangent(h, n["dq"], n["dk"], n["dv"])
    gq, _, _ = triton_attention.attention_backward(h, n["gs"])
    dgq, _, _ = triton_attention.attention_backward_tangent(h, n["dq"], n["dk"], n["dv"], do, m, n["g"], n["dg"])
    assert (h.lse[:, 0] == INF).all()
    for t in (h.o[None], do, m[..., None], gq, dgq):
        assert (t[:, :, 0] == 0).all()
        assert t.isfinite().all()


def test_tangents_are_those_of_plain_attention(device: str) -> None:
    """``torch.func.jvp`` of attention, and of its vector-Jacobian product."""
    torch.manual_seed(1)
    n = {k: t for k, t in inputs(Case(33, 41, 20, 8, 1, True, None, "qkv"), device).items() if t is not None}
    w = {key: t.double() for key, t in n.items()}
    forbidden = torch.ones(33, 41, dtype=torch.bool, device=device).triu(1)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax((0.3 * q @ k.mT).masked_fill(forbidden, -INF), -1) @ v

    def cotangents(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.func.vjp(plain, q, k, v)[1](g)

    primal, moving = [w[x] for x in "qkv"], [w["d" + x][0] for x in "qkv"]
    o, DO = torch.func.jvp(plain, tuple(primal), tuple(moving))
    G, DG = torch.func.jvp(cotangents, (*primal, w["g"]), (*moving, w["dg"][0]))

    h = triton_attention.attention(n["q"], n["k"], n["v"], None, True, 0.3)
    moves = n["dq"], n["dk"], n["dv"]
    do, m = triton_attention.attention_tangent(h, *moves)
    g = triton_attention.attention_backward(h, n["g"][None])
    dg = triton_attention.attention_backward_tangent(h, *moves, do, m, n["g"], n["dg"])
    for what, a, b in zip(["o", "do"] + list("qkvqkv"), (h.o[None], do, *g, *dg), (o, DO, *G, *DG), strict=True):
        close(a, b[None], torch.float32, what)


def test_dispatch_takes_it_when_forced_and_refuses_float64(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARPKERN_BACKEND", "triton")
    q = torch.randn(3, 2, 5, 8, device=device)
    h = contract.attention(*q, scale=0.5)
    assert h.o.equal(triton_attention.attention(*q, None, False, 0.5).o)
    with pytest.raises(RuntimeError, match="float64"):
        contract.attention(*q.double())
