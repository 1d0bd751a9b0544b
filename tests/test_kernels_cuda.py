"""The CUDA kernels: numbers by emulation on the CPU, and on a GPU where one is; what the compiler made, anywhere."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_on_cpu import emulate
from torch import Tensor

from sharpkern import kernels
from sharpkern.kernels import cuda, dispatch, reference
from sharpkern.kernels.cpu import native

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(cuda.REASON is not None, reason=str(cuda.REASON)),
]
DTYPES = [torch.float32, torch.float64]
# every tile, tails, rows on and off 16 bytes
BLOCKS = [(1, 1), (1, 7), (1, 2049), (2, 7), (2, 2048), (3, 1), (3, 2049), (8, 7), (8, 1028), (8, 2048)]


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    for mark in GPU:
        test = mark(test)
    return test


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The emulation, in place of the compiled module."""
    return emulate.install(monkeypatch)


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=GPU)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "emulated":
        request.getfixturevalue("emulated")
    return "cpu" if request.param == "emulated" else "cuda"


class Guard:
    """Tensors that lie between NaNs, so that reading past them shows in the numbers and writing past them in check."""

    def __init__(self, device: str, *, aligned: bool) -> None:
        self.device, self.before = device, 64 if aligned else 65  # numbers; torch aligns what it allocates
        self.buffers: list[tuple[Tensor, int]] = []

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        buffer = torch.full((self.before + size + 64,), float("nan"), dtype=dtype, device=self.device)
        self.buffers.append((buffer, size))
        return buffer[self.before : self.before + size].view(shape)

    def put(self, values: Tensor) -> Tensor:
        return self.empty(*values.shape, dtype=values.dtype).copy_(values)

    def workspace(self, kernel: str, x: Tensor, *sizes: int) -> Tensor:
        numbers = cuda._function(f"{kernel}_workspace", x)
        return self.empty(max(1, numbers(*sizes)) if numbers else 1, dtype=torch.float64)

    def check(self) -> None:
        for buffer, size in self.buffers:
            assert buffer[: self.before].isnan().all() and buffer[self.before + size :].isnan().all()


@pytest.fixture(params=[True, False], ids=["aligned", "unaligned"])
def guard(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> Guard:
    guard = Guard(device, aligned=request.param)
    monkeypatch.setattr(cuda, "_workspace", guard.workspace)
    return guard


def assert_close(got: Tensor, want: Tensor, *, ulps: float, scale: float | None = None) -> None:
    """Compare in units of the dtype's rounding, relative to the largest value; NaN fails."""
    got, want = got.cpu(), want.cpu()
    scale = float(want.abs().max()) if scale is None else scale
    error = float((got.double() - want).abs().max()) / max(scale, 1e-300) / torch.finfo(got.dtype).eps
    assert error <= ulps, f"off by {error:.3g} ulps of {got.dtype}, allowed {ulps}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n"), BLOCKS)
def test_gram_is_all_inner_products(guard: Guard, k: int, n: int, dtype: torch.dtype) -> None:
    V, W = torch.randn(k, n, dtype=dtype), torch.randn(k + 2, n, dtype=dtype)
    v, w = guard.put(V), guard.put(W)
    scale = float(V.double().norm(dim=1).max() * W.double().norm(dim=1).max())
    got, mirrored, symmetric = kernels.gram(v, w), kernels.gram(w, v), kernels.gram(v, v)
    assert_close(got, V.double() @ W.double().T, ulps=64, scale=scale)
    assert_close(symmetric, V.double() @ V.double().T, ulps=64, scale=scale)
    assert torch.equal(got, mirrored.T) and torch.equal(symmetric, symmetric.T)
    guard.check()


@pytest.mark.parametrize(("k", "m"), [(5, 1), (1, 9), (17, 1), (13, 4), (6, 2)])
def test_gram_of_more_rows_than_a_tile(guard: Guard, k: int, m: int) -> None:
    V, W = torch.randn(k, 1028), torch.randn(m, 1028)
    assert_close(kernels.gram(guard.put(V), guard.put(W)), V.double() @ W.double().T, ulps=64, scale=1028)
    guard.check()


@pytest.mark.parametrize("nearly_converged", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n"), BLOCKS)
def test_power_step_agrees_with_its_definition(
    guard: Guard, k: int, n: int, dtype: torch.dtype, nearly_converged: bool
) -> None:
    V = torch.nn.functional.normalize(torch.randn(k, n, dtype=torch.float64), dim=1).to(dtype)
    noise = torch.randn(k, n, dtype=dtype)
    HV = 3 * V + (1e-4 * noise / n**0.5 if nearly_converged else noise)
    HV[0] *= k == 1  # a zero product of several
    out = guard.put(torch.full_like(V, float("nan")))
    theta, residual, following = kernels.power_step(guard.put(V), guard.put(HV), out)
    assert following is out
    for got, want, ulps in zip(
        (theta, residual, following), reference.power_step(V, HV), (64, 1e4 * n**0.5, 2), strict=True
    ):
        assert_close(got, want.double(), ulps=ulps, scale=float(HV.double().norm(dim=1).max()) if ulps > 2 else 1.0)
    if k > 1:
        assert float(theta[0]) == float(residual[0]) == float(following[0].abs().max()) == 0.0
    guard.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n"), BLOCKS)
def test_combine_scale_and_second_moment(guard: Guard, k: int, n: int, dtype: torch.dtype) -> None:
    V, d, C = torch.randn(k, n, dtype=dtype), torch.rand(n, dtype=dtype) + 0.1, torch.randn(k + 1, k).double()
    v, diagonal = guard.put(V), guard.put(d)
    for rows in (k + 1, 1):
        out = guard.empty(rows, n, dtype=dtype)
        assert kernels.combine(guard.put(C[:rows]), v, out) is out
        assert_close(out, C[:rows] @ V.double(), ulps=2, scale=float((C.abs() @ V.double().abs()).max()))
    out = guard.empty(k, n, dtype=dtype)
    assert kernels.scale(v, diagonal, out=out) is out
    assert_close(out, V.double() * d.double(), ulps=1)
    assert torch.equal(kernels.scale(v, diagonal, out=v), out)
    moment = d**8
    moment[0] = 0.0
    out = guard.empty(n, dtype=dtype)
    kernels.inv_sqrt_adam(guard.put(moment), bias_correction2=0.3, eps=1e-4, factor=0.1, out=out)
    assert_close(out, (0.1 * ((moment.double() / 0.3).sqrt() + 1e-4)) ** -0.5, ulps=4)
    guard.check()


def test_rows_longer_than_one_step_of_all_blocks(device: str) -> None:
    n = 2_100_001
    V = torch.randn(1, n).double()
    v, H = V.to(device), torch.roll(V, 1, 1)
    square = math.fsum((V[0] * V[0]).tolist())  # torch's own product is off by hundreds of ulps here
    assert_close(kernels.gram(v, v), torch.tensor([[square]], dtype=torch.float64), ulps=16)
    for got, want in zip(kernels.power_step(v, H.to(device)), reference.power_step(V, H), strict=True):
        assert_close(got, want, ulps=1000, scale=n)
    assert_close(kernels.combine(torch.full((1, 1), 3.0, device=device).double(), v), 3 * V, ulps=1)
    assert_close(kernels.scale(v, v[0]), V * V, ulps=1)
    got = kernels.inv_sqrt_adam(v[0] ** 2, bias_correction2=1.0, eps=1.0, factor=1.0)
    assert_close(got, (V[0].abs() + 1) ** -0.5, ulps=4)


def test_empty_blocks(device: str) -> None:
    V = torch.zeros(2, 0, device=device)
    assert kernels.gram(V, V).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    theta, residual, following = kernels.power_step(V, V)
    assert theta.tolist() == residual.tolist() == [0.0, 0.0] and following.shape == (2, 0)
    assert kernels.gram(torch.zeros(0, 5, device=device), torch.zeros(2, 5, device=device)).shape == (0, 2)
    assert (
        kernels.combine(torch.zeros(1, 2, device=device).double(), V).shape
        == kernels.scale(V[:1], V[0]).shape
        == (1, 0)
    )
    assert kernels.combine(torch.zeros(1, 0, device=device).double(), torch.zeros(0, 3, device=device)).tolist() == [
        [0.0] * 3
    ]


def run_all(V: Tensor, W: Tensor, C: Tensor) -> list[Tensor]:
    """Results of every kernel, as new tensors."""
    moment = kernels.inv_sqrt_adam(W[0], bias_correction2=0.5, eps=1e-8, factor=0.5)
    return [
        kernels.gram(V, W),
        kernels.gram(V, V),
        *kernels.power_step(V, W),
        kernels.combine(C, V),
        kernels.scale(V, W[0]),
        moment,
    ]


def test_bits_do_not_depend_on_the_order_of_threads_and_blocks(emulated: Any) -> None:
    V, W, C = torch.randn(3, 5001), torch.rand(3, 5001), torch.randn(2, 3).double()
    forwards = run_all(V, W, C)
    emulated.reverse(True)
    try:
        backwards = run_all(V, W, C)
    finally:
        emulated.reverse(False)
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_orthonormalise(device: str, dtype: torch.dtype) -> None:
    V = torch.randn(5, 2049, dtype=dtype)
    V[4] = V[0] + 1e-5 * V[4]
    Q = kernels.orthonormalise(V.to(device)).cpu()
    assert float((Q.double() @ Q.double().t() - torch.eye(5)).abs().max()) <= 8 * torch.finfo(dtype).eps
    want = reference.orthonormalise(V)
    assert_close(Q, want.double(), ulps=1e6, scale=1.0)  # 1e5: the condition of the last row
    with pytest.raises(kernels.RankError):
        kernels.orthonormalise(torch.cat([V, V[:1]]).to(device))


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 7, 2049, 100_001, 100_004])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_public_functions_on_a_gpu(k: int, n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    V, W, C = torch.randn(k, n, dtype=dtype), torch.rand(k, n, dtype=dtype), torch.randn(k + 1, k).double()
    v, w, c = V.cuda(), W.cuda(), C.cuda()
    monkeypatch.setenv("SHARPKERN_BACKEND", "cuda")
    moment = {"bias_correction2": 0.5, "eps": 1e-8, "factor": 0.5}

    def run() -> list[Tensor]:
        vectors = [kernels.combine(c, v), kernels.scale(v, w[0]), kernels.inv_sqrt_adam(w[0], **moment)]
        return [kernels.gram(v, w), *kernels.power_step(v, w), *vectors]

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    wide, v, w, c = V.double(), V, W, C
    monkeypatch.setenv("SHARPKERN_BACKEND", "reference")
    # the residual has no cancellation here, so all sums are right to rounding in the size of their terms
    for got, want in zip(first, run(), strict=True):
        size = float(want.abs().max()) + (float(wide.norm() * W.double().norm()) if want.dtype == torch.float64 else 0)
        assert_close(got, want.double(), ulps=64 if got.dtype == torch.float64 else 4, scale=size)


@gpu
def test_long_float32_dot_product_is_right() -> None:
    n = 100_000_000
    V = torch.full((1, n), 0.1, device="cuda")
    V[0, ::1000] = 100.0
    want = (n - n // 1000) * float(torch.tensor(0.1)) ** 2 + n // 1000 * 1e4
    assert abs(float(kernels.gram(V, V)) / want - 1) <= 1e-7


@gpu
def test_no_call_waits_for_the_gpu() -> None:
    V, W, C = torch.randn(3, 5001, device="cuda"), torch.rand(3, 5001, device="cuda"), torch.randn(2, 3).double().cuda()
    run_all(V, W, C)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_all(V, W, C)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_calls_follow_the_current_stream_and_graphs() -> None:
    V, W, C = torch.randn(3, 5001, device="cuda"), torch.rand(3, 5001, device="cuda"), torch.randn(2, 3).double().cuda()
    run_all(V, W, C)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # fails if anything goes to another stream than torch's current one
        results = run_all(V, W, C)
    V.copy_(torch.randn_like(V))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, run_all(V, W, C), strict=True))


def binary() -> str:
    if cuda._cuda is None:
        pytest.skip(str(cuda.REASON))
    return str(native._C.__file__)


def cuobjdump(*arguments: str) -> str:
    """Run cuobjdump: nvcc's, or the one that comes with Triton."""
    folders = [Path(found).resolve().parent for name in ("cuobjdump", "nvcc") if (found := shutil.which(name))]
    if home := os.environ.get("CUDA_HOME"):
        folders.append(Path(home) / "bin")
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    tool = next((folder / "cuobjdump" for folder in folders if (folder / "cuobjdump").is_file()), None)
    if tool is None:
        pytest.skip("needs cuobjdump")
    return subprocess.run([str(tool), *arguments], check=True, capture_output=True, text=True).stdout


def test_every_chip_has_code() -> None:
    assert set(re.findall(r"sm_(\d+)\.cubin", cuobjdump("--list-elf", binary()))) == {"80", "90", "100"}
    assert set(re.findall(r"sm_(\d+)\.ptx", cuobjdump("--list-ptx", binary()))) == {"100"}


def test_no_kernel_spills_registers() -> None:
    listing = cuobjdump("--dump-resource-usage", binary())
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing)
    assert len(usage) >= 3 * 30  # three chips
    assert [line for line in usage if line[2] != "0" or line[3] != "0"] == []


@pytest.mark.parametrize(
    ("kernel", "arguments"),
    [
        ("gram", (8, 1, 8, 1, 1, 8, 8, 0)),  # addresses that nobody reads, sizes, the default stream
        ("power_step", (8, 8, 1, 1, 8, 8, 8, 8, 0)),
        ("combine", (8, 1, 1, 8, 1, 8, 8, 0)),
        ("scale", (8, 1, 1, 8, 8, 8, 0)),
        ("inv_sqrt_adam", (8, 1, 1.0, 1.0, 1.0, 8, 8, 0)),
    ],
)
def test_without_a_gpu_a_call_raises_what_is_missing(kernel: str, arguments: tuple[float, ...]) -> None:
    binary()
    if cuda._cuda.problem() is None:
        pytest.skip("this machine has a GPU")
    with pytest.raises(RuntimeError, match=f"CUDA kernel {kernel} cannot run: .*CUDA"):
        cuda._function(kernel, torch.zeros(1))(*arguments)


def fake(dtype: torch.dtype) -> Any:
    """What dispatch looks at of a CUDA tensor."""
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda", 0), numel=lambda: 1)


def test_dispatch_says_why_not_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "REASON", None)
    monkeypatch.setattr(cuda, "problem", lambda device: None)
    assert kernels.why_not("cuda", "gram", fake(torch.float32)) is None
    assert kernels.why_not("cuda", "gram", fake(torch.float16)) == (
        "torch.float16 is not supported, float32 and float64 are"
    )
    assert kernels.why_not("cuda", "gram", torch.zeros(1)) == "the tensor is on cpu"
    assert kernels.why_not("cuda", "dual_gemm", fake(torch.float32)) == (
        "sharpkern has no CUDA C++ version of dual_gemm"
    )
    monkeypatch.setattr(cuda, "problem", lambda device: f"{device} has compute capability 7.5, 8.0 is needed")
    assert kernels.why_not("cuda", "gram", fake(torch.float32)) == "cuda:0 has compute capability 7.5, 8.0 is needed"
    monkeypatch.setattr(cuda, "REASON", "sharpkern was built without CUDA")
    assert kernels.why_not("cuda", "gram", fake(torch.float32)) == "sharpkern was built without CUDA"


def forget_choices() -> None:
    dispatch._choice.cache_clear()
    dispatch._fastest.cache_clear()


@pytest.fixture
def _fresh() -> Iterator[None]:
    forget_choices()
    yield
    forget_choices()


@pytest.mark.usefixtures("_fresh")
def test_dispatch_chooses_cuda_for_cuda_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHARPKERN_BACKEND", raising=False)
    monkeypatch.setattr(cuda, "REASON", None)
    monkeypatch.setattr(cuda, "problem", lambda device: None)
    assert dispatch.choose("gram", fake(torch.float32)) is cuda
    assert dispatch.choose("gram", torch.zeros(1)) is not cuda
    monkeypatch.setattr(cuda, "problem", lambda device: "the driver is too old")
    forget_choices()
    assert dispatch.choose("gram", fake(torch.float32)) is reference
    monkeypatch.setenv("SHARPKERN_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="gram cannot run on backend 'cuda': the driver is too old"):
        dispatch.choose("gram", fake(torch.float32))
    with pytest.raises(RuntimeError, match="gram cannot run on backend 'cuda': the tensor is on cpu"):
        kernels.gram(torch.zeros(1, 2), torch.zeros(1, 2))


def test_an_old_driver_or_chip_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    ask = cuda.problem.__wrapped__
    monkeypatch.setattr(cuda, "_cuda", SimpleNamespace(problem=lambda: None))
    assert ask(torch.device("cuda", 0)) == "cuda:0 has compute capability 7.5, 8.0 is needed"
    monkeypatch.setattr(cuda, "_cuda", SimpleNamespace(problem=lambda: "driver version is insufficient"))
    assert ask(torch.device("cuda", 0)) == (
        "the CUDA driver cannot run sharpkern's kernels: driver version is insufficient"
    )
