"""Runs without a trace: batch norm's statistics, which torch writes without counting a new version of the tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sharpkern as sk
from sharpkern.rop.sandbox import RandomStates, buffers_on_copies, restored_buffers


class Doubled(torch.autograd.Function):
    """Has a backward of its own, so that its model goes through double backward."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return 2 * g


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(self.norm(self.linear(x)))


@pytest.mark.filterwarnings("ignore:sharpkern. this model does not export")
def test_double_backward_updates_batch_norm_as_training_does() -> None:
    model = Net()
    twin = copy.deepcopy(model)
    tracker = sk.SharpnessTracker(model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1))
    batch = torch.randn(6, 3), torch.randn(6, 4)
    tracker.step(batch)
    twin(batch[0])
    for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.allclose(a, b), name


def test_batch_norm_is_left_alone_or_put_back() -> None:
    norm = nn.BatchNorm1d(4)
    before = copy.deepcopy(norm.state_dict())
    for context in (buffers_on_copies([norm]), restored_buffers([norm])):
        with context:
            norm(torch.randn(6, 4))
            assert not torch.equal(norm.running_mean, before["running_mean"])
        assert all(torch.equal(norm.state_dict()[name], value) for name, value in before.items())


def test_random_states_give_the_same_noise_again() -> None:
    import random

    import numpy as np

    def draw() -> list[float]:
        return [float(torch.rand(())), random.random(), float(np.random.rand())]  # noqa: NPY002  (the global generator)

    states = RandomStates(torch.device("cpu"))
    first, second = draw(), draw()
    for _ in range(2):
        with states.again():
            assert draw() == first
    with states.again():
        draw()
    assert draw() not in (first, second), "the block must not disturb the states outside"
