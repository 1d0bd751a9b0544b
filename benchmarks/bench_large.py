"""Solve a matrix-free operator of 10^8 parameters (diagonal plus low rank) on the CPU: error, memory, time per product.

    python benchmarks/bench_large.py [--n 100000000] [--basis 8]

Memory is the peak resident size beyond the operator's own, in vectors: the basis holds two per product, and the
operator's product is one. Time is the solver's own, without the operator's, against a floor: the numbers that ``gram``
and ``combine`` must read and write, at the speed of a copy measured before and after.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sharpkern import kernels
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
            W[:, rows] += s * V.t()[:, rows].mean(1, keepdim=True)
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


class Traffic:
    """Counts the bytes that the vector kernels must move, and their seconds, from its making on."""

    def __init__(self) -> None:
        self.bytes, self.seconds = 0, 0.0
        gram, combine = kernels.gram, kernels.combine

        def counted_gram(A: Tensor, B: Tensor) -> Tensor:
            inside = B.data_ptr() <= A.data_ptr() < B.data_ptr() + B.nbytes
            return self._timed(B.nbytes + (0 if inside else A.nbytes), gram, A, B)

        def counted_combine(C: Tensor, V: Tensor, out: Tensor | None = None) -> Tensor:
            return self._timed(V.nbytes * (1 + len(C) / len(V)), combine, C, V, out)

        kernels.gram, kernels.combine = counted_gram, counted_combine

    def _timed(self, moved: float, kernel: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
        start = time.perf_counter()
        result = kernel(*args)
        self.seconds += time.perf_counter() - start
        self.bytes += moved
        return result


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
    before = copy_bandwidth(10_000_000)
    op = DiagonalPlusLowRank(options.n, (4.0, 3.0))
    traffic, base = Traffic(), resident()
    start = time.perf_counter()
    result = lanczos(op, tol=options.tol, max_basis=options.basis)
    seconds = time.perf_counter() - start - op.seconds
    vectors = (resident() - base) / (4 * options.n)
    bandwidth = max(before, copy_bandwidth(10_000_000))
    floor, each = traffic.bytes / bandwidth, 1 / result.matvecs
    truth = op.top()
    print(f"n = {op.n:,}, {result.matvecs} products, basis of {options.basis}; {result.reason}")
    print(f"relative error {abs(float(result.eigenvalues[0]) / truth - 1):.1e}")
    print(f"peak memory: {vectors:.1f} vectors beyond the operator, of which the basis holds {2 * options.basis}")
    print(f"per product: solver {seconds * each:.2f} s, operator {op.seconds * each:.2f} s")
    print(f"copy: {bandwidth / 1e9:.1f} GB/s")
    print(f"kernels {traffic.seconds * each:.2f} s, {traffic.seconds / floor:.2f} of their floor {floor * each:.2f} s")
    print(f"solver {seconds / floor:.2f} of the floor")


if __name__ == "__main__":
    main()
