"""A growing orthonormal basis with the products of its vectors: what Lanczos and its kin work on."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from .. import kernels
from ..kernels.cpu.huge_pages import empty
from .common import (
    OF_PRODUCTS,
    EigenResult,
    SymmetricOperator,
    check_finite,
    dimension,
    gram,
    multiply,
    norms_of,
    random_rows,
    range_factors,
    rounding_level,
)

_ATTEMPTS = 20  # at a random row outside a span: each fails with a probability below 0.01
_TURNED_BYTES = 1 << 20  # at a time in a restart on the CPU, in cache


class Workspace:
    """Named blocks of vectors that a solver asks for again and again: fresh memory costs a page fault per 4 KiB."""

    def __init__(self, op: SymmetricOperator) -> None:
        self._kind = op.n, op.dtype, op.device
        self._blocks: dict[str, Tensor] = {}

    def rows(self, name: str, count: int, *, keep: int = 0) -> Tensor:
        """Return ``[at least count, n]``, whose first ``keep`` rows hold what they held."""
        block = self._blocks.get(name)
        if block is None or len(block) < count:
            new = empty(count, *self._kind)
            if block is not None:
                new[:keep] = block[:keep]
            self._blocks[name] = block = new
        return block


class Basis:
    """Orthonormal rows Q, their products W = A Q, and T = Q W'; grown a few rows at a time."""

    def __init__(
        self, op: SymmetricOperator, limit: int, generator: torch.Generator, workspace: Workspace | None = None
    ) -> None:
        self.op, self.limit, self.generator = op, limit, generator
        self.workspace = workspace or Workspace(op)
        self.size = self.matvecs = 0
        self.largest = 0.0  # norm of a product with a unit vector, of those seen: the scale of rounding
        self.Q, self.W = self.workspace.rows("Q", 0), self.workspace.rows("W", 0)
        self.T = torch.zeros(limit, limit, dtype=torch.float64)

    def _reserve(self, rows: int) -> None:
        if rows <= min(len(self.Q), len(self.W)):
            return
        # Untouched memory costs nothing on the CPU; on a GPU it does.
        capacity = self.limit if self.op.device.type == "cpu" else min(self.limit, max(4, 2 * rows))
        self.Q = self.workspace.rows("Q", capacity, keep=self.size)
        self.W = self.workspace.rows("W", capacity, keep=self.size)

    def extend(self, rows: Tensor) -> None:
        """Add vectors, orthonormalised: multiply them and complete T."""
        m = self.size
        rows = rows[: dimension(self.op) - m]  # the whole space has no room for more, and needs none
        j = len(rows)
        self._reserve(m + j)
        # One row after another: each must be orthogonal to the rows added before it, too.
        for i, row in enumerate(rows):
            self.Q[m + i] = row
            # A row within the span of the basis adds nothing, and its direction after projection would be rounding.
            for _ in range(_ATTEMPTS):
                if self._orthonormalise(m + i):
                    break
                self.Q[m + i] = random_rows(1, self.op, self.generator)[0]
            else:
                raise LinAlgError(f"no direction beside {m + i} vectors of length {self.op.n} in {_ATTEMPTS} tries.")
        self.W[m : m + j] = multiply(self.op, self.Q[m : m + j])
        self.size = m + j
        # T on the CPU in float64: it is small, and Ritz values must not lose what float32 vectors still hold.
        block = gram(self.op, self.Q[: self.size], self.W[m : self.size]).cpu()
        check_finite(block, self.matvecs, self.W[m : self.size])
        self.matvecs += j
        self.T[: self.size, m : self.size] = block
        self.T[m : self.size, : self.size] = block.t()

    def _orthonormalise(self, at: int) -> bool:
        """Project the rows before out of row ``at`` until little is left to project; False if nothing remains."""
        rows, eps = self.Q[: at + 1], torch.finfo(self.Q.dtype).eps
        scratch = self.workspace.rows("scratch", 1)[:1]
        remains = factor = None
        # Twice is enough for most rows (Parlett 1998); one that lies almost in the span may need more.
        for _ in range(4):
            # The last product is the row's squared length: one pass over memory gives it with all cosines.
            products = gram(self.op, rows[at:], rows)[0].cpu()
            if factor is None and (power := float(range_factors(products[at], rows.dtype))) != 1:
                self.Q[at] *= power
                products = gram(self.op, rows[at:], rows)[0].cpu()
            length = float(products[at].sqrt())
            remains = 1.0 if remains is None or factor is None else remains * length / factor
            if not length > 0 or not remains > 100 * eps:
                return False
            cosines = products[:at] / length
            rest = max(1 - float(cosines.square().sum()), 1e-6)  # of the squared length; rounding hides less
            factor = rest**-0.5
            C = factor * torch.cat([-cosines, cosines.new_ones(1) / length])
            self.Q[at] = kernels.combine(C[None].to(rows.device), rows, scratch)[0]
            # Half of the squared length is left, so rounding was magnified by 1.4 at most: orthogonal enough.
            if rest > 0.49:
                return True
        return True

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Return Ritz values, descending, and their coordinates as columns."""
        T = self.T[: self.size, : self.size]
        # T is symmetric up to rounding only; eigh would read one triangle and ignore the other.
        theta, Y = torch.linalg.eigh(T / 2 + T.t() / 2)
        self.largest = max(self.largest, float(theta.abs().max()))
        return theta.flip(0), Y.flip(1)

    def residuals(self, theta: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``A v - theta v`` ``[k, n]`` of Ritz pairs, from the kept products, and their norms.

        The vectors stand until the next call.
        """
        k = Y.shape[1]
        R = self.combination(Y, self.W, self.workspace.rows("residuals", k)[:k])
        R.sub_(self.combination(Y * theta, self.Q, self.workspace.rows("scratch", k)[:k]))
        norms = norms_of(self.op, R).cpu()
        # A v has a part theta along v, and the residual across.
        self.largest = max(self.largest, float(torch.hypot(theta, norms).max()))
        return R, norms

    def rounding(self) -> float:
        """Return a residual norm that rounding alone may leave in this basis, see ``rounding_level``."""
        return rounding_level(self.op, self.largest)

    def result(
        self, theta: Tensor, Y: Tensor, wanted: list[int], norms: Tensor, *, done: bool, reason: str, gaps: bool = True
    ) -> EigenResult:
        """Collect some of ``ritz()``'s pairs, with their residual norms; gaps cost a residual of each neighbour."""
        estimates = self._gap_estimates(theta, Y, wanted, norms) if gaps else norms
        rounding = OF_PRODUCTS * self.rounding()
        return EigenResult(
            theta[wanted], self.combination(Y[:, wanted]), norms, norms + rounding, estimates + rounding, self.matvecs,
            done, reason,
        )  # fmt: skip

    def _gap_estimates(self, theta: Tensor, Y: Tensor, wanted: list[int], norms: Tensor) -> Tensor:
        # The nearest Ritz values that were not asked for: an eigenvalue in between could not be told apart.
        others = [i for i in {wanted[0] - 1, wanted[-1] + 1} | _holes(wanted) if 0 <= i < self.size]
        if not others:
            return norms / math.inf if self.size == dimension(self.op) else norms
        rest = self.residuals(theta[others], Y[:, others])[1]
        # The neighbours are uncertain by their own residuals, which may close a gap.
        gap = ((theta[wanted][:, None] - theta[others]).abs() - rest).min(1).values
        return torch.where(gap > norms, norms * (norms / gap), norms)

    def combination(self, Y: Tensor, rows: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Return ``Y' Q`` (or of other rows)."""
        rows = self.Q if rows is None else rows
        return kernels.combine(Y.t().contiguous().to(rows.device), rows[: self.size], out)

    def restart(self, Y: Tensor) -> None:
        """Keep only the span of some Ritz vectors; their products are known."""
        kept = Y.t() @ self.T[: self.size, : self.size] @ Y
        C = Y.t().contiguous().to(self.Q.device)
        limit = _TURNED_BYTES if self.op.device.type == "cpu" else 64 * _TURNED_BYTES
        width = max(limit // (self.size * self.Q.element_size()), 1)
        for block in (self.Q, self.W):  # in place, a range of columns at a time
            for columns in block[: self.size].split(width, dim=1):
                columns[: len(C)] = kernels.combine(C, columns.contiguous())
        self.size = Y.shape[1]
        self.T[: self.size, : self.size] = kept


def _holes(wanted: list[int]) -> set[int]:
    """Return the neighbours inside a list of two ends."""
    return {j for a, b in itertools.pairwise(wanted) if b - a > 1 for j in (a + 1, b - 1)}
