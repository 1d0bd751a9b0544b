"""A block of vectors given as the columns of a contiguous ``[n, k]``, as the transpose of ``[k, n]``, and one by one.

    python benchmarks/bench_blocks.py                    # four workloads, k of 2, 3, 4 and 8: a few minutes
    python benchmarks/bench_blocks.py --rounds 20 overhead

Each number is the median over interleaved rounds of a block's time over that of k products of one vector.
"""

from __future__ import annotations

import argparse

import torch
import workloads
from interleave import interleave, ratio

import sharpkern as sk


def row(name: str, k: int, rounds: int) -> str:
    """Measure one workload with blocks of k; return a line of the table."""
    torch.manual_seed(0)
    H = sk.HessianOperator(*getattr(workloads, name)())
    columns = torch.randn(H.n, k)
    rows = columns.t().contiguous()
    repeats = 20 if H.n < 100_000 else 1  # a small product is as short as the clock's own noise

    def often(call: object) -> object:
        return lambda: [call() for _ in range(repeats)]  # type: ignore[operator]

    contenders = {
        "columns": often(lambda: H @ columns),
        "rows": often(lambda: H @ rows.t()),
        "singles": often(lambda: [H @ rows[i] for i in range(k)]),
    }
    seconds = interleave(contenders, rounds, seconds_at_most=60)
    figures = [ratio(seconds, *pair) for pair in (("columns", "singles"), ("rows", "singles"), ("columns", "rows"))]
    cells = (f"{f['median']:.2f} ({f['low']:.2f} to {f['high']:.2f})" for f in figures)
    return " | ".join(["", name, str(k), *cells, ""])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=["overhead", "mlp", "cnn", "gpt"])
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    print("| workload | k | columns, in singles | rows, in singles | columns, in rows |\n|---|---|---|---|---|")
    for name in given.workloads:
        for k in (2, 3, 4, 8):
            print(row(name, k, given.rounds).strip(), flush=True)


if __name__ == "__main__":
    main()
