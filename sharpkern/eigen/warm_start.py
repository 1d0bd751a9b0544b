"""What warm solvers share: where a step starts, the bounds that it reports, its memory, and its saved state."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from .basis import Basis, Workspace
from .common import SymmetricOperator, dimension, gram, lengths_of, norms_of, random_rows, unit_rows
from .state import check_state

FIRST_TOL = 0.1  # a random start stops more easily on a wrong eigenvector: ask for more, once
_FORGET_FIT = 0.7  # weight of the older steps in the prediction's least squares, per step
_RIDGE = 0.01  # keeps the fitted multiple finite, and a little short, where the block hardly changed
_KEPT_BYTES = 16 << 20  # of a vector, up to which the memory of a basis is kept between steps
_VERSION = 2  # of a saved state: raise it when a field changes its name or its meaning


class WarmStart:
    """Base of the solvers for one operator after another: k Ritz vectors and the prediction of the next ones.

    The start is the last Ritz block after one power step (its product is known) plus a multiple of its last change;
    the multiple would have been right, by least squares, at the steps before. Along a period of two, as at the edge
    of stability, it is close to -1.

    Args:
        k: how many eigenvalues.
        tol: relative residual norm at which to stop; a tenth of it at the first step.
        max_matvecs: the most products per step; at least k.
        generator: of random vectors, on the CPU; None for seed 0.

    Attributes:
        start_value: Rayleigh quotient, with the last step's operator, of the vector that it started from.

    Raises:
        ValueError: k, tol or max_matvecs out of range.

    Source: a linear prediction as in Kolafa, Time-reversible always stable predictor-corrector method (2004).
    """

    _predicts = True
    # Attributes that a later step depends on, without their underscore. The workspace is memory, not knowledge.
    _kept: tuple[str, ...] = ("block", "change", "theta", "normal", "right")

    def __init__(
        self, k: int = 1, tol: float = 0.01, max_matvecs: int = 80, generator: torch.Generator | None = None
    ) -> None:
        if k < 1 or not tol > 0 or max_matvecs < k:
            raise ValueError(f"need k >= 1, tol > 0 and max_matvecs >= k, got {k}, {tol} and {max_matvecs}.")
        self.k, self.tol, self.max_matvecs = k, tol, max_matvecs
        self.generator = generator or torch.Generator().manual_seed(0)
        self._block: Tensor | None = None  # [k, n], where the next step starts but for the prediction
        self._change: Tensor | None = None  # [k, n], the block less the one before, turned to fit it
        self.workspace: Workspace | None = None
        self.start_value = 0.0
        self._theta = 0.0
        self._normal = self._right = 0.0  # of the prediction's least squares

    def _check(self, op: SymmetricOperator) -> int:
        """Return the length of a vector, at least k."""
        n = dimension(op)
        if self.k > n:
            raise ValueError(f"k must be at most n = {n}, got {self.k}.")
        return n

    def _memory(self, op: SymmetricOperator, first: bool) -> Workspace:
        """Return the memory of the last solve, unless it would bind much: the first solve's basis is the longest."""
        if first or op.n * op.dtype.itemsize > _KEPT_BYTES:
            return Workspace(op)
        self.workspace = self.workspace or Workspace(op)
        return self.workspace

    def _start(self, op: SymmetricOperator, hint: Tensor | None) -> Tensor:
        """Return the block plus the fitted multiple of its last change.

        At the first step random vectors, the first of them with as much of ``hint`` in it: it must not be lost where
        the hint has no part along the eigenvector.
        """
        if self._block is None:
            rows = random_rows(self.k, op, self.generator)
            if hint is not None:
                rows[:1] = unit_rows(op, rows[:1]) + unit_rows(op, hint)
            return rows
        assert self._change is not None
        if not self._predicts or self._normal == 0:
            return self._block
        return torch.add(self._block, self._change, alpha=self._right / ((1 + _RIDGE) * self._normal))

    def _bounds(self, basis: Basis, theta: Tensor, Y: Tensor, norms: Tensor) -> Tensor:
        """Return the residual norms; of a pair and the next one together, where they are closer than twice ``tol``.

        A residual of ``tol`` cannot tell two such eigenvalues apart: it may be small at the lower one.
        """
        k = self.k
        following = torch.zeros_like(norms)
        following[:-1] = norms[1:]
        close = torch.zeros_like(norms, dtype=torch.bool)
        seen = min(k, len(theta) - 1)  # pairs with a next one
        close[:seen] = theta[:seen] - theta[1 : seen + 1] < 2 * self.tol * theta[:seen].abs()
        if close[k - 1]:
            following[k - 1] = basis.residuals(theta[k : k + 1], Y[:, k : k + 1])[1][0]
        return torch.where(close, torch.hypot(norms, following), norms)

    def _learn(self, basis: Basis, theta: Tensor, Y: Tensor, vectors: Tensor) -> None:
        """Keep the next start, and fit the prediction."""
        k = self.k
        block = stepped(basis, theta[:k], Y[:, :k], vectors)
        if self._block is None:
            self._change = torch.zeros_like(block)
        else:
            assert self._change is not None
            # The block before, turned within its span to fit the new one: a sign for k = 1.
            U, cosines, V = torch.linalg.svd(gram(basis.op, block, self._block).cpu())
            turn = (U @ V).to(block.device)
            # Blocks that hardly overlap (a crossing, a catapult) have no change that a prediction could learn from.
            if float(cosines.min()) > 0.2:
                now, before, size = (gram(basis.op, t, self._change) for t in (vectors, self._block, self._change))
                along = (turn * now).sum() - before.diagonal().sum()  # of the vectors turned back, less the block
                self._normal = _FORGET_FIT * self._normal + float(size.diagonal().sum())
                self._right = _FORGET_FIT * self._right + float(along)
            self._change = block - kernels.combine(turn, self._block)
        self._block, self._theta = block, float(theta[0])

    def state_dict(self) -> dict[str, Any]:
        """Return what continues identically, the generator's state included: tensors and plain Python only."""
        kept = {name: getattr(self, f"_{name}") for name in self._kept}
        copies = {name: v.clone() if isinstance(v, Tensor) else v for name, v in kept.items()}
        return {"version": _VERSION, **copies, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict()``'s result; the constructor's arguments stay.

        Raises:
            ValueError: a field is missing or unknown, or the state is of another version.
        """
        check_state(type(self).__name__, state, (*self._kept, "generator"), _VERSION)
        for name in self._kept:
            setattr(self, f"_{name}", state[name])
        self.generator.set_state(state["generator"])


def usable(op: SymmetricOperator, hint: Tensor | None) -> Tensor | None:
    """Return a hint ``[1, n]`` that has a length, and None in the place of one that is zero or not finite."""
    return hint if hint is not None and 0 < float(norms_of(op, hint)[0]) < math.inf else None


def reaches(theta: Tensor, norms: Tensor, k: int) -> bool:
    """Say whether the residual interval of a Ritz pair beyond the first k reaches above the first.

    A caller's vector may have a part along a larger eigenvalue, and the rest of it elsewhere: then its Ritz value is
    small, and only its residual tells.
    """
    return bool((theta[k : len(norms)] + norms[k:] > theta[0]).any())


def stepped(basis: Basis, theta: Tensor, Y: Tensor, vectors: Tensor | None = None) -> Tensor:
    """Return Ritz vectors after one power step, for which the products are known, as unit rows.

    Args:
        basis: of Ritz values theta ``[m]``, with coordinates Y ``[size, m]``.
        vectors: the Ritz vectors themselves, ``[m, n]``, if they are at hand.
    """
    products = basis.combination(Y, basis.W)
    # Multiplied by a negative eigenvalue, a vector would turn its sign and a power step would favour the lower end.
    # Nor by one of rounding size: its product may be zero.
    positive = theta > basis.rounding()
    if not bool(positive.all()):
        vectors = basis.combination(Y) if vectors is None else vectors
        products = torch.where(positive[:, None].to(products.device), products, vectors)
    return products / lengths_of(basis.op, products)[:, None]
