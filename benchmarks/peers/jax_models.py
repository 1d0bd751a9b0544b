"""The workloads of workloads.py in JAX: same weights, same batch, same operations, layouts that XLA prefers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Weights = dict[str, Any]


def _linear(p: Weights, name: str, x: Any) -> Any:
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def _norm(p: Weights, name: str, x: Any, axes: tuple[int, ...]) -> Any:
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def _stack(p: Weights, x: Any, activation: Callable[[Any], Any]) -> Any:
    layers = sorted({int(name.split(".")[0]) for name in p})
    for i in layers[:-1]:
        x = activation(_linear(p, str(i), x))
    return _linear(p, str(layers[-1]), x)


def _conv(x: Any, weight: Any, stride: int) -> Any:
    edge = weight.shape[-1] // 2
    return jax.lax.conv_general_dilated(
        x, weight.transpose(2, 3, 1, 0), (stride, stride), ((edge, edge), (edge, edge)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def _cnn(p: Weights, x: Any) -> Any:
    x = x.transpose(0, 2, 3, 1)
    for i, stride in enumerate((1, 2, 1, 2)):
        x = _conv(x, p[f"{3 * i}.weight"], stride) + p[f"{3 * i}.bias"]
        x = jax.nn.relu(_norm(p, str(3 * i + 1), x, (1, 2, 3)))
    return _linear(p, "14", x.mean((1, 2)))


def _wrn(p: Weights, x: Any) -> Any:
    def active(name: str, x: Any) -> Any:
        return jax.nn.relu(_norm(p, name, x, (1, 2, 3)))

    x = _conv(x.transpose(0, 2, 3, 1), p["stem.weight"], 1)
    for i, stride in enumerate((1, 1, 2, 1, 2, 1)):
        block = f"blocks.{i}"
        h = active(f"{block}.norm1", x)
        y = _conv(h, p[f"{block}.conv1.weight"], stride)
        y = _conv(active(f"{block}.norm2", y), p[f"{block}.conv2.weight"], 1)
        short = f"{block}.shortcut.weight"
        x = y + (_conv(h, p[short], stride) if short in p else x)
    return _linear(p, "readout", active("norm", x).mean((1, 2)))


def _gpt(p: Weights, tokens: Any) -> Any:
    context = tokens.shape[1]
    x = p["embed.weight"][tokens] + p["position.weight"][:context]
    mask = jnp.tril(jnp.ones((context, context), bool))
    heads = 12 if x.shape[-1] == 768 else 6
    for i in range(sum(name.endswith(".qkv.weight") for name in p)):
        block = f"blocks.{i}"
        b, t, d = x.shape
        qkv = _linear(p, f"{block}.qkv", _norm(p, f"{block}.norm1", x, (-1,)))
        q, k, v = qkv.reshape(b, t, 3, heads, d // heads).transpose(2, 0, 3, 1, 4)
        scores = jnp.where(mask, q @ k.swapaxes(-1, -2) / (d // heads) ** 0.5, -jnp.inf)
        y = (jax.nn.softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(b, t, d)
        x = x + _linear(p, f"{block}.out", y)
        hidden = jax.nn.gelu(_linear(p, f"{block}.up", _norm(p, f"{block}.norm2", x, (-1,))), approximate=False)
        x = x + _linear(p, f"{block}.down", hidden)
    readout = p.get("head.weight", p["embed.weight"])  # tied, there is one weight for both
    return _norm(p, "norm", x, (-1,)) @ readout.T


def loss(workload: str) -> Callable[[Weights, Any, Any], Any]:
    """Return ``(weights, x, y) -> mean cross-entropy``."""
    outputs = {
        "mlp": lambda p, x: _stack(p, x, jax.nn.relu),
        "overhead": lambda p, x: _stack(p, x, lambda z: jax.nn.gelu(z, approximate=False)),
        "cnn": _cnn,
        "wrn": _wrn,
        "gpt": _gpt,
    }[workload]

    def value(p: Weights, x: Any, y: Any) -> Any:
        scores = jax.nn.log_softmax(outputs(p, x))
        return -jnp.take_along_axis(scores, y[..., None], -1).mean()

    return value
