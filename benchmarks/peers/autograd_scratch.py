"""Forward, backward and backward again for every product."""

from __future__ import annotations

import torch
from torch import Tensor

from . import autograd_kept
from .common import math_attention

Tensors = list[Tensor]


class PEER(autograd_kept.PEER):
    def prepare(self) -> None:
        pass

    def multiply(self, vectors: list[Tensors]) -> list[Tensors]:
        products = []
        for v in vectors:
            with math_attention():
                gradients = torch.autograd.grad(self.loss(), self.params, create_graph=True)
                products.append(list(torch.autograd.grad(gradients, self.params, v)))
        return products
