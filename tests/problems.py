"""Small models with losses and batches, and the truths that tests compare with: double backward, dense matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import sharpkern as sk
from sharpkern.curvature.losses import LossModule


class Problem(NamedTuple):
    """Model, loss and batch, as ``HessianOperator`` takes them."""

    model: nn.Module
    loss_fn: Callable[..., Tensor]
    batch: Any


def randomise(model: nn.Module) -> nn.Module:
    """Move every parameter off its special initial value (norm weights of one, biases of zero)."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


class Block(nn.Module):
    """Pre-norm transformer block with causal attention."""

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


class TinyGPT(nn.Module):
    """Embedding, blocks, norm, and a head tied to the embedding."""

    def __init__(self, vocabulary: int = 13, d: int = 8, heads: int = 2, blocks: int = 2, context: int = 7) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, d), nn.Embedding(context, d)
        self.blocks = nn.ModuleList(Block(d, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def mlp() -> Problem:
    """Tanh network, cross-entropy."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 3))
    return Problem(randomise(model), F.cross_entropy, (torch.randn(9, 5), torch.randint(0, 3, (9,))))


def cnn() -> Problem:
    """Convolutions with group norm, pooling, mean-squared error."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), nn.Softplus(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    return Problem(randomise(model), F.mse_loss, (torch.randn(4, 2, 7, 9), torch.randn(4, 3)))


def gpt() -> Problem:
    """Two causal transformer blocks with a tied head."""
    tokens = torch.randint(0, 13, (3, 8))

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return Problem(randomise(TinyGPT()), loss, (tokens[:, :-1], tokens[:, 1:]))


def double(problem: Problem) -> Problem:
    """Return the problem in float64."""
    return cast(problem, torch.float64)


def cast(problem: Problem, dtype: torch.dtype) -> Problem:
    """Return the problem with parameters and floating inputs of a dtype."""
    batch = torch.utils._pytree.tree_map_only(
        Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, problem.batch
    )
    return Problem(problem.model.to(dtype), problem.loss_fn, batch)


def loss_and_gradient(problem: Problem) -> tuple[Tensor, Tensor]:
    """Loss and flat gradient by autograd; the gradient keeps its graph."""
    params = [p for p in problem.model.parameters() if p.requires_grad]
    module = LossModule(problem.model, problem.loss_fn)
    buffers = {name: b.clone() for name, b in module.named_buffers()}  # the model's own stay as they are
    with sdpa_kernel(SDPBackend.MATH):
        loss, _ = torch.func.functional_call(module, buffers, (problem.batch,))
        parts = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    return loss.detach(), torch.cat([g.reshape(-1) for g in parts])


def hessian_times(problem: Problem, block: Tensor) -> Tensor:
    """``[k, n] -> [k, n]`` by double backward."""
    params = [p for p in problem.model.parameters() if p.requires_grad]
    _, gradient = loss_and_gradient(problem)
    rows = []
    for v in block:
        parts = torch.autograd.grad(gradient @ v, params, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in parts]))
    return torch.stack(rows)


def dense_hessian(problem: Problem) -> Tensor:
    """The ``[n, n]`` Hessian, row by row."""
    n = sum(p.numel() for p in problem.model.parameters() if p.requires_grad)
    return hessian_times(problem, torch.eye(n, dtype=next(problem.model.parameters()).dtype))


def operator(problem: Problem, **options: Any) -> sk.HessianOperator:
    """The product under test."""
    return sk.HessianOperator(*problem, **options)


def relative(got: Tensor, want: Tensor) -> float:
    """Largest error relative to the largest entry of the truth."""
    return float((got - want).abs().max() / want.abs().max())


PROBLEMS = {"mlp": mlp, "cnn": cnn, "gpt": gpt}
