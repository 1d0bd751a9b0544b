"""Norm kernels: every backend against torch.func on the definition, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sharpkern.kernels import norm

# rows, D, groups, inner: layer norm; group norm; batch norm with its channels as rows; numbers below, at and above 16
SHAPES = [(1, 1, 1, 1), (7, 3, 1, 1), (33, 64, 1, 1), (130, 65, 1, 1), (6, 20, 3, 5), (8, 34, 2, 17), (5, 130, 5, 130)]
MODES = [norm.FIXED, norm.RMS, norm.CENTRED]


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SHARPKERN_BACKEND", request.param)
    return str(request.param)


class Truth:
    """y(x, w, b) = standardise(x) w + b written with plain ops, and its derivatives by torch.func, one vector each."""

    def __init__(self, rows: int, D: int, groups: int, inner: int, mode: int) -> None:
        self.x = torch.randn(rows, D, dtype=torch.float64) * 2 + 0.5
        self.mode, channels = mode, groups * (D // inner)
        self.w, self.b = torch.randn(2, channels, dtype=torch.float64)
        row, number = torch.arange(rows)[:, None], torch.arange(D)
        self.channel = (row % groups) * (D // inner) + number // inner
        self.fixed = torch.randn(rows, 1, dtype=torch.float64), torch.rand(rows, 1, dtype=torch.float64) + 0.5
        mean, r = self.statistics(self.x)
        self.s = norm.Standardised((self.x - mean) * r, r[:, 0].contiguous(), groups, inner, mode)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.mode == norm.FIXED:
            return self.fixed
        mean = x.mean(1, keepdim=True) if self.mode == norm.CENTRED else torch.zeros_like(x[:, :1])
        return mean, ((x - mean).square().mean(1, keepdim=True) + 1e-3).rsqrt()

    def y(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        mean, r = self.statistics(x)
        return (x - mean) * r * w[self.channel] + b[self.channel]

    def pull(self, g: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(self.y, self.x, self.w, self.b)[1](g)

    def tangent(self, dx: Tensor, dw: Tensor, db: Tensor) -> Tensor:
        return torch.func.jvp(self.y, (self.x, self.w, self.b), (dx, dw, db))[1]

    def pull_tangent(self, dx: Tensor, dw: Tensor, g: Tensor, dg: Tensor) -> tuple[Tensor, ...]:
        def pull(x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(self.y, x, w, self.b)[1](g)

        return torch.func.jvp(pull, (self.x, self.w, g), (dx, dw, dg))[1]

    def cast(self, dtype: torch.dtype) -> tuple[norm.Standardised, Tensor]:
        return self.s._replace(xhat=self.s.xhat.to(dtype), r=self.s.r.to(dtype)), self.w.to(dtype)


def close(got: Tensor | None, want: Tensor, dtype: torch.dtype) -> None:
    assert got is not None
    assert got.dtype == dtype
    tol = 2e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(got.double(), want, rtol=tol, atol=tol * (1 + float(want.abs().max())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", MODES, ids=["fixed", "rms", "centred"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_sweeps_agree_with_torch_func(
    backend: str, shape: tuple[int, int, int, int], mode: int, dtype: torch.dtype
) -> None:
    t, k = Truth(*shape, mode), 3
    dx, dg = torch.randn(2, k, *t.x.shape, dtype=torch.float64)
    dw, db = torch.randn(2, k, len(t.w), dtype=torch.float64)
    g = torch.randn_like(t.x)
    s, w = t.cast(dtype)
    low = [d.to(dtype) for d in (dx, dw, db, dg)]
    dy, dxhat, along = norm.norm_tangent(s, w, *low[:3])
    parts = norm.norm_backward_tangent(s, w, low[1], dxhat, along, g.to(dtype), low[3], (True, True, True))
    linear = norm.norm_backward_tangent(s, w, None, None, None, None, low[3], (True, True, True))
    for i in range(k):
        close(dy[i], t.tangent(dx[i], dw[i], db[i]), dtype)
        want = t.pull_tangent(dx[i], dw[i], g, dg[i])
        for part, expected in zip(parts, want, strict=True):
            close(None if part is None else part[i], expected, dtype)
        for part, expected in zip(linear, t.pull(dg[i]), strict=True):
            close(None if part is None else part[i], expected, dtype)


@pytest.mark.parametrize(
    "moving", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
def test_operands_that_do_not_move(backend: str, moving: tuple[bool, bool, bool]) -> None:
    t = Truth(6, 20, 3, 5, norm.CENTRED)
    zero = [torch.zeros_like(p) for p in (t.x, t.w, t.b)]
    d = [torch.randn_like(p) if move else z for p, move, z in zip((t.x, t.w, t.b), moving, zero, strict=True)]
    given = [p[None] if move else None for p, move in zip(d, moving, strict=True)]
    g, dg = torch.randn(2, *t.x.shape, dtype=torch.float64)
    dy, dxhat, along = norm.norm_tangent(t.s, t.w, *given)
    assert (dxhat is None) == (not moving[0])
    close(dy[0], t.tangent(*d), torch.float64)
    want = t.pull_tangent(d[0], d[1], g, dg)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        parts = norm.norm_backward_tangent(t.s, t.w, given[1], dxhat, along, g, dg[None], needs)
        for part, needed, expected in zip(parts, needs, want, strict=True):
            assert (part is not None) == needed
            if part is not None:
                close(part[0], expected, torch.float64)


def test_absent_weight_counts_as_ones(backend: str) -> None:
    t = Truth(5, 18, 1, 1, norm.CENTRED)
    t.w.fill_(1)
    dx, g, dg = torch.randn(3, *t.x.shape, dtype=torch.float64)
    dy, dxhat, along = norm.norm_tangent(t.s, None, dx[None], None, None)
    close(dy[0], t.tangent(dx, torch.zeros_like(t.w), torch.zeros_like(t.b)), torch.float64)
    part = norm.norm_backward_tangent(t.s, None, None, dxhat, along, g, dg[None], (True, False, False))[0]
    want = t.pull_tangent(dx, torch.zeros_like(t.w), g, dg)[0]
    close(None if part is None else part[0], want, torch.float64)


def test_number_of_threads_does_not_change_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARPKERN_BACKEND", "cpu")
    t = Truth(300, 130, 1, 1, norm.CENTRED)
    s, w = t.cast(torch.float32)
    dx, dg = torch.randn(2, 2, *t.x.shape)
    dw = torch.randn(2, len(w))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            dy, dxhat, along = norm.norm_tangent(s, w, dx, dw, None)
            parts = norm.norm_backward_tangent(s, w, dw, dxhat, along, dx[0], dg, (True, True, True))
            results.append([dy, *parts])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
