"""Batches whose form would be guessed, and models without an output to split at, are refused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from small_models import Apply, batch, net
from torch import Tensor, nn

import sharpkern as sk


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (torch.randn(8, 4), "a tensor of shape"),
        ([torch.randn(8, 4)], "a list of 1"),
        ((torch.randn(8, 4), torch.ones(8), torch.ones(8)), "a tuple of 3"),
    ],
)
def test_batches_that_would_be_guessed_are_refused(data, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sk.HessianOperator(nn.Linear(4, 4), lambda o, _: o.square().mean(), data)


def test_gauss_newton_needs_outputs_that_it_can_see() -> None:
    @dataclass
    class Output:
        logits: Tensor

    wrapped = net(Apply(torch.tanh))

    class Wrapped(nn.Module):
        def __init__(self, form) -> None:
            super().__init__()
            self.inner, self.form = wrapped, form

        def forward(self, x: Tensor):
            return self.form(self.inner(x))

    data = batch()
    with pytest.raises(ValueError, match="Output"):
        sk.GGNOperator(Wrapped(Output), lambda o, t: F.cross_entropy(o.logits, t), data)
    own_loss = Wrapped(lambda o: {"loss": F.cross_entropy(o, data[1]), "logits": o})
    with pytest.raises(ValueError, match="computes the loss itself"):
        sk.GGNOperator(own_loss, lambda o, _: o["loss"], data)
