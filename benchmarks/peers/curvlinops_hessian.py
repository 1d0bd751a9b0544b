"""curvlinops' HessianLinearOperator, its probe of determinism switched off."""

from __future__ import annotations

import torch
from curvlinops import HessianLinearOperator
from torch import Tensor, nn

from .common import Peer, Workload, math_attention, with_forward_mode


class _Mean(nn.Module):
    """A loss function with the attribute by which curvlinops weighs batches."""

    reduction = "mean"

    def __init__(self, work: Workload) -> None:
        super().__init__()
        self.loss_fn = work.loss_fn

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.loss_fn(output, target)


class PEER(Peer):
    def __init__(self, work: Workload) -> None:
        work = with_forward_mode(work)
        super().__init__(work)
        with math_attention():
            self.operator = HessianLinearOperator(
                work.model, _Mean(work), self.params, [work.batch], check_deterministic=False
            )

    def native(self, V: Tensor) -> list[Tensor]:
        parts = V.split([p.numel() for p in self.params])
        return [part.reshape(*p.shape, -1).contiguous() for part, p in zip(parts, self.params, strict=True)]

    def multiply(self, vectors: list[Tensor]) -> list[Tensor]:
        with math_attention():
            return self.operator @ vectors

    def flat(self, products: list[Tensor]) -> Tensor:
        return torch.cat([t.reshape(-1, t.shape[-1]) for t in products])
