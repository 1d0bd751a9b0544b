"""``triton_norm`` in the interpreter, against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sharpkern.kernels import reference
from sharpkern.kernels.saved import CENTRED, FIXED, RMS, Standardised
from sharpkern.kernels.triton import norm as triton_norm

MODES = (FIXED, RMS, CENTRED)
NEEDS = ((True, True, True), (True, False, False), (False, True, False), (False, False, True))
# rows, D, groups, inner: layer norms, group norms, batch norms
LAYOUTS = (
    (1, 1, 1, 1),
    (7, 63, 1, 1),
    (65, 7, 1, 1),
    (3, 130, 1, 1),
    (130, 7, 1, 1),
    (4, 63, 2, 7),
    (4, 130, 2, 65),
    (6, 14, 3, 1),
    (3, 130, 3, 130),
)


def double(x: object) -> object:
    """The same arguments in float64."""
    if isinstance(x, Standardised):
        return x._replace(xhat=x.xhat.double(), r=x.r.double())
    return x.double() if isinstance(x, Tensor) else x


def check(kernel: str, *args: object) -> None:
    """The kernel's results are the reference's, to the rounding of the results and of float32 sums."""
    got = getattr(triton_norm, kernel)(*args)
    want = getattr(reference, kernel)(*map(double, args))
    dtype = args[0].xhat.dtype
    eps = torch.finfo(dtype).eps
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert a.dtype == dtype
            assert a.shape == b.shape
            assert a.is_contiguous()
            torch.testing.assert_close(a.double(), b, rtol=4 * eps, atol=16 * eps * max(1, float(b.abs().max())))


def inputs(layout: tuple[int, ...], mode: int, k: int, device: str, dtype: torch.dtype) -> tuple[object, ...]:
    """A primal, then w, dw, db, dx, g, dg, dxhat and along; those that need not be contiguous are not."""
    rows, D, groups, inner = layout
    x = torch.randn(rows, D, dtype=torch.float64)
    if mode == CENTRED:
        x = x - x.mean(1, True)
    r = torch.rsqrt(x.square().mean(1) + 1e-2)
    s = Standardised((x * r[:, None]).to(device, dtype), r.to(device, dtype), groups, inner, mode)
    w, dw, db = (torch.randn(n, s.channels, 2).to(device, dtype)[..., 0] for n in (1, k, k))
    dx, g, dg = (torch.randn(n, D, rows).to(device, dtype).mT for n in (k, 1, k))
    dxhat, along = torch.randn(k, rows, D).to(device, dtype), torch.randn(k, rows).to(device, dtype)
    return s, w[0].contiguous(), dw, db, dx, g[0], dg, dxhat, along


def loop(monkeypatch: pytest.MonkeyPatch, held: int, tile: int) -> None:
    """Let rows of more than ``held`` numbers be long ones, in tiles of so many."""
    for name in ("HELD_TANGENT", "HELD_BACKWARD"):
        monkeypatch.setattr(triton_norm, name, {"aligned": held, "ragged": held})
    monkeypatch.setattr(triton_norm, "LONG_TILE", tile)


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [*((mode, torch.float32) for mode in MODES), (CENTRED, torch.bfloat16), (CENTRED, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_moves(device: str, layout: tuple[int, ...], mode: int, dtype: torch.dtype) -> None:
    s, w, dw, db, dx, g, dg, dxhat, along = inputs(layout, mode, 3, device, dtype)
    check("norm_tangent", s, w, dx, dw, db)
    check("norm_backward_tangent", s, w, dw, dxhat, along, g, dg, (True, True, True))


@pytest.mark.parametrize(("mode", "long"), [(FIXED, False), (RMS, False), (CENTRED, False), (CENTRED, True)])
def test_absent_operands(device: str, mode: int, long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if long:
        loop(monkeypatch, held=4, tile=2048)
    s, w, dw, db, dx, g, dg, dxhat, along = inputs((3, 6, 1, 2), mode, 1, device, torch.float32)
    weights = (w, None)
    for weight, a, b, c in itertools.product(weights, (dx, None), (dw, None), (db, None)):
        if not (a is b is c is None):
            check("norm_tangent", s, weight, a, b, c)
    for weight, needs in itertools.product(weights, NEEDS):
        check("norm_backward_tangent", s, weight, None, None, None, None, dg, needs)
        for moved, changed in itertools.product(((dxhat, along), (None, None)), (dw, None)):
            check("norm_backward_tangent", s, weight, changed, *moved, g, dg, needs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", [(2, 1300, 1, 1), (2, 650, 2, 130), (2, 1300, 2, 1300), (3, 300, 3, 3)])
def test_long_rows(device: str, layout: tuple[int, ...], mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loop(monkeypatch, held=256, tile=256)
    s, w, dw, db, dx, g, dg, dxhat, along = inputs(layout, mode, 2, device, torch.float32)
    check("norm_tangent", s, w, dx, dw, db)
    check("norm_backward_tangent", s, w, dw, dxhat, along, g, dg, (True, True, True))


@pytest.mark.parametrize("layout", [(39, 300, 1, 1), (39, 100, 3, 4), (6, 300, 3, 300)])
def test_gradients_from_stretches(device: str, layout: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that add up several tiles of rows, one of them fewer: right, and the same bits for every k."""
    monkeypatch.setattr(triton_norm, "STRETCHES", 3)
    s, w, dw, _, _, g, dg, dxhat, along = inputs(layout, CENTRED, 2, device, torch.float32)
    check("norm_backward_tangent", s, w, dw, dxhat, along, g, dg, (True, True, True))
    all_at_once = triton_norm.norm_backward_tangent(s, w, dw, dxhat, along, g, dg, (True, True, True))
    last = triton_norm.norm_backward_tangent(s, w, dw[1:], dxhat[1:], along[1:], g, dg[1:], (True, True, True))
    for a, b in zip(all_at_once, last, strict=True):
        assert torch.equal(a[1:], b)


def test_no_rows(device: str) -> None:
    s = Standardised(torch.ones(0, 5, device=device), torch.ones(0, device=device), 1, 1, CENTRED)
    y, dxhat, along = triton_norm.norm_tangent(s, None, torch.ones(2, 0, 5, device=device), None, None)
    assert (y.shape, dxhat.shape, along.shape) == ((2, 0, 5), (2, 0, 5), (2, 0))
    dg = torch.ones(2, 0, 5, device=device)
    gx, gw, gb = triton_norm.norm_backward_tangent(s, None, None, None, None, None, dg, (True, True, True))
    assert gx.shape == (2, 0, 5)
    assert torch.equal(gw, torch.zeros(2, 5, device=device)) and torch.equal(gb, gw)
