"""Solve a matrix-free operator of 10^8 parameters (diagonal plus low rank) on the CPU: error, memory, time per product.

    python benchmarks/bench_large.py [--n 100000000] [--basis 8]

Memory is the peak resident size beyond the operator's own, in vectors; the basis holds two per product. Time is the
solver's own, without the operator's, against the bytes that its vector kernels have to move at the speed of a copy.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from torch import Tensor

from sharpkern.eigen import lanczos


class DiagonalPlusLowRank:
    """``diag(d) + sum_i s_i u_i u_i'``, d within [0, 1], u_i unit vectors constant on a part of the space each."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, n: int, strengths: tuple[float, ...]) -> None:
        self.n, self.strengths = n, strengths
        self.d = torch.rand(n, generator=torch.Generator().manual_seed(1))
        self.seconds = 0.0

    def matmat(self, V: Tensor) -> Tensor:
        start = time.perf_counter()
        W = V.t() * self.d
        part = self.n // len(self.strengths)
        for i, s in enumerate(self.strengths):
            rows = slice(i * part, (i + 1) * part)
            W[:, rows] += s * V.t()[:, rows].mean(1, dtype=torch.float64, keepdim=True).float()
        self.seconds += time.perf_counter() - start
        return W.t()

    def top(self) -> float:
        """Largest eigenvalue from the secular equation ``s mean(1 / (lambda - d)) = 1`` of the strongest block."""
        part = self.n // len(self.strengths)
        d, s = self.d[:part].double(), self.strengths[0]
        low, high = 1.0 + 1e-9, 1.0 + s
        while high - low > 1e-12 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if float((1 / (middle - d)).mean()) * s > 1 else (low, middle)
        return (low + high) / 2


def resident() -> int:
    """Peak bytes so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def copy_bandwidth(n: int) -> float:
    """Bytes per second, read and written."""
    a, b = torch.ones(n), torch.empty(n)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        b.copy_(a)
        best = min(best, time.perf_counter() - start)
    return 8 * n / best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=100_000_000)
    parser.add_argument("--basis", type=int, default=8)
    parser.add_argument("--tol", type=float, default=1e-3)
    options = parser.parse_args()
    bandwidth = copy_bandwidth(10_000_000)
    op = DiagonalPlusLowRank(options.n, (4.0, 3.0))
    base = resident()
    start = time.perf_counter()
    v0 = torch.randn(options.n, generator=torch.Generator().manual_seed(0))
    result = lanczos(op, tol=options.tol, v0=v0, max_basis=options.basis)
    del v0
    seconds = time.perf_counter() - start - op.seconds
    vectors = (resident() - base) / (4 * options.n)
    truth = op.top()
    print(f"n = {op.n:,}, {result.matvecs} products, basis of {options.basis}; {result.reason}")
    print(f"relative error {abs(float(result.eigenvalues[0]) / truth - 1):.1e}")
    print(f"peak memory: {vectors:.1f} vectors beyond the operator; the basis holds {2 * options.basis}")
    print(f"solver: {seconds / result.matvecs:.2f} s per product, operator {op.seconds / result.matvecs:.2f} s")
    print(f"that is {seconds * bandwidth / (4 * options.n * result.matvecs):.1f} vector reads or writes at copy speed")


if __name__ == "__main__":
    main()
