"""Pointwise, softmax, dual GEMM and embedding kernels: every backend against torch.func or plain sums, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sharpkern.kernels import embedding, linear, pointwise, softmax
from sharpkern.kernels.cpu import native

DTYPES = [torch.float32, torch.float64]


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SHARPKERN_BACKEND", request.param)
    return str(request.param)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    assert got.is_contiguous()
    tol = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=tol, atol=tol * (1 + float(want.abs().max())))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (63, 5), (4097,), (130, 300)], ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_slope_product(backend: str, k: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    slope, curvature = torch.randn(2, *shape, dtype=torch.float64)
    d, dz = torch.randn(2, k, *shape, 2, dtype=torch.float64)[..., 0]  # not contiguous
    low = [t.to(dtype) for t in (slope, d, curvature, dz)]
    close(pointwise.slope_product(*low[:2]), slope * d, dtype)
    close(pointwise.slope_product(*low), slope * d + curvature * dz, dtype)


ACTIVATIONS = {
    "gelu": lambda x: x * torch.special.ndtr(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": torch.tanh,
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "softplus": lambda x: torch.log1p(torch.exp(x)),
    "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (63, 5), (20001,)], ids=str)
def test_activation_derivatives(backend: str, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    f = ACTIVATIONS[name]
    x = (6 * torch.rand(*shape, 2, dtype=dtype) - 3)[..., 0]  # not contiguous; far out autograd cancels 1 - tanh^2
    x = torch.where(x.abs() < 0.1, torch.zeros_like(x), x)  # exact zeros: y / x is none there
    g = torch.randn(shape, dtype=dtype)
    point = x.double().requires_grad_()
    (first,) = torch.autograd.grad(f(point).sum(), point, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), point)
    close(pointwise.activation_slope(name, x, f(x.double()).to(dtype)), first.detach(), dtype)
    close(pointwise.activation_curvature(name, x, g), g.double() * second, dtype)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_derivatives_far_out(backend: str, name: str, dtype: torch.dtype) -> None:
    x = torch.tensor([-1e6, -300.0, 300.0, 1e6, 1e-40], dtype=dtype)
    y = torch.tensor([0.0, 0.0, 300.0, 1e6, 5e-41], dtype=dtype)  # only GELU reads it
    right, middle = {"tanh": (0, 1), "sigmoid": (0, 0.25), "mish": (1, 0.6)}.get(name, (1, 0.5))
    want = torch.tensor([0, 0, right, right, middle], dtype=torch.float64)
    close(pointwise.activation_slope(name, x, y), want, dtype)
    flat = pointwise.activation_curvature(name, x[:4], torch.ones(4, dtype=dtype))
    assert float(flat.abs().max()) <= 1e-100


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_a_number_has_no_slope(backend: str, name: str, dtype: torch.dtype) -> None:
    """Also within a stretch that is vectorised, and without a trace in its neighbours."""
    x = torch.randn(100, dtype=dtype)
    x[[3, 50, 99]] = torch.nan
    bad = x.isnan()
    for result in (
        pointwise.activation_slope(name, x, x),
        pointwise.activation_curvature(name, x, torch.ones_like(x)),
    ):
        assert torch.equal(result.isnan(), bad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softplus_is_a_line_from_twenty_on_as_torchs(backend: str, dtype: torch.dtype) -> None:
    x = torch.tensor([19.5, 20.0, 20.5, 30.0], dtype=dtype)
    point = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(torch.nn.functional.softplus(point).sum(), point)
    close(pointwise.activation_slope("softplus", x, x), slope.double(), dtype)
    bend = pointwise.activation_curvature("softplus", x, torch.ones_like(x))
    torch.testing.assert_close(bend[:2].double(), torch.exp(-x[:2].double()), rtol=1e-5, atol=0)
    assert bend[2:].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (65, 16), (33, 130), (40, 1000)], ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_softmax_sweeps(backend: str, k: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    z, g = torch.randn(2, *shape, dtype=torch.float64)
    dz, dg = torch.randn(2, k, *shape, dtype=torch.float64)
    weight = torch.rand(shape[0], dtype=torch.float64)
    p = z.softmax(1)

    def backward(z: Tensor, g: Tensor) -> Tensor:
        return torch.func.vjp(lambda z: z.softmax(1), z)[1](g)[0]

    dp, mean = softmax.softmax_jacobian(p.to(dtype), dz.to(dtype))
    weighted, _ = softmax.softmax_jacobian(p.to(dtype), dz.to(dtype), weight.to(dtype))
    inner = (g - (p * g).sum(1, keepdim=True)).to(dtype)
    got = softmax.softmax_backward_tangent(p.to(dtype), dp, inner, dg.to(dtype))
    for i in range(k):
        want = torch.func.jvp(lambda z: z.softmax(1), (z,), (dz[i],))[1]
        close(dp[i], want, dtype)
        close(weighted[i], want * weight[:, None], dtype)
        close(mean[i], (p * dz[i]).sum(1), dtype)
        close(got[i], torch.func.jvp(backward, (z, g), (dz[i], dg[i]))[1], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (65, 16), (33, 130), (40, 1000)], ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_log_softmax_sweeps(backend: str, k: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    z, g = torch.randn(2, *shape, dtype=torch.float64)
    dz, dg = torch.randn(2, k, shape[1], shape[0], dtype=torch.float64).mT  # not contiguous
    p = z.softmax(1)

    def backward(z: Tensor, g: Tensor) -> Tensor:
        return torch.func.vjp(lambda z: z.log_softmax(1), z)[1](g)[0]

    dl = softmax.log_softmax_jacobian(p.to(dtype), dz.to(dtype))
    got = softmax.log_softmax_backward_tangent(p.to(dtype), dl, g.sum(1).to(dtype), dg.to(dtype))
    for i in range(k):
        close(dl[i], torch.func.jvp(lambda z: z.log_softmax(1), (z,), (dz[i],))[1], dtype)
        close(got[i], torch.func.jvp(backward, (z, g), (dz[i], dg[i]))[1], dtype)


@pytest.mark.parametrize("k", [1, 3])
def test_dual_gemm_is_a_linear_layers_sweep(k: int) -> None:
    M, K, N = 5, 4, 3
    x, w = (torch.randn(*s, dtype=torch.float64) for s in ((M, K), (N, K)))
    dx, dw, db = (torch.randn(k, *s, dtype=torch.float64) for s in ((M, K), (N, K), (N,)))
    got = linear.dual_gemm(dx, w.t(), x, dw.mT, db)
    plain = linear.dual_gemm(x, dw.mT)
    for i in range(k):
        dy = torch.func.jvp(torch.nn.functional.linear, (x, w, torch.zeros(N).double()), (dx[i], dw[i], db[i]))[1]
        close(got[i], dy, torch.float64)
        close(plain[i], x @ dw[i].t(), torch.float64)


def test_embedding_and_its_adjoint() -> None:
    index = torch.tensor([3, 0, 3, 3, 1])
    tables, g = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    rows = embedding.embedding(tables, index)
    back = embedding.embedding_backward(g, index, 5)
    for i in range(2):
        close(rows[i], torch.stack([tables[i, j] for j in index]), torch.float64)
        close(back[i], torch.stack([g[i, index == r].sum(0) for r in range(5)]), torch.float64)


@pytest.mark.skipif(native.REASON is not None, reason=str(native.REASON))
def test_a_structs_fields_go_by_name() -> None:
    d = torch.randn(1, 5)
    fields = {"slope": d[0], "d": d, "curvature": None, "dz": None, "out": d, "k": 1, "n": 5}
    backwards = dict(reversed(fields.items()))
    assert native._structs.slope_product(**backwards)[1] == tuple(fields.values())
    with pytest.raises(TypeError, match="missing 1 required .* 'dz'"):
        native._structs.slope_product(**{name: value for name, value in fields.items() if name != "dz"})
    with pytest.raises(TypeError, match="unexpected .* 'dx'"):
        native._structs.slope_product(**fields, dx=d)


def test_number_of_threads_does_not_change_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARPKERN_BACKEND", "cpu")
    p, u = torch.randn(300, 130).softmax(1), torch.randn(2, 300, 130)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            dp, mean = softmax.softmax_jacobian(p, u)
            back = softmax.softmax_backward_tangent(p, dp, u[0], u)
            log = softmax.log_softmax_jacobian(p, u), softmax.log_softmax_backward_tangent(p, u, p[:, 0], u)
            results.append([dp, mean, back, *log, pointwise.slope_product(p, u, p, u)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
