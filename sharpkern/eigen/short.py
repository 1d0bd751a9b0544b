"""A few products from the last vector, where products and nothing else may be paid.

A solve of ``WarmLanczos`` passes over vectors twenty times: for a prediction of its start, for orthogonality, for the
residual and two Ritz vectors. On a probe of a few examples, whose product costs little more than such passes, these are
most of the price. Here every inner product comes from one Gram matrix, and a product takes four passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from .common import OF_PRODUCTS, EigenResult, SymmetricOperator, check_finite, gram, multiply, rounding_level
from .stopping import converged, reason_of
from .warm import WarmLanczos

_MOST = 6  # products; with more, the guards of ``WarmLanczos`` are worth their passes
_NEXT_EVERY = 8  # short solves, of which one multiplies the next Ritz vector too
_DEPENDENT = 1e-6  # share of a row's squared length beside the other rows, below which it is rounding


class ShortLanczos(WarmLanczos):
    """Finds the largest eigenvalue of one operator after another, with a handful of products each.

    A solve is Rayleigh-Ritz on the last vector after a power step, the caller's vectors, and residuals; at every eighth
    solve on the next Ritz vector too, the only guard: a crossing may be missed for seven solves. The first solve, and
    one that may have more than 6 products, are ``WarmLanczos``'s, and so is every solve for k > 1.

    Args, attributes and errors: see ``WarmStart``.

    Memory: 3 vectors between steps, and two per product in a solve.
    """

    _predicts = False  # its steps lie apart: the last change says nothing of the next

    def step(
        self,
        op: SymmetricOperator,
        extra: Tensor | None = None,
        at_most: int | None = None,
        hint: Tensor | None = None,
    ) -> EigenResult:
        """Solve for the present operator; see ``WarmLanczos.step``.

        Cost: up to ``at_most`` products, or as many as are multiplied in any case, if these are more.
        """
        self._check(op)
        if self._block is None or at_most is None or at_most > _MOST or self.k > 1:
            return super().step(op, extra, at_most, hint)
        given = [] if extra is None else list(extra)
        self._since_sentinel += 1
        self._since_audit += 1
        sentinel = self._next is not None and self._since_sentinel >= _NEXT_EVERY and at_most > 1
        if sentinel:
            assert self._next is not None
            given.append(self._next)
            self._since_sentinel = 0
        span = _Span(op, self._memory(op, first=False).rows("short", 2 * (at_most + 1 + len(given))))
        for row in (self._block[0], *given):
            span.extend(row)
            if span.matvecs == 1:
                self.start_value = float(span.ritz()[0][0])
        while True:
            theta, Y = span.ritz()
            norms, rounding = span.norms(theta, Y), rounding_level(op, span.largest)
            done = converged(norms[:1], theta[:1], self.tol, rounding)
            if done or span.matvecs >= at_most:
                break
            span.extend_by_residual(theta, Y, norms)
        vectors, blocks = span.leave(theta[:2], Y[:, :2], rounding)
        self._block, self._theta = blocks[:1], float(theta[0])
        self._change = torch.zeros_like(self._block)
        if span.size > 1 and (sentinel or span.size > 3):  # else its second Ritz vector is a chance direction
            self._next = blocks[1].clone()
            self._gap = 1 - float(theta[1] / theta[0]) if float(theta[0]) > 0 else 0.0
        close = span.size > 1 and float(theta[0] - theta[1]) < 2 * self.tol * abs(float(theta[0]))
        bounds = (torch.hypot(norms[:1], norms[1:2]) if close else norms[:1]) + OF_PRODUCTS * rounding
        reason = reason_of(done, norms[:1], theta[:1], self.tol, at_most)
        return EigenResult(theta[:1], vectors[:1], norms[:1], bounds, bounds, span.matvecs, done, reason)


class _Span:
    """Rows that are not orthogonal, each followed by its product, and all their inner products.

    Args:
        op: the operator.
        rows: ``[2 m, n]``, memory for m of both.
    """

    def __init__(self, op: SymmetricOperator, rows: Tensor) -> None:
        self.op, self.rows = op, rows
        self.size = self.matvecs = 0
        self.largest = 0.0  # norm of a product with a unit vector, of those seen
        self.inner = torch.zeros(len(rows), len(rows), dtype=torch.float64)

    def extend(self, row: Tensor) -> None:
        """Multiply a vector and add it, unless it lies within the span to rounding."""
        self.rows[2 * self.size] = row
        self._multiply()

    def extend_by_residual(self, theta: Tensor, Y: Tensor, norms: Tensor) -> None:
        """Multiply the residual of the first Ritz pair, as a unit vector, and add it."""
        C = torch.zeros(1, 2 * self.size, dtype=torch.float64)
        C[0, 0::2], C[0, 1::2] = -theta[0] * Y[:, 0], Y[:, 0]
        self._combine(C / norms[0], self.rows[2 * self.size : 2 * self.size + 1])
        self._multiply()

    def _multiply(self) -> None:
        at = 2 * self.size
        self.rows[at + 1] = multiply(self.op, self.rows[at : at + 1])[0]
        self.matvecs += 1
        # On the CPU in float64, as Ritz values must not lose what float32 vectors still hold.
        new = gram(self.op, self.rows[at : at + 2], self.rows[: at + 2]).cpu()
        check_finite(new[1:].t(), self.matvecs - 1, self.rows[at + 1 : at + 2])
        self.inner[at : at + 2, : at + 2] = new
        self.inner[: at + 2, at : at + 2] = new.t()
        square = float(self.inner[at, at])
        if self._beside(at) > _DEPENDENT * square:
            self.largest = max(self.largest, float(self.inner[at + 1, at + 1] / square) ** 0.5)
            self.size += 1

    def _beside(self, at: int) -> float:
        """Return the squared length of row ``at`` beside the rows before it."""
        square = self.inner[at, at]
        if at:
            cosines = self.inner[at, 0:at:2]
            square = square - cosines @ torch.linalg.solve(self.inner[0:at:2, 0:at:2], cosines)
        return float(square)

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Return Ritz values, descending, and the coordinates of their unit vectors as columns."""
        m = 2 * self.size
        products = self.inner[0:m:2, 1:m:2]
        L = torch.linalg.cholesky(self.inner[0:m:2, 0:m:2])
        inside = torch.linalg.solve_triangular(L, (products + products.t()) / 2, upper=False)
        theta, U = torch.linalg.eigh(torch.linalg.solve_triangular(L, inside.t(), upper=False))
        return theta.flip(0), torch.linalg.solve_triangular(L.t(), U, upper=True).flip(1)

    def norms(self, theta: Tensor, Y: Tensor) -> Tensor:
        """Return the residual norms of Ritz pairs."""
        m = 2 * self.size
        squares = self._forms(self.inner[1:m:2, 1:m:2], Y) - 2 * theta * self._forms(self.inner[0:m:2, 1:m:2], Y)
        return (squares + theta.square() * self._forms(self.inner[0:m:2, 0:m:2], Y)).clamp(min=0).sqrt()

    def leave(self, theta: Tensor, Y: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
        """Return Ritz vectors, and the same after a power step, as unit rows."""
        k, m = len(theta), 2 * self.size
        C = torch.zeros(2 * k, m, dtype=torch.float64)
        C[:k, 0::2] = Y.t()
        # As in ``WarmStart``: a negative eigenvalue would turn the sign, and the product of one of rounding size may be
        # zero.
        steps = theta > rounding
        lengths = self._forms(self.inner[1:m:2, 1:m:2], Y).sqrt()
        C[k:, 1::2] = torch.where(steps, Y / torch.where(steps, lengths, 1.0), 0.0).t()
        C[k:, 0::2] = torch.where(steps, 0.0, Y).t()
        rows = self._combine(C)
        return rows[:k], rows[k:]

    def _forms(self, inner: Tensor, Y: Tensor) -> Tensor:
        return (Y * (inner @ Y)).sum(0)

    def _combine(self, C: Tensor, out: Tensor | None = None) -> Tensor:
        return kernels.combine(C.to(self.rows.device), self.rows[: C.shape[1]], out)
