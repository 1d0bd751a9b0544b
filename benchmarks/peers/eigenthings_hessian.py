"""hessian-eigenthings' HessianOperator: forward, backward and backward again for every product and every column."""

from __future__ import annotations

import torch
from hessian_eigenthings import HessianOperator
from torch import Tensor

from .common import Peer, Workload, math_attention


class PEER(Peer):
    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        self.operator = HessianOperator(
            work.model, [work.batch], lambda model, batch: work.loss_fn(model(batch[0]), batch[1])
        )

    def native(self, V: Tensor) -> list[Tensor]:
        return list(V.t().contiguous())

    def multiply(self, vectors: list[Tensor]) -> list[Tensor]:
        with math_attention():
            return [self.operator.matvec(v) for v in vectors]

    def flat(self, products: list[Tensor]) -> Tensor:
        return torch.stack(products, 1)
