"""``triton_embedding`` in the interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch

from sharpkern.kernels import reference
from sharpkern.kernels.triton import embedding as triton_embedding

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(1, 1, 1), (7, 63, 7), (7, 7, 130), (63, 65, 1), (65, 130, 65)]  # rows, tokens, D


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k", [1, 3])
def test_embedding(device: str, k: int, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, tokens, D = size
    tables = torch.randn(k, rows, D).to(device, dtype)
    index = torch.randint(rows, (tokens, 2)).to(device)[:, 0]
    assert torch.equal(triton_embedding.embedding(tables, index), reference.embedding(tables, index))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k", [1, 3])
def test_embedding_backward(device: str, k: int, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, tokens, D = size
    g = torch.randn(k, tokens, D).to(device, dtype)
    index = torch.randint((rows + 1) // 2, (tokens, 2)).to(device)[:, 0]  # the others are missing
    index[tokens // 3 :] = int(index[0])  # of which there are more than a program reads at a time
    got = triton_embedding.embedding_backward(g, index, rows)
    want = reference.embedding_backward(g.double(), index, rows)
    assert got.dtype == dtype
    assert got.is_contiguous()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=2 * eps, atol=8 * torch.finfo(torch.float32).eps * tokens)
    assert torch.equal(got, triton_embedding.embedding_backward(g, index, rows))


def test_no_tokens(device: str) -> None:
    index = torch.empty(0, dtype=torch.int64, device=device)
    assert triton_embedding.embedding(torch.ones(2, 5, 3, device=device), index).shape == (2, 0, 3)
    got = triton_embedding.embedding_backward(torch.ones(2, 0, 3, device=device), index, 5)
    assert torch.equal(got, torch.zeros(2, 5, 3, device=device))
