"""Lanczos for a slowly changing operator: warm-started from the last step's Ritz vectors, and guarded.

A residual certifies *an* eigenvalue, not the top one: a solver that starts on the second eigenvector stays
there, with a small residual, after the two have crossed. So a second Ritz vector and, rarely, a random vector
are multiplied besides (the guards). They make a missed eigenvalue unlikely, not impossible. docs/explain/tracking.md
has the algorithm on one page, with what it costs and how often it fails.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .basis import Basis
from .common import OF_PRODUCTS, EigenResult, SymmetricOperator, dimension, gram, random_rows
from .stopping import converged, reason_of
from .warm_start import FIRST_TOL, WarmStart, reaches, stepped, usable

_FIRST_AUDIT, _AUDIT_EVERY, _AUDIT_DEPTH = 16, 32, 8
_HINTED_TOL, _HINTED_LOOKS = 0.2, 2  # of a first step with a hint, in the place of FIRST_TOL and the audit
_SENTINEL_EVERY = 8
_CLOSE = 0.1  # relative gap below which a crossing is near, and every step starts with the next Ritz vector too
_JUMP = 0.1  # relative change of the Rayleigh quotient from one step to the next
_THROW = 0.3  # likewise: a catapult, after which the order of the eigenvalues is open
_BASIS = 40


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


class WarmLanczos(WarmStart):
    """Finds the k largest algebraic eigenvalues of one operator after another.

    Each solve is Rayleigh-Ritz over products with the present operator only, expanded by the residual that is
    furthest from ``tol``.

    Guards: while the next Ritz value is within 10%, its vector is multiplied at every start (1 product, which also
    shortens the solve). Else it is multiplied and improved once (2 products) every 8 steps, and after a jump of the
    Rayleigh quotient, by more than 30% or in a short solve. A random vector, improved 8 times, every 32 steps.

    Args, attributes and errors: see ``WarmStart``.

    Memory: 2k + 1 vectors between steps, and the basis of a solve, two vectors per product; below 4 million float32
    parameters the basis is kept too.
    Source: docs/explain/tracking.md.
    """

    _short = 4  # a basis of this many vectors beyond k - 1 has looked around by itself after a jump
    _kept = (*WarmStart._kept, "next", "gap", "since_sentinel", "since_audit")

    def __init__(
        self, k: int = 1, tol: float = 0.01, max_matvecs: int = 80, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(k, tol, max_matvecs, generator)
        self._next: Tensor | None = None  # [n], Ritz vector k + 1
        self._gap = 1.0  # relative, from Ritz value k to k + 1
        self._since_sentinel = self._since_audit = 0

    def step(
        self,
        op: SymmetricOperator,
        extra: Tensor | None = None,
        at_most: int | None = None,
        hint: Tensor | None = None,
    ) -> EigenResult:
        """Solve for the present operator.

        Args:
            op: symmetric; like the last one in n, dtype and device.
            extra: ``[m, n]``, vectors to multiply besides, for m products, or one more where a residual interval of the
                basis reaches above the first value.
            at_most: products, where this step may not have ``max_matvecs``.
            hint: ``[1, n]``, a vector with a part along the top eigenvector, as the loss's gradient has. Half of the
                start of the first step for k = 1, which is then as safe with fewer products; not looked at otherwise.

        Returns:
            An ``EigenResult``; ``converged`` says that each residual norm is at most ``tol * |theta|``. Where the
            next Ritz value is closer than twice ``tol``, an error bound is the norm of both residuals.

        Raises:
            ValueError: the operator's products have a wrong shape, or k is above n.
            RuntimeError: a product is not finite.

        Cost: ``matvecs`` products: 1 to 10; at the first step 8 to 17 with a hint, and 20 to 50 without.
        """
        n = self._check(op)
        k, first = self.k, self._block is None
        # Of one vector it is known how often such a start goes wrong; for more the audit stays.
        hint = usable(op, hint) if first and k == 1 else None
        tol = self.tol * (1.0 if not first else FIRST_TOL if hint is None else _HINTED_TOL)
        most = self.max_matvecs if at_most is None else at_most
        near = not first and self._next is not None and self._gap < _CLOSE and most > k + 1
        basis = self._begin(op, extra, hint, first=first, near=near)
        self.start_value = float(basis.T[0, 0])
        guards = self._guards(first=first, hinted=hint is not None, near=near)
        hinted = extra is not None
        direction: Tensor | None
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
            elif hinted and (direction := self._reaching(basis, theta, Y)) is not None:
                hinted = False
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
        self._learn(basis, theta, Y, result.eigenvectors)
        self._remember(basis, theta, Y, sentinel=guards.sentinel)
        return replace(result, error_bounds=self._bounds(basis, theta, Y, norms) + OF_PRODUCTS * rounding)

    def _begin(
        self, op: SymmetricOperator, extra: Tensor | None, hint: Tensor | None, *, first: bool, near: bool
    ) -> Basis:
        """Multiply what every solve multiplies: the start, the next Ritz vector while it is near, and the caller's."""
        basis = Basis(op, min(max(_BASIS, 2 * self.k + 20), dimension(op)), self.generator, self._memory(op, first))
        rows = [self._start(op, hint)]
        if near:
            assert self._next is not None
            rows.append(self._next[None])
        basis.extend(torch.cat(rows if extra is None else [*rows, extra]))
        return basis

    def _guards(self, *, first: bool, hinted: bool, near: bool) -> _Guards:
        """Say which vectors are to be multiplied besides, by the age of each guard, and how far the start jumped."""
        todo = []
        self._since_sentinel, self._since_audit = self._since_sentinel + 1, self._since_audit + 1
        if hinted:
            todo += ["improve"] * _HINTED_LOOKS
        elif first or self._since_audit >= _AUDIT_EVERY:
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

    def _look(self, what: str, basis: Basis, theta: Tensor, Y: Tensor) -> Tensor:
        """Return a guard's vector, ``[1, n]``."""
        k = self.k
        if what == "next" and self._next is not None:
            return self._next[None]
        if what == "improve" and basis.size > k:
            return basis.residuals(theta[k : k + 1], Y[:, k : k + 1])[0]
        return random_rows(1, basis.op, self.generator)

    def _reaching(self, basis: Basis, theta: Tensor, Y: Tensor) -> Tensor | None:
        """Return the largest residual ``[1, n]`` if a pair beyond the wanted ones may hide the largest eigenvalue."""
        products = basis.W[: basis.size]
        # All norms from one small matrix, as |W'y|^2 - theta^2: all residuals would need as much memory as the basis.
        squares = (Y * (gram(basis.op, products, products).cpu() @ Y)).sum(0) - theta.square()
        norms = squares.clamp(min=0).sqrt()
        worst = int(norms.argmax())
        if not reaches(theta, norms, self.k):
            return None
        return basis.residuals(theta[worst : worst + 1], Y[:, worst : worst + 1])[0]

    def _remember(self, basis: Basis, theta: Tensor, Y: Tensor, *, sentinel: bool) -> None:
        """Keep the next Ritz vector of a basis that could see it."""
        k = self.k
        # A small basis that was not given the next vector cannot see it: its Ritz vector k + 1 is a chance direction.
        if basis.size > k and (sentinel or basis.size >= k + 3 or self._next is None):
            self._next = stepped(basis, theta[k : k + 1], Y[:, k : k + 1])[0]
            self._gap = 1 - float(theta[k] / theta[k - 1]) if float(theta[k - 1]) > 0 else 0.0
