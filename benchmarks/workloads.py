"""The models that benchmarks run, on real data: MLP, CNNs with norms, GPTs, and one bound by call overhead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from sharpkern.train.config import DataConfig
from sharpkern.train.data import load


class Workload(NamedTuple):
    """Model, loss and batch, as ``HessianOperator`` takes them."""

    model: nn.Module
    loss_fn: Callable[..., Tensor]
    batch: Any


def images(count: int) -> tuple[Tensor, Tensor]:
    """``[count, 1, 28, 28]`` standardised photographs of clothes, and their classes."""
    data = load(DataConfig("fashion-mnist-5k", limit=count))
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


def cnn(batch: int = 64) -> Workload:
    """Four 3x3 convolutions of 32 and 64 channels with layer norm over channels and pixels, batch 64 of 3x32x32."""
    layers: list[nn.Module] = []
    for a, b, stride in [(3, 32, 1), (32, 32, 2), (32, 64, 1), (64, 64, 2)]:
        layers += [nn.Conv2d(a, b, 3, stride=stride, padding=1), nn.GroupNorm(1, b), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    x, y = images(batch)
    return Workload(model, F.cross_entropy, (F.pad(x, (2, 2, 2, 2)).repeat(1, 3, 1, 1), y))


class _WideBlock(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, a), nn.GroupNorm(1, b)
        self.conv1 = nn.Conv2d(a, b, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(b, b, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(a, b, 1, stride=stride, bias=False) if a != b else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        y = self.conv2(F.relu(self.norm2(self.conv1(h))))
        return y + (x if self.shortcut is None else self.shortcut(h))


class WideResNet(nn.Module):
    """WRN-16 of Zagoruyko and Komodakis (2016), layer norm over channels and pixels in place of batch norm."""

    def __init__(self, widen: int) -> None:
        super().__init__()
        widths, blocks = (16, 16 * widen, 32 * widen, 64 * widen), []
        for group, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
            blocks += [_WideBlock(a, b, 2 if group else 1), _WideBlock(b, b, 1)]
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.readout = nn.GroupNorm(1, widths[-1]), nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(F.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3)))


def wrn(widen: int = 2, batch: int = 16) -> Workload:
    """WRN-16-2 with layer norm, 0.7 million parameters, batch 16 of 3x32x32."""
    x, y = images(batch)
    return Workload(WideResNet(widen), F.cross_entropy, (F.pad(x, (2, 2, 2, 2)).repeat(1, 3, 1, 1), y))


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


class GPT(nn.Module):
    """Pre-norm transformer after GPT-2; like it, a tied one reads out with its token embedding."""

    def __init__(self, vocabulary: int, d: int, heads: int, blocks: int, context: int, *, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, d), nn.Embedding(context, d)
        self.blocks = nn.Sequential(*(_Block(d, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary, bias=False)
        if tied:
            nn.init.normal_(self.embed.weight, 0.0, 0.02)
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def _per_token(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def gpt(context: int = 128, batch: int = 8, d: int = 192, blocks: int = 4) -> Workload:
    """Four pre-norm blocks, d = 192, 6 heads, vocabulary 256, batch 8 of 128 characters: 1.9 million parameters."""
    data = load(DataConfig("text", context=context, limit=batch))
    return Workload(GPT(256, d, 6, blocks, context), _per_token, (data.train_inputs, data.train_targets))


def gpt2(context: int = 128, batch: int = 1) -> Workload:
    """GPT-2's 12 blocks, d = 768, 12 heads, vocabulary 50257, tied: 124 million parameters; one text of 128 tokens.

    The tokens are characters spread over the vocabulary, for want of GPT-2's tokeniser; the arithmetic is the same.
    """
    data = load(DataConfig("text", context=context, limit=batch))
    model = GPT(50257, 768, 12, 12, 1024, tied=True)
    return Workload(model, _per_token, tuple(t * 211 for t in (data.train_inputs, data.train_targets)))


WORKLOADS = {"mlp": mlp, "cnn": cnn, "wrn": wrn, "gpt": gpt, "gpt2": gpt2, "overhead": overhead}
