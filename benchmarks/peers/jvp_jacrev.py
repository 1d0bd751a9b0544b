"""``jvp(jacrev(loss))`` of torch.func, ``vmap`` over the columns: what curvlinops computes, without its checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, jacrev, jvp, vmap

from .common import Peer, Workload, math_attention, with_forward_mode

Tensors = tuple[Tensor, ...]


class PEER(Peer):
    def __init__(self, work: Workload) -> None:
        work = with_forward_mode(work)
        super().__init__(work)
        self.names = [name for name, p in work.model.named_parameters() if p.requires_grad]
        self.values = tuple(p.detach() for p in self.params)  # share their memory
        x, y = work.batch

        def loss(values: Tensors) -> Tensor:
            output = functional_call(work.model, dict(zip(self.names, values, strict=True)), (x,))
            return work.loss_fn(output, y)

        def product(values: Tensors, v: Tensors) -> Tensors:
            with math_attention():
                return jvp(jacrev(loss), (values,), (v,))[1]

        self.one: Any = product
        self.many: Any = lambda values, block: vmap(product, in_dims=(None, 0))(values, block)

    def native(self, V: Tensor) -> Tensors:
        if V.shape[1] == 1:
            return tuple(self.cut(V[:, 0].contiguous()))
        parts = V.t().contiguous().split([p.numel() for p in self.params], 1)
        return tuple(part.reshape(-1, *p.shape) for part, p in zip(parts, self.params, strict=True))

    def multiply(self, vectors: Tensors) -> Tensors:
        single = vectors[0].ndim == self.params[0].ndim
        with torch.no_grad():
            return (self.one if single else self.many)(self.values, vectors)

    def flat(self, products: Tensors) -> Tensor:
        if products[0].ndim == self.params[0].ndim:
            return torch.cat([t.reshape(-1) for t in products])[:, None]
        return torch.cat([t.reshape(len(t), -1) for t in products], 1).t()
