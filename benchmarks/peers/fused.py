"""sharpkern: primal sweeps once, tangent sweeps per product."""

from __future__ import annotations

from torch import Tensor

import sharpkern as sk

from .common import Peer, Workload


class PEER(Peer):
    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        self.operator = sk.HessianOperator(*work)

    def prepare(self) -> None:
        self.operator.refresh()

    def native(self, V: Tensor) -> Tensor:
        return V.t().contiguous().t()

    def multiply(self, vectors: Tensor) -> Tensor:
        return self.operator.matmat(vectors)

    def flat(self, products: Tensor) -> Tensor:
        return products
