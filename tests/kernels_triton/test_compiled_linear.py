"""``triton_linear``, as it ships, compiles for each chip without spills."""

from __future__ import annotations

import pytest
import torch
from launches import check_launches
from offline import CHIPS
from torch import Tensor

from sharpkern.kernels.triton import linear as triton_linear
from sharpkern.kernels.triton.linear import CONFIGURATIONS, dual_gemm, tiles

# M, N of calls that choose each configuration
SIZES = {"large": (4096, 4096), "medium": (256, 256), "few rows": (16, 1024), "few columns": (1024, 16)}


def meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


# What rop/rules/linear.py launches. All of it: ptxas has been seen to spill with less code than it had registers for.
# bfloat16 and float16 differ only in conversions.
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("precision", CONFIGURATIONS)
@pytest.mark.parametrize("chip", CHIPS)
def test_dual_gemm(chip: int, precision: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.bfloat16 if precision == "16bit" else torch.float32
    if precision == "tf32":
        monkeypatch.setattr(triton_linear, "precision", lambda dtype: "tf32")
    k, (M, N), K = 3, SIZES[name], 1024
    chosen = []
    monkeypatch.setattr(triton_linear, "tiles", lambda *args: chosen.append(tiles(*args)) or chosen[-1])

    def heaviest(K: int = K, M: int = M, N: int = N) -> None:
        """A layer's tangent: dx W' + x dW' + db."""
        x, W = meta(dtype, M, K), meta(dtype, N, K)
        dx, dW, db = meta(dtype, k, M, K), meta(dtype, k, N, K), meta(dtype, k, N)
        dual_gemm(dx, W.mT, x, dW.mT, db)

    def no_bias() -> None:
        """The same without db."""
        x, W = meta(dtype, M, K), meta(dtype, N, K)
        dual_gemm(meta(dtype, k, M, K), W.mT, x, meta(dtype, k, N, K).mT)

    def input_cotangent() -> None:
        """Its tangent, dg W + g dW."""
        dual_gemm(meta(dtype, k, M, K), meta(dtype, K, N), meta(dtype, M, K), meta(dtype, k, K, N))

    def weight_cotangent() -> None:
        """Its tangent, dg' x + g' dx."""
        dual_gemm(meta(dtype, k, K, M).mT, meta(dtype, K, N), meta(dtype, K, M).mT, meta(dtype, k, K, N))

    def lightest() -> None:
        """The gradient of the input where the weight has no tangent: dg W."""
        dual_gemm(meta(dtype, k, M, K), meta(dtype, K, N))

    def ragged() -> None:
        """No size is a multiple of 16: each number is loaded by itself."""
        heaviest(1021, M - 3, N - 3)

    aligned = heaviest, no_bias, input_cotangent, weight_cotangent, lightest
    for call in (*aligned, ragged):
        check_launches(chip, triton_linear, "_dual_gemm", call=call)
    # large tiles do not take ragged operands
    want = CONFIGURATIONS[precision]
    assert chosen == [want[name]] * len(aligned) + [want["medium" if name == "large" else name]]
