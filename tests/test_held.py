"""Parameters that the optimizer would not train as in eager torch are refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_models import batch, net
from torch import nn

import sharpkern as sk


def test_parameters_that_would_not_be_trained_as_in_eager_torch_are_refused() -> None:
    model, data, weight = net(), batch(), nn.Parameter(torch.ones(()).double())
    loss_fn = lambda o, t: weight * F.cross_entropy(o, t)  # noqa: E731
    more = torch.optim.SGD([*model.parameters(), weight], lr=0.1)
    with pytest.raises(ValueError, match="not the model's"):
        sk.SharpnessTracker(model, loss_fn, more).step(data)
    fewer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with pytest.raises(ValueError, match="lacks trainable parameters of the model: .'0.weight'"):
        sk.SharpnessTracker(model, F.cross_entropy, fewer).step(data)
    model[0].weight.register_post_accumulate_grad_hook(lambda p: None)  # noqa: ARG005
    with pytest.raises(ValueError, match=r"backward\(\) only"):
        sk.SharpnessTracker(model, F.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1)).step(data)
