"""Attention kernels: every backend against torch.func on plain attention, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sharpkern.kernels import attention as kernels
from sharpkern.kernels.cpu import blocked_attention

ROWS, HEADS = 8, 3  # of the tests' blocks
# heads, T, S, d, e: one of all; blocks not full, full, and full with a rest; T above and below S; e != d
SIZES = [(1, 1, 1, 1, 1), (2, 5, 5, 3, 3), (3, 8, 8, 4, 6), (4, 9, 9, 5, 2), (2, 17, 11, 4, 4), (7, 7, 25, 2, 3)]


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SHARPKERN_BACKEND", request.param)
    monkeypatch.setattr(blocked_attention, "ROWS", ROWS)
    return str(request.param)


class Truth:
    """o(q, k, v) written with plain ops, and its derivatives by torch.func, one vector each."""

    def __init__(
        self,
        sizes: tuple[int, int, int, int, int],
        causal: bool = False,
        mask: Tensor | None = None,
        scale: float = 0.4,
    ) -> None:
        B, T, S, d, e = sizes
        self.point = tuple(torch.randn(B, *shape, dtype=torch.float64) for shape in ((T, d), (S, d), (S, e)))
        self.mask, self.causal, self.scale = mask, causal, scale
        self.g = torch.randn(B, T, e, dtype=torch.float64)

    def o(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.scale * q @ k.mT
        if self.mask is not None:
            scores = scores + self.mask
        if self.causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
        blind = (scores == -math.inf).all(-1, keepdim=True)
        return torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0) @ v

    def pull(self, g: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(self.o, *self.point)[1](g)

    def tangent(self, tangents: tuple[Tensor, ...]) -> Tensor:
        return torch.func.jvp(self.o, self.point, tangents)[1]

    def pull_tangent(self, tangents: tuple[Tensor, ...], dg: Tensor) -> tuple[Tensor, ...]:
        def pull(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(self.o, q, k, v)[1](g)

        return torch.func.jvp(pull, (*self.point, self.g), (*tangents, dg))[1]

    def check(self, k: int, moving: tuple[bool, bool, bool] = (True, True, True), dtype: Any = torch.float64) -> None:
        """Run all four kernels on k vectors and compare everything."""
        B, T, _ = self.g.shape
        moves = [
            torch.randn(k, *t.shape, dtype=torch.float64) * move for t, move in zip(self.point, moving, strict=True)
        ]
        dg = torch.randn(k, *self.g.shape, dtype=torch.float64)
        given = [d.to(dtype) if move else None for d, move in zip(moves, moving, strict=True)]
        mask = None if self.mask is None else self.mask.to(dtype)
        h = kernels.attention(*(t.to(dtype) for t in self.point), mask, self.causal, self.scale)
        do, m = kernels.attention_tangent(h, *given)
        gs = kernels.attention_backward(h, dg.to(dtype))
        dgs = kernels.attention_backward_tangent(h, *given, do, m, self.g.to(dtype), dg.to(dtype))
        assert m.shape == (k, B, T)
        close(h.o, self.o(*self.point), dtype)
        for i in range(k):
            tangents = tuple(d[i] for d in moves)
            close(do[i], self.tangent(tangents), dtype)
            for got, want in zip(gs, self.pull(dg[i]), strict=True):
                close(got[i], want, dtype)
            for got, want in zip(dgs, self.pull_tangent(tangents, dg[i]), strict=True):
                close(got[i], want, dtype)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    tol = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=0.0, atol=tol * (float(want.abs().max()) or 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_all_sweeps_agree_with_torch_func(
    backend: str,
    sizes: tuple[int, int, int, int, int],
    causal: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocked_attention, "ELEMENTS", HEADS * ROWS * sizes[2])
    truth = Truth(sizes, causal)
    truth.check(1, dtype=dtype)
    truth.check(3, dtype=dtype)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", [(17, 11), (1, 11), (17, 1), (1, 17, 11), (4, 1, 11), (4, 17, 11)], ids=str)
def test_masks_and_a_row_that_sees_nothing(backend: str, shape: tuple[int, ...], causal: bool) -> None:
    mask = torch.randn(shape, dtype=torch.float64)
    if shape[-1] > 1:
        mask.masked_fill_(torch.rand(shape) < 0.3, -math.inf)
        mask[..., 0] = 0.0
    if shape[-2] > 1:
        mask[..., 9, :] = -math.inf
    truth = Truth((4, 17, 11, 3, 5), causal, mask)
    truth.check(2)
    h = kernels.attention(*truth.point, mask, causal, truth.scale)
    if shape[-2] > 1:
        assert bool((h.lse[:, 9] == math.inf).all())
        assert not h.o[:, 9].any()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    "moving",
    [(False, True, True), (True, False, True), (True, True, False), (True, False, False), (False, True, False),
     (False, False, True)],
    ids=str,
)  # fmt: skip
def test_operands_that_do_not_move(backend: str, moving: tuple[bool, bool, bool], k: int) -> None:
    Truth((2, 9, 9, 3, 4), True).check(k, moving)


def test_sixteen_bits_are_summed_in_float32(backend: str) -> None:
    truth = Truth((2, 17, 11, 4, 4))
    truth.check(1, dtype=torch.bfloat16)
    h = kernels.attention(*(t.bfloat16() for t in truth.point), None, False, truth.scale)
    assert h.lse.dtype == torch.float32


def test_large_scores_do_not_overflow(backend: str) -> None:
    shift = torch.linspace(-1000, 1000, 17, dtype=torch.float64)[:, None]
    Truth((2, 17, 17, 8, 4), True, shift).check(1)


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest memory that any result has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(result):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return result


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_no_tensor_has_T_times_S_elements_for_a_head(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARPKERN_BACKEND", "cpu")
    B, T, d = 2, 2048, 16
    q, k, v, g = torch.randn(4, B, T, d).unbind()
    dq, dk, dv, dg = torch.randn(4, 1, B, T, d).unbind()
    mask = torch.randn(1, T) if masked else None
    with LargestTensor() as largest:
        h = kernels.attention(q, k, v, mask, True, 0.25)
        do, m = kernels.attention_tangent(h, dq, dk, dv)
        kernels.attention_backward(h, g[None])
        kernels.attention_backward_tangent(h, dq, dk, dv, do, m, g, dg)
    assert largest.elements < T * T // 3


def test_same_input_gives_the_same_bits(backend: str) -> None:
    truth = Truth((3, 17, 17, 4, 4), True)
    q, k, v = (t.float() for t in truth.point)
    runs = []
    for _ in range(2):
        h = kernels.attention(q, k, v, None, True, 0.5)
        runs.append([h.o, *kernels.attention_backward(h, truth.g.float()[None])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_without_keys_see_nothing(causal: bool) -> None:
    """Empty operands go to the reference, but the blocks by themselves know them too."""
    q, k, v, g = torch.randn(2, 3, 4), torch.randn(2, 0, 4), torch.randn(2, 0, 5), torch.randn(2, 2, 3, 5)
    heads = blocked_attention.attention(q, k, v, None, causal, 0.5)
    assert torch.equal(heads.o, torch.zeros(2, 3, 5)) and bool((heads.lse == math.inf).all())
    gq, gk, gv = blocked_attention.attention_backward(heads, g)
    assert torch.equal(gq, torch.zeros(2, 2, 3, 4)) and gk.shape == (2, 2, 0, 4) and gv.shape == (2, 2, 0, 5)
