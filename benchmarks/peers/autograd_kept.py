"""Double backward through a graph kept from one forward and backward pass, as PyHessian does on one batch."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import Peer, math_attention

Tensors = list[Tensor]


class PEER(Peer):
    def prepare(self) -> None:
        with math_attention():
            self.gradients = torch.autograd.grad(self.loss(), self.params, create_graph=True)

    def native(self, V: Tensor) -> list[Tensors]:
        return [self.cut(v) for v in V.t().contiguous()]

    def multiply(self, vectors: list[Tensors]) -> list[Tensors]:
        return [list(torch.autograd.grad(self.gradients, self.params, v, retain_graph=True)) for v in vectors]

    def flat(self, products: list[Tensors]) -> Tensor:
        return torch.stack([torch.cat([t.reshape(-1) for t in one]) for one in products], 1)
