"""``triton_embedding``, as it ships, compiles for each chip without spills."""

from __future__ import annotations

import pytest
import torch
from launches import check_launches
from offline import CHIPS

from sharpkern.kernels.triton import embedding as triton_embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [1, 16, 65, 768])
@pytest.mark.parametrize("chip", CHIPS)
def test_embedding(chip: int, D: int, dtype: torch.dtype) -> None:
    tables, g = (torch.empty(3, n, D, dtype=dtype, device="meta") for n in (50257, 8192))
    index = torch.empty(8192, dtype=torch.int64, device="meta")

    def calls() -> None:
        for k in (1, 3):
            triton_embedding.embedding(tables[:k], index)
            triton_embedding.embedding_backward(g[:k], index, 50257)

    assert check_launches(chip, triton_embedding, "_gather", "_add_up", call=calls) == 2 * ["_gather", "_add_up"]
