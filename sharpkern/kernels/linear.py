"""The dual GEMM: two products into one accumulator, and a bias.

Every line of a linear layer's tangent sweeps has this form (y = x W' + b; ' is the transpose):

    dy = dx W' + x dW' + db        d(gx) = dg W + g dW        d(gW) = dg' x + g' dx
"""

from __future__ import annotations

from torch import Tensor

from .dispatch import choose, kernel, runs_on, triton


@kernel(triton=triton("linear"))
def dual_gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    d: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``a b + c d + bias``; absent operands count as zero.

    Args:
        a: ``[M, K]``, the same for all tangents, or ``[k, M, K]``; any strides (a transposed view costs nothing).
        b: ``[K, N]`` or ``[k, K, N]``. At least one of a and b has k.
        c: ``[M, L]`` or ``[k, M, L]``, with d ``[L, N]`` or ``[k, L, N]``; at least one of them has k.
        bias: ``[k, N]``.
        out: ``[k, M, N]`` like the result, each ``[M, N]`` contiguous; allocated if None.

    Returns:
        ``[k, M, N]`` in a's dtype, contiguous unless out is not; 16-bit floats are accumulated in float32. Whether
        float32 products may be rounded to TF32 on a GPU is torch's own setting
        (``torch.backends.cuda.matmul.allow_tf32``).

    Cost: 2 k M N (K + L) operations; shared operands are read once for all k.
    """
    result: Tensor = choose("dual_gemm", a).dual_gemm(a, b, c, d, bias, out)
    return result


def fused(x: Tensor) -> bool:
    """Whether ``dual_gemm`` runs as one kernel on a tensor, rather than as torch's products."""
    return runs_on("triton", "dual_gemm", x)
