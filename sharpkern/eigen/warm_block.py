"""Block Lanczos for a slowly changing operator: fewer products one after the other, and a wider view."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .basis import Basis
from .chain import Chain
from .common import OF_PRODUCTS, EigenResult, SymmetricOperator, dimension, random_rows
from .stopping import converged, reason_of
from .warm_start import FIRST_TOL, WarmStart, reaches, stepped, usable

_BASIS = 40
_FIRST_ROUNDS = 3  # beyond convergence at the first step, the first of them with a random vector


class WarmBlockLanczos(WarmStart):
    """Finds the k largest algebraic eigenvalues of one operator after another, by products with a block of vectors.

    Each solve is block Lanczos over products with the present operator only. The first block is the predicted start and
    the next Ritz vectors of the last step, which are the eigenvectors that may have overtaken it; every later block is
    the residuals of the largest Ritz pairs. No guard but the chain is needed. Where a block costs little more than a
    vector, this takes half of ``WarmLanczos``'s time, and it misses fewer eigenvalues.

    Args:
        k, tol, max_matvecs, generator: see ``WarmStart``.
        width: vectors in a block, at least 2; at least ``k + 1`` are taken.

    Raises:
        ValueError: k, tol, max_matvecs or width out of range.

    Memory: ``width + k + 1`` vectors between steps, and the basis of a solve, two vectors per product; below 4 million
    float32 parameters the basis is kept too.
    Source: docs/explain/tracking.md; Golub and Underwood, The block Lanczos method for computing eigenvalues (1977).
    """

    _kept = (*WarmStart._kept, "others")

    def __init__(
        self,
        k: int = 1,
        tol: float = 0.01,
        max_matvecs: int = 80,
        generator: torch.Generator | None = None,
        *,
        width: int = 3,
    ) -> None:
        super().__init__(k, tol, max_matvecs, generator)
        if width < 2:
            raise ValueError(f"width must be at least 2, got {width}.")
        self.width = max(width, k + 1)
        self._others: Tensor | None = None  # [at most width - k, n], the next Ritz vectors
        self._chain = Chain()

    def step(
        self,
        op: SymmetricOperator,
        extra: Tensor | None = None,
        at_most: int | None = None,
        hint: Tensor | None = None,
    ) -> EigenResult:
        """Solve for the present operator; arguments, result and errors as for ``WarmLanczos.step``.

        Cost: ``matvecs`` products, of 3 to 12 vectors with a width of 3, one to four after the other; 40 to 60 and 15
        to 20 at the first step.
        """
        n = self._check(op)
        k, first = self.k, self._block is None
        tol = self.tol * (FIRST_TOL if first else 1.0)
        most = self.max_matvecs if at_most is None else at_most
        basis, product = self._begin(op, extra, usable(op, hint) if first else None, min(most, n))
        self.start_value = float(basis.T[0, 0])
        looks, hinted = _FIRST_ROUNDS if first else 0, extra is not None
        while True:
            theta, Y = basis.ritz()
            pairs = min(self.width, basis.size)
            residuals, norms = basis.residuals(theta[:pairs], Y[:, :pairs])
            rounding = basis.rounding()
            room = min(n - basis.size, most - basis.matvecs)
            if not room:
                break
            if converged(norms[:k], theta[:k], tol, rounding):
                if not looks and not (hinted and reaches(theta, norms, k)):
                    break
                if looks == _FIRST_ROUNDS:
                    residuals = torch.cat([random_rows(1, op, self.generator), residuals[1:]])
                looks, hinted = max(looks - 1, 0), False
            rows = residuals[:room]
            if basis.size + len(rows) > basis.limit:
                basis.restart(Y[:, : basis.limit // 2])
            basis.extend(rows)
        # The caller asked for tol, so a first solve that ran out of products between tol / 10 and tol has converged.
        within = converged(norms[:k], theta[:k], self.tol, rounding)
        reason = reason_of(within, norms[:k], theta[:k], self.tol, most)
        result = basis.result(theta, Y, list(range(k)), norms[:k], done=within, reason=reason, gaps=False)
        self._learn(basis, theta, Y, result.eigenvectors)
        self._chain.advance(op, product, result.eigenvectors)
        if pairs > k:  # a solve that was cut short saw none: the last ones are better than nothing
            self._others = stepped(basis, theta[k:pairs], Y[:, k:pairs])
        return replace(result, error_bounds=self._bounds(basis, theta, Y, norms[:k]) + OF_PRODUCTS * rounding)

    def _begin(
        self, op: SymmetricOperator, extra: Tensor | None, hint: Tensor | None, most: int
    ) -> tuple[Basis, Tensor | None]:
        """Multiply the first block; return the product of the chain's vector besides, if it was in the block."""
        first, asked = self._block is None, 0 if extra is None else len(extra)
        size = min(max(_BASIS, 4 * self.width), dimension(op))
        basis = Basis(op, size, self.generator, self._memory(op, first))
        # With products for one block alone, the start's residuals are worth more than vectors of the last step.
        roomy = most > max(self.width, self.k + asked)
        guard = self._chain.due(op, self.generator) if roomy and not first else None
        guards = [rows for rows in (extra, guard) if rows is not None]
        # Blocks are all of one width, as each width has a recording of its own: a guard takes the last one's place.
        places = max(0, self.width - self.k - sum(len(rows) for rows in guards)) if roomy else 0
        rows = [self._start(op, hint), *guards]
        if first:
            rows.insert(1, random_rows(places, op, self.generator))
        elif self._others is not None:
            rows.insert(1, self._others[:places])
        block = torch.cat(rows)[:most]
        basis.extend(block)
        return basis, None if guard is None else basis.W[len(block) - 1 : len(block)].clone()

    def state_dict(self) -> dict[str, Any]:
        """Return what continues identically, the generator's state included: tensors and plain Python only."""
        return {**super().state_dict(), "chain": self._chain.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict()``'s result; the constructor's arguments stay.

        Raises:
            ValueError: a field is missing or unknown, or the state is of another version.
        """
        super().load_state_dict({name: value for name, value in state.items() if name != "chain"})
        self._chain.restore(state["chain"])
