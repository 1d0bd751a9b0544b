"""Embedding kernels: rows of k tables by index, and the sums that are the adjoint of it."""

from __future__ import annotations

from torch import Tensor

from .dispatch import choose, kernel, runs_on, triton


@kernel(triton=triton("embedding"))
def embedding(tables: Tensor, index: Tensor) -> Tensor:
    """Return ``tables[:, index]``.

    Args:
        tables: ``[k, rows, D]``, contiguous.
        index: ``[tokens]`` int64.

    Returns:
        ``[k, tokens, D]``.

    Cost: moves 2 k tokens D numbers.
    """
    result: Tensor = choose("embedding", tables).embedding(tables, index)
    return result


@kernel(triton=triton("embedding"))
def embedding_backward(g: Tensor, index: Tensor, rows: int) -> Tensor:
    """Add up the cotangents of each row, in the order of the tokens: the same bits every time, no atomics.

    Args:
        g: ``[k, tokens, D]``, contiguous.
        index: ``[tokens]`` int64, each below rows.
        rows: of the table.

    Returns:
        ``[k, rows, D]``; 16-bit floats are added up in float32.

    Cost: reads k tokens D and writes k rows D numbers.
    """
    result: Tensor = choose("embedding_backward", g).embedding_backward(g, index, rows)
    return result


def fused(tables: Tensor) -> bool:
    """Whether both kernels run as kernels of this package on a tensor, rather than as torch's lookups."""
    return runs_on("triton", "embedding", tables)
