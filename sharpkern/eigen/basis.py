"""A growing orthonormal basis with the products of its vectors: what Lanczos and its kin work on."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from .. import kernels
from .common import EigenResult, SymmetricOperator, check_finite, multiply, random_rows, rounding_level

_COLUMNS = 1 << 22  # turned at a time in a restart


class Basis:
    """Orthonormal rows Q, their products W = A Q, and T = Q W'; grown a few rows at a time."""

    def __init__(self, op: SymmetricOperator, limit: int, generator: torch.Generator) -> None:
        self.op, self.limit, self.generator = op, limit, generator
        self.size = self.matvecs = 0
        self.Q = self.W = torch.empty(0, op.n, dtype=op.dtype, device=op.device)
        self.T = torch.zeros(limit, limit, dtype=torch.float64)

    def _reserve(self, rows: int) -> None:
        if rows <= len(self.Q):
            return
        # Untouched memory costs nothing on the CPU; on a GPU it does.
        capacity = self.limit if self.op.device.type == "cpu" else min(self.limit, max(4, 2 * rows))
        for name in ("Q", "W"):
            old = getattr(self, name)
            new = old.new_empty(capacity, self.op.n)
            new[: self.size] = old[: self.size]
            setattr(self, name, new)

    def extend(self, rows: Tensor) -> None:
        """Add orthonormal rows: multiply them and complete T."""
        m, j = self.size, len(rows)
        self._reserve(m + j)
        self.Q[m : m + j], self.W[m : m + j] = rows, multiply(self.op, rows)
        self.size = m + j
        block = kernels.gram(self.Q[: self.size], self.W[m : self.size]).cpu()
        check_finite(block, self.matvecs)
        self.matvecs += j
        self.T[: self.size, m : self.size] = block
        self.T[m : self.size, : self.size] = block.t()

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Return Ritz values, descending, and their coordinates as columns."""
        T = self.T[: self.size, : self.size]
        theta, Y = torch.linalg.eigh((T + T.t()) / 2)
        return theta.flip(0), Y.flip(1)

    def residuals(self, theta: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``A v - theta v`` ``[k, n]`` of Ritz pairs, from the kept products, and their norms."""
        R = self.combination(Y, self.W)
        R.sub_(self.combination(Y * theta, self.Q))
        return R, kernels.gram(R, R).diagonal().sqrt().cpu()

    def result(self, theta: Tensor, Y: Tensor, wanted: list[int], *, done: bool, reason: str) -> EigenResult:
        """Collect Ritz pairs, some of ``ritz()``'s, with their residual norms and errors."""
        others = [i for i in {wanted[0] - 1, wanted[-1] + 1} | _holes(wanted) if 0 <= i < self.size]
        chosen = [*wanted, *others]
        norms = self.residuals(theta[chosen], Y[:, chosen])[1]
        rounding = rounding_level(self.op, theta)
        r, rest = norms[: len(wanted)], norms[len(wanted) :]
        gap = torch.full_like(r, math.inf if self.size == self.op.n else 0.0)
        if others:
            gap = ((theta[wanted][:, None] - theta[others]).abs() - rest).min(1).values
        estimates = torch.where(gap > r, r * r / gap, r)
        return EigenResult(
            theta[wanted], self.combination(Y[:, wanted]), r, r + rounding, estimates + rounding, self.matvecs, done,
            reason,
        )  # fmt: skip

    def combination(self, Y: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return ``Y' Q`` (or of other rows)."""
        rows = self.Q if rows is None else rows
        return kernels.combine(Y.t().contiguous().to(rows.device), rows[: self.size])

    def restart(self, Y: Tensor) -> None:
        """Keep only the span of some Ritz vectors; their products are known."""
        kept = Y.t() @ self.T[: self.size, : self.size] @ Y
        C = Y.t().contiguous().to(self.Q.device)
        for block in (self.Q, self.W):  # in place, a range of columns at a time
            for start in range(0, self.op.n, _COLUMNS):
                columns = block[: self.size, start : start + _COLUMNS]
                columns[: len(C)] = kernels.combine(C, columns.contiguous())
        self.size = Y.shape[1]
        self.T[: self.size, : self.size] = kept

    def orthonormal(self, rows: Tensor) -> Tensor:
        """Orthonormalise rows against Q and each other; a row without a new direction becomes random."""
        result: list[Tensor] = []
        for i in range(len(rows)):
            unit = self._unit(rows[i : i + 1], result)
            while unit is None:
                unit = self._unit(random_rows(1, self.op, self.generator), result)
            result.append(unit)
        return torch.cat(result)

    def _unit(self, row: Tensor, others: list[Tensor]) -> Tensor | None:
        """Project out Q and others until little is left (twice is enough); None if nothing remains."""
        row = row / torch.linalg.vector_norm(row)
        length = 1.0
        for _ in range(3):
            for block in [self.Q[: self.size], *others]:
                if len(block):
                    row.sub_(kernels.combine(kernels.gram(row, block), block))
            before, length = length, float(torch.linalg.vector_norm(row))
            if not length > 100 * torch.finfo(row.dtype).eps:
                return None
            if length > 0.7 * before:
                break
        return row.div_(length)


def _holes(wanted: list[int]) -> set[int]:
    """Return the neighbours inside a list of two ends."""
    return {j for a, b in itertools.pairwise(wanted) if b - a > 1 for j in (a + 1, b - 1)}
