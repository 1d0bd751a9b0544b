"""Every kernel on every backend against a definition in float64 written here."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cuda_on_cpu import emulate
from torch import Tensor

from sharpkern import kernels
from sharpkern.kernels import dispatch, reference
from sharpkern.kernels.cpu import native

SHAPES = [(1, 1), (1, 1023), (3, 1024), (4, 2049), (7, 4099), (2, 3 * 8192 + 5)]  # tails, chunk borders
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(params=["reference", "cpu", "cuda"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """CUDA is emulated on the CPU; ``test_kernels_cuda`` says what else holds of it."""
    if request.param == "cuda":
        emulate.install(monkeypatch)
    else:
        monkeypatch.setenv("SHARPKERN_BACKEND", request.param)
    return str(request.param)


def assert_close(got: Tensor, want: Tensor, *, ulps: float, scale: float | None = None) -> None:
    """Compare in units of the dtype's rounding, relative to the largest value; NaN fails."""
    scale = float(want.abs().max()) if scale is None else scale
    error = float((got.double() - want).abs().max()) / max(scale, 1e-300) / torch.finfo(got.dtype).eps
    assert error <= ulps, f"off by {error:.3g} ulps of {got.dtype}, allowed {ulps}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_gram_is_all_inner_products(backend: str, k: int, n: int, dtype: torch.dtype) -> None:
    V, W = torch.randn(k, n, dtype=dtype), torch.randn(k + 2, n, dtype=dtype)
    scale = float(V.double().norm(dim=1).max() * W.double().norm(dim=1).max())
    assert_close(kernels.gram(V, W), V.double() @ W.double().T, ulps=32, scale=scale)
    assert_close(kernels.gram(V, V), V.double() @ V.double().T, ulps=32, scale=scale)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 17, 1365, 40_001])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 33])
def test_transpose_moves_every_number_to_its_place(k: int, n: int, dtype: torch.dtype) -> None:
    columns = torch.randn(n, k).to(dtype)
    rows = kernels.transpose(columns)
    assert rows.is_contiguous() and rows.shape == (k, n)
    assert all(torch.equal(rows[i], columns[:, i]) for i in range(k))
    assert kernels.transpose(rows.t()).data_ptr() == rows.data_ptr()
    assert torch.equal(kernels.transpose(columns[:, ::2]), columns[:, ::2].t())


@pytest.mark.parametrize("nearly_converged", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_power_step_agrees_with_its_definition(
    backend: str, k: int, n: int, dtype: torch.dtype, nearly_converged: bool
) -> None:
    V = torch.nn.functional.normalize(torch.randn(k, n, dtype=torch.float64), dim=1).to(dtype)
    noise = torch.randn(k, n, dtype=dtype)
    HV = 3 * V + (1e-4 * noise / n**0.5 if nearly_converged else noise)
    out = torch.full_like(V, float("nan"))
    theta, residual, following = kernels.power_step(V, HV, out)
    assert following is out
    assert torch.equal(following, kernels.power_step(V, HV)[2])
    v, h = V.double(), HV.double()
    want = torch.stack([(a * b).sum() for a, b in zip(v, h, strict=True)])
    rest = torch.stack([(b - t * a).norm() for a, b, t in zip(v, h, want, strict=True)])
    size = float(h.norm(dim=1).max())
    assert_close(theta, want, ulps=64, scale=size)
    assert_close(residual, rest, ulps=1e4)
    assert_close(following, h / h.norm(dim=1, keepdim=True), ulps=2, scale=1.0)


def test_zero_product_stays_zero(backend: str) -> None:
    V = torch.nn.functional.normalize(torch.randn(2, 100), dim=1)
    HV = torch.stack([torch.zeros(100), torch.randn(100)])
    theta, residual, following = kernels.power_step(V, HV)
    assert float(theta[0]) == float(residual[0]) == float(following[0].abs().max()) == 0.0
    assert abs(float(following[1].norm()) - 1) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_combine_scale_and_second_moment(backend: str, k: int, n: int, dtype: torch.dtype) -> None:
    V, d, C = torch.randn(k, n, dtype=dtype), torch.rand(n, dtype=dtype) + 0.1, torch.randn(k + 1, k).double()
    want = C @ V.double()
    out = torch.full((k + 1, n), float("nan"), dtype=dtype)
    assert kernels.combine(C, V, out) is out
    assert_close(out, want, ulps=2)
    assert_close(kernels.combine(C, V), want, ulps=2)
    assert_close(kernels.scale(V, d), V.double() * d.double(), ulps=1)
    twice = V.clone()
    assert kernels.scale(twice, d, out=twice) is twice
    assert_close(twice, V.double() * d.double(), ulps=1)
    moment = d**8
    moment[0] = 0.0
    got = kernels.inv_sqrt_adam(moment, bias_correction2=0.3, eps=1e-4, factor=0.1)
    assert_close(got, (0.1 * ((moment.double() / 0.3).sqrt() + 1e-4)) ** -0.5, ulps=4)


def ill_conditioned(k: int, n: int, dtype: torch.dtype, smallest: float) -> Tensor:
    """Rows of all lengths whose directions have singular values from 1 to ``smallest``."""
    left = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64))[0]
    values = torch.logspace(0, float(torch.tensor(smallest).log10()), k, dtype=torch.float64)
    rows = torch.nn.functional.normalize(left @ (values[:, None] * right.t()), dim=1)
    return (torch.logspace(-3, 3, k, dtype=torch.float64)[:, None] * rows).to(dtype)


@pytest.mark.parametrize(("k", "n"), [(1, 1), (1, 1000), (3, 3), (8, 20_001), (16, 50)])
@pytest.mark.parametrize(
    ("dtype", "smallest"),
    [(torch.float32, 1), (torch.float32, 1e-3), (torch.float32, 2e-5), (torch.float64, 1e-3), (torch.float64, 1e-9),
     (torch.float64, 1e-13)],
    ids=str,
)  # fmt: skip
def test_orthonormalise(backend: str, k: int, n: int, dtype: torch.dtype, smallest: float) -> None:
    V = ill_conditioned(k, n, dtype, smallest)
    Q = kernels.orthonormalise(V)
    q, v = Q.double(), V.double()
    assert Q.dtype == dtype and Q.is_contiguous()
    assert float((q @ q.t() - torch.eye(k)).abs().max()) <= (1e-6 if dtype == torch.float32 else 1e-13)
    L = v @ q.t()
    assert bool((L.diagonal() > 0).all())
    scale = v.norm(dim=1, keepdim=True)
    limit = 30 * k * torch.finfo(dtype).eps
    assert float((L.triu(1) / scale).abs().max()) <= limit  # Gram-Schmidt's: row i from the first i rows
    assert float(((L @ q - v) / scale).abs().max()) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dependent_rows_are_refused_with_their_rank(backend: str, dtype: torch.dtype) -> None:
    V = torch.randn(4, 3000, dtype=dtype)
    with pytest.raises(kernels.RankError, match="5 rows of V span 4 dimensions") as caught:
        kernels.orthonormalise(torch.cat([V, (torch.randn(1, 4).to(dtype) @ V)]))
    assert caught.value.rank == 4
    with pytest.raises(kernels.RankError, match="4 rows of V span 3"):
        kernels.orthonormalise(torch.cat([V[:3], torch.zeros_like(V[:1])]))
    with pytest.raises(kernels.RankError, match="6 rows of V span 4"):
        kernels.orthonormalise(torch.cat([V, 3 * V[:1], -V[2:3]]))
    with pytest.raises(ValueError, match="no more rows than columns"):
        kernels.orthonormalise(torch.randn(3, 2, dtype=dtype))
    V[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        kernels.orthonormalise(V)


def test_bits_do_not_depend_on_threads() -> None:
    V, W = torch.randn(3, 100_003), torch.randn(3, 100_003)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([kernels.gram(V, W), *kernels.power_step(V, W)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_long_float32_dot_product_is_right(backend: str) -> None:
    n = 10_000_000
    V = torch.full((1, n), 0.1)
    V[0, ::1000] = 100.0
    want = (n - n // 1000) * float(torch.tensor(0.1)) ** 2 + n // 1000 * 1e4
    limit = 1e-12 if backend == "cpu" else 1e-9  # chunks; torch's product adds longer runs, n eps = 2e-9 at worst
    assert abs(float(kernels.gram(V, V)) / want - 1) <= limit
    naive = float((V * V).cumsum(1)[0, -1])
    assert abs(naive / want - 1) > 1e-8  # float32 sums lose it


@pytest.mark.parametrize("level", ["v2", "v3"])
def test_lower_instruction_levels_agree(level: str) -> None:
    if native._C is None or native._C.level() == "any":
        pytest.skip("this build has one instruction level")
    code = (
        "import torch; from sharpkern import kernels, _C; torch.manual_seed(1);"
        "V, W = torch.randn(2, 20001), torch.randn(3, 20001);"
        "assert _C.level() <= '" + level + "';"
        "assert (kernels.gram(V, W) - V.double() @ W.double().T).abs().max() <= 1e-9"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"SHARPKERN_CPU_LEVEL": level, "PATH": ""})


def test_wrong_arguments_are_refused_with_what_was_wrong() -> None:
    V = torch.randn(2, 6)
    with pytest.raises(ValueError, match=r"V must be a contiguous \[k, n\] block.*contiguous=False"):
        kernels.gram(torch.randn(6, 2).t(), V)
    with pytest.raises(ValueError, match=r"float32 or float64, got \[2, 6\] torch.float16"):
        kernels.gram(V.half(), V.half())
    with pytest.raises(ValueError, match=r"W must have rows like V's \(\[6\].*got \[5\]"):
        kernels.gram(V, torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"W must have rows like V's .*torch.float32 on cpu.*got \[6\] torch.float64"):
        kernels.gram(V, torch.randn(2, 6).double())
    with pytest.raises(ValueError, match=r"W must have rows like V's .* on cpu.*got \[6\] torch.float32 on meta"):
        kernels.gram(V, torch.empty(2, 6, device="meta"))
    with pytest.raises(ValueError, match=r"out must be contiguous .*contiguous=False"):
        kernels.scale(V, torch.randn(6), out=torch.empty(6, 2).t())
    with pytest.raises(ValueError, match=r"d must be contiguous .*contiguous=False"):
        kernels.scale(V, torch.randn(12)[::2])
    with pytest.raises(ValueError, match=r"HV must match V \(\[2, 6\]\), got \[3, 6\]"):
        kernels.power_step(V, torch.randn(3, 6))
    with pytest.raises(ValueError, match=r"C must be \[m, 2\] float64"):
        kernels.combine(torch.randn(1, 2), V)
    with pytest.raises(ValueError, match=r"d must be contiguous \[6\], torch.float32"):
        kernels.scale(V, torch.randn(5))
    with pytest.raises(ValueError, match=r"out must be contiguous \[2, 6\]"):
        kernels.scale(V, torch.randn(6), out=torch.empty(2, 5))


@pytest.mark.parametrize("kernel", dispatch._versions)
def test_a_registered_version_is_there(kernel: str) -> None:
    """In the module that the registry names: a function, or an entry of the compiled module to launch."""
    assert hasattr(reference, kernel)
    for backend, version in dispatch._versions[kernel].items():
        if dispatch._missing(version) is not None:
            continue
        compiled = native._C.cuda if backend == "cuda" else native._C
        known = hasattr(dispatch._module(version), kernel) or hasattr(compiled, f"{kernel}_f32")
        assert known or kernel == "orthonormalise", version  # made of gram and combine


def forget_choices() -> None:
    dispatch._choice.cache_clear()
    dispatch._fastest.cache_clear()


def test_forced_backend_runs_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    V = torch.randn(1, 4)
    monkeypatch.setenv("SHARPKERN_BACKEND", "fpga")
    with pytest.raises(ValueError, match="'fpga'; known backends are cuda, triton, cpu, reference"):
        kernels.gram(V, V)
    monkeypatch.setenv("SHARPKERN_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="gram cannot run on backend 'triton'"):
        kernels.gram(V, V)
    monkeypatch.setenv("SHARPKERN_BACKEND", "cpu")
    monkeypatch.setattr(native, "REASON", "the compiled module is missing")
    forget_choices()
    with pytest.raises(RuntimeError, match="cannot run on backend 'cpu': the compiled module is missing"):
        kernels.gram(V, V)
    monkeypatch.delenv("SHARPKERN_BACKEND")
    assert torch.allclose(kernels.gram(V, V), V.double() @ V.double().T)  # falls to the reference by itself
    forget_choices()
