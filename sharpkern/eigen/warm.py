"""Lanczos for a slowly changing operator: warm-started from the last step's Ritz vectors, and guarded.

A residual certifies *an* eigenvalue, not the top one: a solver that starts on the second eigenvector stays
there, with a small residual, after the two have crossed. So a second Ritz vector and, rarely, a random vector
are multiplied besides (the guards). They make a missed eigenvalue unlikely, not impossible. docs/tracking.md
has the algorithm on one page, with what it costs and how often it fails.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from .basis import Basis, Workspace
from .common import OF_PRODUCTS, EigenResult, SymmetricOperator, dimension, gram, lengths_of, random_rows
from .state import check_state
from .stopping import converged, reason_of

_FIRST_TOL = 0.1  # a random start stops more easily on a wrong eigenvector: ask for more, once
_FIRST_AUDIT, _AUDIT_EVERY, _AUDIT_DEPTH = 16, 32, 8
_SENTINEL_EVERY = 8
_CLOSE = 0.1  # relative gap below which a crossing is near, and every step starts with the next Ritz vector too
_JUMP = 0.1  # relative change of the Rayleigh quotient from one step to the next
_THROW = 0.3  # likewise: a catapult, after which the order of the eigenvalues is open
_FORGET_FIT = 0.7  # weight of the older steps in the prediction's least squares, per step
_RIDGE = 0.01  # keeps the fitted multiple finite, and a little short, where the block hardly changed
_BASIS = 40
_KEPT_BYTES = 16 << 20  # of a vector, up to which the memory of a basis is kept between steps
_VERSION = 1  # of a saved state: raise it when a field changes its name or its meaning
# Attributes that a later step depends on, without their underscore. The workspace is memory, not knowledge.
_KEPT = ("block", "change", "next", "theta", "gap", "normal", "right", "since_sentinel", "since_audit")


@dataclass
class _Guards:
    """What one solve is to look at besides its own residuals.

    Attributes:
        todo: "next", "random" or "improve" for each vector to multiply, last one first.
        sentinel: the next Ritz vector is looked at in this solve.
        jumped: the start's Rayleigh quotient is far from the last value, and nothing has been done about it yet.
        thrown: it is so far that the order of the eigenvalues is open.
    """

    todo: list[str]
    sentinel: bool
    jumped: bool
    thrown: bool


class WarmLanczos:
    """Finds the k largest algebraic eigenvalues of one operator after another.

    Each solve is Rayleigh-Ritz over products with the present operator only, expanded by the residual that is
    furthest from ``tol``. The start is the last Ritz block after one power step (its product is known) plus a
    multiple of its last change; the multiple would have been right, by least squares, at the steps before. Along
    a period of two, as at the edge of stability, it is close to -1.

    Guards: while the next Ritz value is within 10%, its vector is multiplied at every start (1 product, which also
    shortens the solve). Else it is multiplied and improved once (2 products) every 8 steps, and after a jump of the
    Rayleigh quotient, by more than 30% or in a short solve. A random vector, improved 8 times, every 32 steps.

    Args:
        k: how many eigenvalues.
        tol: relative residual norm at which to stop; a tenth of it at the first step.
        max_matvecs: the most products per step; at least k.
        generator: of random vectors, on the CPU; None for seed 0.

    Attributes:
        start_value: Rayleigh quotient, with the last step's operator, of the vector that it started from.

    Raises:
        ValueError: k, tol or max_matvecs out of range.

    Memory: 2k + 1 vectors between steps, and the basis of a solve, two vectors per product; below 4 million float32
    parameters the basis is kept too.
    Source: docs/tracking.md. The start is a linear prediction as in Kolafa, Time-reversible always stable
    predictor-corrector method (2004).
    """

    _short = 4  # a basis of this many vectors beyond k - 1 has looked around by itself after a jump
    _predicts = True

    def __init__(
        self, k: int = 1, tol: float = 0.01, max_matvecs: int = 80, generator: torch.Generator | None = None
    ) -> None:
        if k < 1 or not tol > 0 or max_matvecs < k:
            raise ValueError(f"need k >= 1, tol > 0 and max_matvecs >= k, got {k}, {tol} and {max_matvecs}.")
        self.k, self.tol, self.max_matvecs = k, tol, max_matvecs
        self.generator = generator or torch.Generator().manual_seed(0)
        self._block: Tensor | None = None  # [k, n], where the next step starts but for the prediction
        self._change: Tensor | None = None  # [k, n], the block less the one before, turned to fit it
        self._next: Tensor | None = None  # [n], Ritz vector k + 1
        self.workspace: Workspace | None = None
        self.start_value = 0.0
        self._theta = 0.0
        self._gap = 1.0  # relative, from Ritz value k to k + 1
        self._normal = self._right = 0.0  # of the prediction's least squares
        self._since_sentinel = self._since_audit = 0

    def step(self, op: SymmetricOperator, extra: Tensor | None = None, at_most: int | None = None) -> EigenResult:
        """Solve for the present operator.

        Args:
            op: symmetric; like the last one in n, dtype and device.
            extra: ``[m, n]``, vectors to multiply besides, for m products.
            at_most: products, where this step may not have ``max_matvecs``.

        Returns:
            An ``EigenResult``; ``converged`` says that each residual norm is at most ``tol * |theta|``. Where the
            next Ritz value is closer than twice ``tol``, an error bound is the norm of both residuals.

        Raises:
            ValueError: the operator's products have a wrong shape, or k is above n.
            RuntimeError: a product is not finite.

        Cost: ``matvecs`` products: 1 to 10, 20 to 50 at the first step.
        """
        n = dimension(op)
        if self.k > n:
            raise ValueError(f"k must be at most n = {n}, got {self.k}.")
        k, first = self.k, self._block is None
        tol = self.tol * (_FIRST_TOL if first else 1.0)
        most = self.max_matvecs if at_most is None else at_most
        near = not first and self._next is not None and self._gap < _CLOSE and most > k + 1
        basis = self._begin(op, extra, first=first, near=near)
        self.start_value = float(basis.T[0, 0])
        guards = self._guards(first=first, near=near)
        while True:
            theta, Y = basis.ritz()
            residuals, norms = basis.residuals(theta[:k], Y[:, :k])
            rounding = basis.rounding()
            if basis.size == n or basis.matvecs >= most:
                break
            if not converged(norms, theta[:k], tol, rounding):
                worst = int((norms / theta[:k].abs()).argmax())
                direction = residuals[worst : worst + 1]
            elif guards.todo or self._suspects(guards, basis.size):
                direction = self._look(guards.todo.pop(), basis, theta, Y)
            else:
                break
            if basis.size == basis.limit:
                basis.restart(Y[:, : max(k + 1, basis.limit // 2)])
            basis.extend(direction)
        self._postpone(guards)
        # The caller asked for tol, so a first solve that ran out of products between tol / 10 and tol has converged.
        within = converged(norms, theta[:k], self.tol, rounding)
        reason = reason_of(within, norms, theta[:k], self.tol, most)
        result = basis.result(theta, Y, list(range(k)), norms, done=within, reason=reason, gaps=False)
        self._remember(basis, theta, Y, result.eigenvectors, sentinel=guards.sentinel)
        return replace(result, error_bounds=self._bounds(basis, theta, Y, norms) + OF_PRODUCTS * rounding)

    def _begin(self, op: SymmetricOperator, extra: Tensor | None, *, first: bool, near: bool) -> Basis:
        """Multiply what every solve multiplies: the start, the next Ritz vector while it is near, and the caller's."""
        basis = Basis(op, min(max(_BASIS, 2 * self.k + 20), dimension(op)), self.generator, self._memory(op, first))
        rows = [random_rows(self.k, op, self.generator) if first else self._start()]
        if near:
            assert self._next is not None
            rows.append(self._next[None])
        basis.extend(torch.cat(rows if extra is None else [*rows, extra]))
        return basis

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

    def _guards(self, *, first: bool, near: bool) -> _Guards:
        """Say which vectors are to be multiplied besides, by the age of each guard, and how far the start jumped."""
        todo = []
        self._since_sentinel, self._since_audit = self._since_sentinel + 1, self._since_audit + 1
        if first or self._since_audit >= _AUDIT_EVERY:
            todo += ["improve"] * (_FIRST_AUDIT if first else _AUDIT_DEPTH) + ["random"]
            self._since_audit = 0
        if near:  # the start holds the sentinel's vector already
            self._since_sentinel = 0
        elif not first and self._since_sentinel >= _SENTINEL_EVERY:
            todo += ["improve", "next"]
            self._since_sentinel = 0
        jump = 0.0 if first else abs(self.start_value - self._theta)
        size = abs(self._theta)
        return _Guards(todo, near or "next" in todo, jumped=jump > _JUMP * size, thrown=jump > _THROW * size)

    def _suspects(self, guards: _Guards, size: int) -> bool:
        """Ask for the sentinel once, if the start jumped and the solve was too short to have looked around by itself.

        A small residual after a jump may belong to a vector that is no longer the top one. After a catapult the order
        of the eigenvalues is open, so that no length of the solve is enough.
        """
        if not guards.jumped or (size >= self.k - 1 + self._short and not guards.thrown):
            return False
        guards.todo, guards.sentinel, guards.jumped = ["improve", "next"], True, False
        self._since_sentinel = 0
        return True

    def _postpone(self, guards: _Guards) -> None:
        """Leave guards that there were no products for due at the next step."""
        if "random" in guards.todo:
            self._since_audit = _AUDIT_EVERY
        if "next" in guards.todo:
            self._since_sentinel = _SENTINEL_EVERY

    def _memory(self, op: SymmetricOperator, first: bool) -> Workspace:
        """Return the memory of the last solve, unless it would bind much: the first solve's basis is the longest."""
        if first or op.n * op.dtype.itemsize > _KEPT_BYTES:
            return Workspace(op)
        self.workspace = self.workspace or Workspace(op)
        return self.workspace

    def _look(self, what: str, basis: Basis, theta: Tensor, Y: Tensor) -> Tensor:
        """Return a guard's vector, ``[1, n]``."""
        k = self.k
        if what == "next" and self._next is not None:
            return self._next[None]
        if what == "improve" and basis.size > k:
            return basis.residuals(theta[k : k + 1], Y[:, k : k + 1])[0]
        return random_rows(1, basis.op, self.generator)

    def _start(self) -> Tensor:
        """Return the block plus the fitted multiple of its last change."""
        assert self._block is not None
        assert self._change is not None
        if not self._predicts or self._normal == 0:
            return self._block
        return torch.add(self._block, self._change, alpha=self._right / ((1 + _RIDGE) * self._normal))

    def _remember(self, basis: Basis, theta: Tensor, Y: Tensor, vectors: Tensor, *, sentinel: bool) -> None:
        """Keep the next start, fit the prediction, and keep the next Ritz vector of a basis that could see it."""
        k = self.k
        products = basis.combination(Y[:, :k], basis.W)  # a power step, for which the product is known
        # Multiplied by a negative eigenvalue, a vector would turn its sign and a power step would favour the lower end.
        # Nor by one of rounding size: its product may be zero.
        positive = theta > basis.rounding()
        block = torch.where(positive[:k, None].to(products.device), products, vectors)
        block = block / lengths_of(basis.op, block)[:, None]
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
        # A small basis that was not given the next vector cannot see it: its Ritz vector k + 1 is a chance direction.
        if basis.size > k and (sentinel or basis.size >= k + 3 or self._next is None):
            row = basis.combination(Y[:, k : k + 1], basis.W if bool(positive[k]) else basis.Q)[0]
            self._next = row / lengths_of(basis.op, row[None])[0]
            self._gap = 1 - float(theta[k] / theta[k - 1]) if float(theta[k - 1]) > 0 else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return what continues identically, the generator's state included: tensors and plain Python only."""
        kept = {name: getattr(self, f"_{name}") for name in _KEPT}
        copies = {name: v.clone() if isinstance(v, Tensor) else v for name, v in kept.items()}
        return {"version": _VERSION, **copies, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict()``'s result; k, tol and max_matvecs stay the constructor's.

        Raises:
            ValueError: a field is missing or unknown, or the state is of another version.
        """
        check_state("WarmLanczos", state, (*_KEPT, "generator"), _VERSION)
        for name in _KEPT:
            setattr(self, f"_{name}", state[name])
        self.generator.set_state(state["generator"])
