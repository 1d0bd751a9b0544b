"""``triton_linear`` in the interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sharpkern.kernels import reference
from sharpkern.kernels.triton import linear as triton_linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (  # k, M, N, K, L
    (1, 1, 1, 1, 1),
    (3, 1, 65, 7, 130),
    (3, 7, 63, 65, 1),
    (3, 63, 7, 1, 63),
    (1, 65, 130, 63, 7),
    (3, 130, 1, 130, 65),
    (1, 130, 65, 7, 130),
    (3, 65, 65, 65, 63),
)
LAYOUTS = ("dx W' + x dW'", "dg W + g dW", "dg' x + g' dx", "dx dW' + x dW'")
BIAS = ((), ("bias",))


def operands(device: str, dtype: torch.dtype, layout: str, sizes: tuple[int, ...], gaps: bool) -> dict[str, Tensor]:
    """Random arguments as a linear layer passes them; with gaps, no tensor has a stride of one."""
    k, M, N, K, L = sizes

    def normal(*shape: int) -> Tensor:
        if gaps:
            return torch.randn(*shape, 2).to(device, dtype)[..., 1]
        return torch.randn(*shape).to(device, dtype)

    if layout == "dx W' + x dW'":
        factors = normal(k, M, K), normal(N, K).mT, normal(M, L), normal(k, N, L).mT
    elif layout == "dg W + g dW":
        factors = normal(k, M, K), normal(K, N), normal(M, L), normal(k, L, N)
    elif layout == "dg' x + g' dx":
        factors = normal(k, K, M).mT, normal(K, N), normal(L, M).mT, normal(k, L, N)
    else:
        factors = normal(k, M, K), normal(k, N, K).mT, normal(1, M, L).expand(k, M, L), normal(k, N, L).mT
    return dict(zip("abcd", factors, strict=True)) | {"bias": normal(k, N)}


def check(arguments: dict[str, Tensor]) -> None:
    a = arguments["a"]
    got = triton_linear.dual_gemm(**arguments)
    want = reference.dual_gemm(**{name: t.double() for name, t in arguments.items()})
    assert got.dtype == a.dtype
    assert got.is_contiguous()
    terms = a.shape[-1] + (arguments["c"].shape[-1] if "c" in arguments else 0)
    accumulated = 4 * (terms + 4) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(got.double(), want, rtol=2 * torch.finfo(a.dtype).eps, atol=accumulated)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_dual_gemm(device: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    for i, layout in enumerate(LAYOUTS):
        bias = BIAS[(SHAPES.index(sizes) + i) % len(BIAS)]
        values = operands(device, dtype, layout, sizes, gaps=i % 2 == 1)
        check({name: values[name] for name in ("a", "b", "c", "d", *bias)})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_product(device: str, layout: str, dtype: torch.dtype) -> None:
    values = operands(device, dtype, layout, (3, 65, 17, 63, 7), gaps=False)
    for bias in BIAS:
        check({name: values[name] for name in ("a", "b", *bias)})
    check({"a": values["c"], "b": values["d"], "bias": values["bias"]})  # now k is b's


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_tiles(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several groups of rows, the last one smaller; sizes are multiples of 16, but not of the tiles."""
    monkeypatch.setattr(triton_linear, "_BUSY", 1)
    monkeypatch.setattr(triton_linear, "GROUP", 2)
    sizes = (2, 336, 144, 48, 16)
    values = operands(device, dtype, LAYOUTS[0], sizes, gaps=False)
    assert triton_linear.tiles(*sizes[:3], dtype, copied=True).m < sizes[1] // 2
    check(values)


def test_long_strides(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets that need 64 bits where there is memory for them; everywhere, the code that computes them."""
    if device == "cuda":  # 5 GiB
        a = torch.empty(80 << 25, dtype=torch.float16, device=device).as_strided((1, 80, 7), (0, 1 << 25, 1)).normal_()
        check({"a": a, "b": torch.randn(7, 20, device=device, dtype=torch.float16)})
    monkeypatch.setattr(triton_linear, "_SHORT_STRIDE", 1)
    check(operands(device, torch.float32, LAYOUTS[2], (3, 65, 17, 33, 7), gaps=True))


def test_empty(device: str) -> None:
    for sizes in ((2, 0, 5, 3, 3), (2, 5, 0, 3, 3), (2, 5, 5, 0, 0)):
        check(operands(device, torch.float32, LAYOUTS[0], sizes, gaps=False))


def test_precision_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_linear, "interpreted", lambda: False)
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, want in (("ieee", "ieee"), ("tf32", "tf32")):
            matmul.fp32_precision = setting
            assert triton_linear.precision(torch.float32) == want
            assert triton_linear.precision(torch.bfloat16) == "ieee"
    finally:
        matmul.fp32_precision = before
