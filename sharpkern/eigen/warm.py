"""Lanczos for a slowly changing operator: warm-started from the last step's Ritz vectors, and guarded.

A residual certifies *an* eigenvalue, not the top one: a solver that starts on the second eigenvector stays
there, with a small residual, after the two have crossed. So a second Ritz vector and, rarely, a random vector
are multiplied besides (the guards). They make a missed eigenvalue unlikely, not impossible. docs/tracking.md
has the algorithm on one page, with what it costs and how often it fails.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .eigen import EigenResult, SymmetricOperator, _Basis, _random, _rounding

_FIRST_TOL = 0.1  # a random start stops more easily on a wrong eigenvector: ask for more, once
_FIRST_AUDIT, _AUDIT_EVERY, _AUDIT_DEPTH = 16, 32, 8
_SENTINEL_EVERY = 8
_JUMP = 0.1  # relative change of the Rayleigh quotient from one step to the next
_SHORT = 4  # a basis of this many vectors beyond k - 1 has looked around by itself after a jump
_LOOSE, _SHARE = 2.0, 0.2  # see _accurate
_FORGET, _RIDGE = 0.7, 0.01  # of the prediction's least squares
_BASIS = 40


class WarmLanczos:
    """Finds the k largest algebraic eigenvalues of one operator after another.

    Each solve is Rayleigh-Ritz over products with the present operator only, expanded by the residual that is
    furthest from ``tol``. What the last steps leave behind costs no product:

    - the start is the last Ritz block after one power step (its product is known), plus multiples of its last
      change and of the gradient, fitted by least squares to what would have been right before: along a period
      of two, as at the edge of stability, the last change has coefficient -1;
    - the gap to the next eigenvalue, last seen by a basis that could see it, lets a solve stop at twice ``tol``
      where the error is estimated to be of second order.

    Guards: the next Ritz vector is multiplied and improved once (2 products) every 8 steps, and after a jump of
    the Rayleigh quotient unless the solve was long; a random vector, improved 8 times, every 32 steps.

    Args:
        k: how many eigenvalues.
        tol: relative residual norm at which to stop; see ``step``.
        max_matvecs: the most products per step; at least k.
        generator: of random vectors, on the CPU; None for seed 0.

    Raises:
        ValueError: k, tol or max_matvecs out of range.

    Memory: 2k + 1 vectors between steps, and a basis of Lanczos.
    Source: docs/tracking.md; the guards' rates from a study of 11 training runs, the start from linear
    prediction as in Kolafa, Time-reversible always stable predictor-corrector method (2004).
    """

    def __init__(
        self, k: int = 1, tol: float = 0.01, max_matvecs: int = 80, generator: torch.Generator | None = None
    ) -> None:
        if k < 1 or not tol > 0 or max_matvecs < k:
            raise ValueError(f"need k >= 1, tol > 0 and max_matvecs >= k, got {k}, {tol} and {max_matvecs}.")
        self.k, self.tol, self.max_matvecs = k, tol, max_matvecs
        self.generator = generator or torch.Generator().manual_seed(0)
        self._block: Tensor | None = None  # [k, n], where the next step starts
        self._change: Tensor | None = None  # [k, n], the block less the one before, turned to fit it
        self._next: Tensor | None = None  # [n], Ritz vector k + 1
        self._theta = 0.0
        self._below: float | None = None  # Ritz value k + 1 over Ritz value k, of the last basis that could see it
        self._normal, self._right = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        self._since_sentinel = self._since_audit = 0

    def step(self, op: SymmetricOperator, gradient: Tensor | None = None, extra: Tensor | None = None) -> EigenResult:
        """Solve for the present operator.

        Args:
            op: symmetric; like the last one in n, dtype and device.
            gradient: ``[n]``, a free hint: the gradient in the operator's coordinates (P^-1/2 g for the
                preconditioned Hessian).
            extra: ``[m, n]``, further vectors to multiply: m products.

        Returns:
            An ``EigenResult``. ``converged``: each residual norm is at most tol * |theta|; or twice that, and
            its square over the remembered gap at most 0.2 tol * |theta| (an estimate: the gap may have closed).
            ``error_bounds`` hold the residual norms, the proven part.

        Raises:
            ValueError: the operator's products have a wrong shape, or k is above n.
            RuntimeError: a product is not finite.

        Cost: ``matvecs`` products: 1 to 10, 20 to 50 at the first step.
        """
        if self.k > op.n:
            raise ValueError(f"k must be at most n = {op.n}, got {self.k}.")
        k, first = self.k, self._block is None
        tol = self.tol * (_FIRST_TOL if first else 1.0)
        basis = _Basis(op, min(max(_BASIS, 2 * k + 20), op.n), self.generator)
        regressors = None if first else self._regressors(gradient)
        start = _random(k, op, self.generator) if regressors is None else self._predicted(regressors)
        basis.extend(basis.orthonormal(start if extra is None else torch.cat([start, extra])[: op.n]))
        quotient = float(basis.T[0, 0])
        todo = self._guards(first)
        jumped = not first and abs(quotient - self._theta) > _JUMP * abs(self._theta)
        while True:
            theta, Y = basis.ritz()
            m = min(k + 1, basis.size)
            residuals, norms = basis.residuals(theta[:m], Y[:, :m])
            rounding = _rounding(op, theta)
            converged = self._accurate(theta, norms, tol, rounding, first)
            if basis.size == op.n or basis.matvecs >= self.max_matvecs:
                break
            if converged and not todo:
                if not jumped or basis.size >= k - 1 + _SHORT:
                    break
                todo, jumped = ["improve", "next"], False
                self._since_sentinel = 0
            if basis.size == basis.limit:
                kept = max(k + 1, basis.limit // 2)
                basis.restart(Y[:, :kept])
            basis.extend(basis.orthonormal(self._direction(converged, todo, residuals, norms / theta[:m].abs(), op)))
        result = EigenResult(
            theta[:k], basis.combination(Y[:, :k]), norms[:k], norms[:k] + rounding, basis.matvecs, converged,
            f"{'converged' if converged else 'stopped'} with residual norm {float(norms[:k].max()):.1e} at eigenvalue "
            f"{float(theta[0]):.4g} after {basis.matvecs} products; tol was {tol:.1e}.",
        )  # fmt: skip
        self._remember(basis, theta, Y, result.eigenvectors, regressors)
        return result

    def _guards(self, first: bool) -> list[str]:
        """Return the vectors to multiply besides, last one first."""
        todo = []
        self._since_sentinel, self._since_audit = self._since_sentinel + 1, self._since_audit + 1
        if first or self._since_audit >= _AUDIT_EVERY:
            todo += ["improve"] * (_FIRST_AUDIT if first else _AUDIT_DEPTH) + ["random"]
            self._since_audit = 0
        if not first and self._since_sentinel >= _SENTINEL_EVERY:
            todo += ["improve", "next"]
            self._since_sentinel = 0
        return todo

    def _accurate(self, theta: Tensor, norms: Tensor, tol: float, rounding: float, first: bool) -> bool:
        """Say whether the first k pairs are good enough, by residual or by residual and remembered gap."""
        k = self.k
        allowed = (tol * theta[:k].abs()).clamp(min=rounding)
        if bool((norms[:k] <= allowed).all()):
            return True
        if first or self._below is None or len(theta) < 2 or float(theta[k - 1]) <= 0:
            return False
        below = self._below * float(theta[k - 1])
        if len(theta) > k:
            below = max(below, float(theta[k]))
        gap = theta[:k] - below  # of the k wanted values as a group to the rest
        return bool(((norms[:k] <= _LOOSE * allowed) & (norms[:k] ** 2 <= _SHARE * allowed * gap)).all())

    def _direction(
        self, converged: bool, todo: list[str], residuals: Tensor, norms: Tensor, op: SymmetricOperator
    ) -> Tensor:
        """Return the next vector to multiply, ``[1, n]``."""
        if not converged:
            worst = int(norms[: self.k].argmax())
            return residuals[worst : worst + 1]
        what = todo.pop()
        if what == "next" and self._next is not None:
            return self._next[None]
        if what == "improve" and len(residuals) > self.k:
            return residuals[self.k :]
        return _random(1, op, self.generator)

    def _regressors(self, gradient: Tensor | None) -> Tensor:
        """Return what may be added to the block, ``[2, k, n]``: its last change, and the unit gradient's rest."""
        assert self._block is not None and self._change is not None
        probe = torch.zeros_like(self._block)
        if gradient is not None:
            overlap = kernels.gram(gradient[None].contiguous(), self._block)
            rest = gradient[None] - kernels.combine(overlap, self._block)
            length = float(torch.linalg.vector_norm(rest))
            if length > 0 and math.isfinite(length):  # signs as the block's rows see the gradient
                probe = torch.where(overlap.t() < 0, -rest / length, rest / length)
        return torch.stack([self._change, probe])

    def _predicted(self, regressors: Tensor) -> Tensor:
        """Return the block plus the regressors by their fitted coefficients."""
        assert self._block is not None
        size = self._normal.diagonal()
        if float(size.max()) == 0:
            return self._block
        ridge = torch.diag(size * _RIDGE + 1e-9 * size.max())
        coefficients = torch.linalg.solve(self._normal + ridge, self._right)
        return self._block + torch.tensordot(coefficients.to(self._block), regressors, 1)

    def _remember(self, basis: _Basis, theta: Tensor, Y: Tensor, vectors: Tensor, regressors: Tensor | None) -> None:
        """Keep the next start, fit the prediction, and keep the next Ritz pair where this basis could see it."""
        k = self.k
        products = basis.combination(Y[:, :k], basis.W)  # a power step, for which the product is known
        block = torch.where((theta[:k, None] > 0).to(products.device), products, vectors)
        block = block / torch.linalg.vector_norm(block, dim=1, keepdim=True)
        if self._block is None:
            self._change = torch.zeros_like(block)
        else:
            # The block before, turned within its span to fit the new one: a sign for k = 1.
            U, cosines, V = torch.linalg.svd(kernels.gram(block, self._block).cpu())
            before = kernels.combine((U @ V).to(block.device), self._block)
            self._change = block - before
            if regressors is not None and float(cosines.min()) > 0.2:
                turn = (U @ V).t().to(block.device)
                target = (kernels.combine(turn, vectors) - self._block).flatten()
                rows = regressors.flatten(1)
                self._normal = _FORGET * self._normal + kernels.gram(rows, rows).cpu()
                self._right = _FORGET * self._right + kernels.gram(rows, target[None])[:, 0].cpu()
        self._block, self._theta = block, float(theta[0])
        if basis.size > k + 1:
            self._below = float(theta[k] / theta[k - 1]) if float(theta[k - 1]) > 0 else None
        if basis.size > k:
            row = basis.combination(Y[:, k : k + 1], basis.W if float(theta[k]) > 0 else basis.Q)[0]
            self._next = row / torch.linalg.vector_norm(row)

    def state_dict(self) -> dict[str, Any]:
        """Return what continues identically: tensors and plain Python only, the generator apart."""
        state = {name: value for name, value in vars(self).items() if name.startswith("_")}
        return {name: v.clone() if isinstance(v, Tensor) else v for name, v in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict()``'s result."""
        for name, value in state.items():
            setattr(self, name, value)
