"""The flat order of parameters, there and back."""

from __future__ import annotations

import pytest
import torch
from problems import TinyGPT
from torch import nn

import sharpkern as sk


def test_flatten_and_unflatten_are_inverse_and_follow_named_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[1].weight.requires_grad_(False)
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    v = sk.flatten(wanted)
    parts = sk.unflatten(v, model)
    assert list(parts) == list(wanted)
    assert all(torch.equal(parts[name], wanted[name]) for name in wanted)
    parts["0.bias"].zero_()
    assert float(v[12:16].detach().abs().sum()) == 0.0  # views, not copies


def test_tied_weights_appear_once() -> None:
    model = TinyGPT()
    n = sum(p.numel() for p in model.parameters())
    parts = sk.unflatten(torch.zeros(n), model)
    assert "embed.weight" in parts and "head.weight" not in parts


def test_bad_input_is_refused_with_its_size() -> None:
    with pytest.raises(ValueError, match=r"v must be \[3\] for these 2 parameters, got \[4\]"):
        sk.unflatten(torch.zeros(4), nn.Linear(2, 1))
    with pytest.raises(ValueError, match="at least one tensor"):
        sk.flatten([])
