"""An audit that is spread over the steps: a random vector that takes one power step every few solves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from .common import SymmetricOperator, gram, lengths_of, random_rows

_EVERY = 8  # solves between two of its products
_USES = 10  # products of one random vector


class Chain:
    """A vector that knows nothing of the run, multiplied once every few solves.

    Its product, less the part along the eigenvectors that are known, is the next vector: a power iteration that takes
    its steps with one operator after another, and turns towards an eigenvalue that nothing else sees. After ten
    products it starts again from a random vector.

    Attributes:
        vector: ``[1, n]``; None before the first use.
        age: solves since its last product.
        uses: products since the vector was random.
    """

    def __init__(self) -> None:
        self.vector: Tensor | None = None
        self.age = self.uses = 0

    def due(self, op: SymmetricOperator, generator: torch.Generator) -> Tensor | None:
        """Return the vector ``[1, n]`` if it is to be multiplied at this solve."""
        if self.age + 1 < _EVERY:
            return None
        if self.vector is None or self.uses >= _USES:
            self.vector, self.uses = random_rows(1, op, generator), 0
        return self.vector

    def advance(self, op: SymmetricOperator, product: Tensor | None, known: Tensor) -> None:
        """Count a solve, and take the step if there was one.

        Args:
            op: the operator.
            product: ``[1, n]`` of the vector that was due; None if it was not multiplied.
            known: ``[k, n]`` unit rows, whose part is taken out.
        """
        self.age += 1
        if product is None:
            return
        self.age, self.uses = 0, self.uses + 1
        rest = product - kernels.combine(gram(op, product, known), known)
        length = float(lengths_of(op, rest)[0])
        self.vector = rest / length if length > 0 else None  # None: an operator of rank k leaves nothing to look for

    def state(self) -> dict[str, Any]:
        """Return what continues identically."""
        return {"vector": None if self.vector is None else self.vector.clone(), "age": self.age, "uses": self.uses}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over ``state()``'s result."""
        self.vector, self.age, self.uses = state["vector"], state["age"], state["uses"]
