"""The models that benchmarks run, on real data: MLP, CNN with norms, small GPT, and one bound by call overhead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from sharpkern.train.data import load


class Workload(NamedTuple):
    """Model, loss and batch, as ``HessianOperator`` takes them."""

    model: nn.Module
    loss_fn: Callable[..., Tensor]
    batch: Any


def images(count: int) -> tuple[Tensor, Tensor]:
    """``[count, 1, 28, 28]`` standardised photographs of clothes, and their classes."""
    data = load("fashion-mnist-5k", limit=count)
    return data.train_inputs, data.train_targets


def mlp(width: int = 512, hidden: int = 4, batch: int = 256) -> Workload:
    """784-512x4-10 ReLU network, batch 256, cross-entropy."""
    widths = [784] + [width] * hidden
    layers = [m for a, b in zip(widths, widths[1:], strict=False) for m in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    x, y = images(batch)
    return Workload(model, F.cross_entropy, (x.flatten(1), y))


def overhead() -> Workload:
    """64-128-128-10 GELU network, batch 64: bound by call overhead, not by arithmetic."""
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))
    x, y = images(64)
    return Workload(model, F.cross_entropy, (F.adaptive_avg_pool2d(x, 8).flatten(1), y))


def cnn() -> Workload:
    """Four 3x3 convolutions of 32 and 64 channels with layer norm over channels and pixels, batch 64 of 3x32x32."""
    layers: list[nn.Module] = []
    for a, b, stride in [(3, 32, 1), (32, 32, 2), (32, 64, 1), (64, 64, 2)]:
        layers += [nn.Conv2d(a, b, 3, stride=stride, padding=1), nn.GroupNorm(1, b), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    x, y = images(64)
    return Workload(model, F.cross_entropy, (F.pad(x, (2, 2, 2, 2)).repeat(1, 3, 1, 1), y))


class _Block(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _GPT(nn.Module):
    def __init__(self, vocabulary: int, d: int, heads: int, blocks: int, context: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, d), nn.Embedding(context, d)
        self.blocks = nn.Sequential(*(_Block(d, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def gpt(context: int = 128) -> Workload:
    """Four pre-norm blocks, d = 192, 6 heads, vocabulary 256, batch 8 of 128 characters of text."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    data = load("text", context=context, limit=8)
    return Workload(_GPT(256, 192, 6, 4, context), loss, (data.train_inputs, data.train_targets))


WORKLOADS = {"mlp": mlp, "cnn": cnn, "gpt": gpt, "overhead": overhead}
