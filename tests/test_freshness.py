"""A write past the version counters is noticed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_models import batch, net

import sharpkern as sk


def test_products_after_data_was_written_raise() -> None:
    model = net()
    H = sk.HessianOperator(model, F.cross_entropy, batch())
    model[0].weight.data.add_(0.3)
    with pytest.raises(RuntimeError, match="refresh"):
        H @ torch.ones(H.n, dtype=torch.float64)
