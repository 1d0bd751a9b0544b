"""Models: variances and multipliers as stated, causality, shapes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sharpkern.train.models import CNN, FCN, GPT

WIDTH = 300


def layers(parameterisation: str, **changes) -> list[nn.Module]:
    model = FCN(200, 10, **{"depth": 4, "width": WIDTH, "parameterisation": parameterisation, "seed": 5} | changes)
    return list(model.layers)


@pytest.mark.parametrize(
    ("parameterisation", "first", "hidden", "readout"),
    [
        ("sp", 2 / 200, 2 / WIDTH, 1 / WIDTH),
        ("ntp", 1.0, 1.0, 1.0),
        ("mup", 2 / WIDTH, 2 / WIDTH, 1 / WIDTH),
    ],
)
def test_weights_have_the_stated_variance_and_biases_are_zero(parameterisation, first, hidden, readout) -> None:
    for layer, variance in zip(layers(parameterisation), [first, hidden, hidden, readout], strict=True):
        w = layer.weight.detach().double()
        # the variance of n numbers from this cut normal is known to about 1.1 / sqrt(n) of itself: five of these
        assert w.var() == pytest.approx(variance, rel=5.5 / math.sqrt(w.numel()))
        assert abs(w.mean()) < 5 * math.sqrt(variance / w.numel())
        assert not layer.bias.any()


def test_weights_are_cut_at_two_standard_deviations_of_the_uncut_normal() -> None:
    w = layers("sp")[1].weight.detach().double()
    inside = torch.linspace(-2, 2, 400_001, dtype=torch.float64)  # the cut normal's deviation, by quadrature
    density = torch.exp(-inside.square() / 2)
    deviation = float((inside.square() * density).sum().div(density.sum()).sqrt())
    limit = 2 * math.sqrt(2 / WIDTH) / deviation
    assert w.abs().max() <= limit * 1.00001
    assert w.abs().max() > 0.99 * limit


@pytest.mark.parametrize(
    ("parameterisation", "of_weight", "of_bias"),
    [
        ("sp", [1, 1, 1], [1, 1, 1]),
        ("ntp", [math.sqrt(2 / 30), math.sqrt(2 / 70), math.sqrt(1 / 70)], [1, 1, 1]),
        ("mup", [math.sqrt(70 / 30), 1, math.sqrt(1 / 70)], [math.sqrt(70 / 30), 1, math.sqrt(1 / 70)]),
    ],
)
def test_forward_multipliers_of_weight_and_bias(parameterisation, of_weight, of_bias) -> None:
    model = FCN(30, 4, depth=3, width=70, parameterisation=parameterisation).double()
    for layer, a, b in zip(model.layers, of_weight, of_bias, strict=True):
        nn.init.normal_(layer.bias)
        x = torch.randn(5, layer.weight.shape[1], dtype=torch.float64)
        torch.testing.assert_close(layer(x), a * (x @ layer.weight.T) + b * layer.bias)


@pytest.mark.parametrize(("parameterisation", "divisor"), [("ntp", 1.0), ("mup", math.sqrt(70))])
def test_parameterisations_are_the_same_function_at_first_up_to_the_readout(parameterisation, divisor) -> None:
    """They share the underlying normal numbers, so a seed gives equal outputs; muP's are smaller by sqrt(width)."""
    x = torch.randn(6, 30)
    sp = FCN(30, 4, depth=4, width=70, parameterisation="sp", seed=3)(x)
    other = FCN(30, 4, depth=4, width=70, parameterisation=parameterisation, seed=3)(x)
    torch.testing.assert_close(other, sp / divisor, rtol=1e-4, atol=1e-6)


def test_fcn_4_512_has_three_hidden_layers_of_512_a_readout_and_biases() -> None:
    model = FCN(784, 10)
    assert [tuple(layer.weight.shape) for layer in model.layers] == [(512, 784), (512, 512), (512, 512), (10, 512)]
    assert [tuple(layer.bias.shape) for layer in model.layers] == [(512,), (512,), (512,), (10,)]


@pytest.mark.parametrize(("name", "function"), [("relu", F.relu), ("gelu", F.gelu), ("tanh", torch.tanh)])
def test_fcn_is_its_layers_with_the_activation_between(name, function) -> None:
    model = FCN(12, 3, depth=3, width=9, activation=name)
    x = torch.randn(4, 3, 4)
    first, second, readout = model.layers
    torch.testing.assert_close(model(x), readout(function(second(function(first(x.flatten(1)))))))


def test_zero_readout_gives_zero_but_still_a_gradient() -> None:
    model = FCN(12, 3, depth=3, width=9, zero_readout=True)
    output = model(torch.randn(4, 12))
    assert not output.any()
    output.sum().backward()
    assert model.layers[-1].weight.grad.any()


def test_seed_decides_the_weights_and_nothing_else_does() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.randn(3)
        return FCN(12, 3, width=9, seed=seed).layers[0].weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_gpt_sees_only_the_past_and_knows_positions() -> None:
    model = GPT(11, 8, width=16, heads=2, blocks=2).double()
    tokens = torch.randint(0, 11, (2, 8))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert ((a - b)[:, 5:].abs().amax((0, 2)) > 1e-6).all()
    same = model(torch.full((1, 8), 4))[0]
    assert (same[1:] - same[:-1]).abs().max() > 1e-3


def test_gpt_without_last_norm_has_larger_outputs() -> None:
    tokens = torch.randint(0, 11, (3, 8))
    with_norm, without = (GPT(11, 8, width=32, heads=2, blocks=3, last_norm=n)(tokens).std() for n in (True, False))
    assert without > 1.5 * with_norm


def test_cnn_takes_any_channels_and_sizes() -> None:
    for channels, size in [(1, 28), (3, 32)]:
        output = CNN(channels, 10, width=4)(torch.randn(2, channels, size, size))
        assert output.shape == (2, 10)
        assert output.std() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FCN(4, 2, activation="swish"), "unknown activation 'swish'"),
        (lambda: FCN(4, 2, parameterisation="spp"), "unknown parameterisation 'spp'"),
        (lambda: FCN(4, 2, depth=1), "depth must be at least 2"),
        (lambda: GPT(4, 2, width=10, heads=4), "multiple of 2 \\* heads = 8, got 10"),
    ],
)
def test_impossible_models_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
