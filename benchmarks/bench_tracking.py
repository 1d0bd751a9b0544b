"""Compare ways to know the sharpness at every step: products, errors, misses. Prints Markdown tables.

    python benchmarks/bench_tracking.py [--runs held-out|unseen|tuning] [--tol 0.01] [--wall] [--per-run]

Every solver replays the same stored runs (tracking_runs.py); the first use trains them, some minutes. An Adam
run gives two series, of the Hessian and of the preconditioned Hessian. Step 1, where all start cold, is left
out of the counts of products. A round is a product, with one vector or several, that waits for the one before.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tracking_runs import (
    HELD_OUT_SEEDS,
    SPECS,
    TUNING_SEEDS,
    UNSEEN_SEEDS,
    UNSEEN_SPECS,
    Moment,
    Trajectory,
    replay,
    runs,
)

from sharpkern.eigen import EigenResult, SymmetricOperator, WarmBlockLanczos, WarmLanczos, lanczos, lobpcg
from sharpkern.eigen.basis import Basis
from sharpkern.eigen.chain import Chain

Solver = Callable[[Moment], tuple[float, float, int]]  # -> value, error bound, products


class R(WarmLanczos):
    """The study's tracker: start from the last Ritz vector alone, sentinel after every jump."""

    _short, _predicts = 10**9, False


class ChainInstead(WarmLanczos):
    """The chain of the block solver, followed as a caller's vector is, in place of the audit of nine products."""

    def __init__(self, tol: float) -> None:
        super().__init__(tol=tol)
        self.chain = Chain()
        self.product: Tensor | None = None

    def step(self, op: SymmetricOperator, extra: Tensor | None = None, at_most: int | None = None) -> EigenResult:
        due = None if self._block is None else self.chain.due(op, self.generator)
        self._since_audit, self.product = -1, None
        rows = [t for t in (extra, due) if t is not None]
        result = super().step(op, torch.cat(rows) if rows else None, at_most)
        self.chain.advance(op, None if due is None else self.product, result.eigenvectors)
        return result

    def _begin(
        self, op: SymmetricOperator, extra: Tensor | None, hint: Tensor | None, *, first: bool, near: bool
    ) -> Basis:
        basis = super()._begin(op, extra, hint, first=first, near=near)
        self.product = basis.W[basis.size - 1 : basis.size].clone()
        return basis


class NoPrediction(WarmLanczos):
    """Without the predicted start."""

    _predicts = False


def warm(kind: type[WarmLanczos] | type[WarmBlockLanczos], tol: float, *, hinted: bool = False) -> Solver:
    solver = kind(tol=tol)
    return lambda now: _told(solver.step(now.operator, now.hint if hinted else None))


def unguarded(tol: float) -> Solver:
    """Lanczos from the last Ritz vector, no guards."""
    last: list[Tensor] = []

    def solve(now: Moment) -> tuple[float, float, int]:
        result = lanczos(now.operator, tol=tol if last else tol / 10, v0=last[0] if last else None, max_matvecs=80)
        last[:] = [result.eigenvectors]
        return _told(result)

    return solve


def cold_lanczos(tol: float) -> Solver:
    generator = torch.Generator().manual_seed(0)
    return lambda now: _told(lanczos(now.operator, tol=tol, generator=generator))


def fixed_lobpcg(tol: float) -> Solver:
    """LOBPCG from the same vector at every step."""
    return lambda now: _told(lobpcg(now.operator, tol=tol, generator=torch.Generator().manual_seed(0)))


def pyhessian(_: float) -> Solver:
    """PyHessian's published rule with its defaults: cold power iteration until the Rayleigh quotient changes
    by less than 1e-3 relative, at most 100 products. It follows the largest magnitude and gives no residual.
    """
    generator = torch.Generator().manual_seed(0)

    def solve(now: Moment) -> tuple[float, float, int]:
        v = torch.randn(now.operator.n, dtype=now.operator.dtype, generator=generator)
        before = None
        for count in range(1, 101):  # noqa: B007
            v = v / (v.norm() + 1e-6)
            product = now.operator.matmat(v[:, None])[:, 0]
            value = float(v @ product)
            if before is not None and abs(value - before) / (abs(before) + 1e-6) < 1e-3:
                break
            before, last, v = value, v, product
        return value, float((product - value * last / last.norm()).norm()), count

    return solve


CONTENDERS: dict[str, Callable[[float], Solver]] = {
    "sharpkern": lambda tol: warm(WarmLanczos, tol, hinted=True),
    "sharpkern, blocks of 3": lambda tol: warm(WarmBlockLanczos, tol, hinted=True),
    "sharpkern, no pop-up guard": lambda tol: warm(WarmLanczos, tol),
    "sharpkern, chain instead of the audit": lambda tol: warm(ChainInstead, tol, hinted=True),
    "sharpkern, no prediction": lambda tol: warm(NoPrediction, tol),
    "R (the study's)": lambda tol: warm(R, tol),
    "warm Lanczos, no guards": unguarded,
    "cold Lanczos": cold_lanczos,
    "LOBPCG, fixed start": fixed_lobpcg,
    "PyHessian's rule": pyhessian,
}


class Counted:
    """An operator that counts its products as they come, one after the other."""

    def __init__(self, operator: SymmetricOperator) -> None:
        self.operator, self.rounds = operator, 0
        self.n, self.dtype, self.device = operator.n, operator.dtype, operator.device

    def matmat(self, V: Tensor) -> Tensor:
        self.rounds += 1
        return self.operator.matmat(V)


def _told(result: EigenResult) -> tuple[float, float, int]:
    return float(result.eigenvalues[0]), float(result.error_bounds[0]), result.matvecs


@dataclass
class Series:
    """What one solver did on one series: a row a step."""

    name: str
    own_batch: bool  # the Hessian of the step's own mini-batch, another one at every step
    products: Tensor
    rounds: Tensor
    error: Tensor  # relative
    covered: Tensor
    seconds: float


def measure(names: list[str], tol: float, stored: list[Trajectory]) -> dict[str, list[Series]]:
    """Replay every run."""
    table: dict[str, list[Series]] = {name: [] for name in names}
    for run in stored:
        for series in run.truth:
            solvers = {name: CONTENDERS[name](tol) for name in names}
            rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
            seconds = dict.fromkeys(names, 0.0)
            for now in replay(run, series):
                truth = float(now.truth[0])
                for name, solve in solvers.items():
                    counted = Counted(now.operator)
                    start = time.perf_counter()
                    value, bound, products = solve(replace(now, operator=counted))
                    seconds[name] += time.perf_counter() - start
                    missed = abs(value - truth)
                    rows[name].append((products, counted.rounds, missed / abs(truth), missed <= bound))
            for name in names:
                products, rounds, error, covered = torch.tensor(rows[name], dtype=torch.float64).T
                label = f"{run.spec.name}, {series}, seed {run.spec.seed}"
                own_batch = run.spec.batch is not None and not run.spec.full_hessian
                time_each = seconds[name] / len(products)
                table[name].append(Series(label, own_batch, products, rounds, error, covered, time_each))
    return table


RUNS = {
    "held-out": (HELD_OUT_SEEDS, SPECS),
    "unseen": (UNSEEN_SEEDS, UNSEEN_SPECS),
    "tuning": (TUNING_SEEDS, SPECS),
}


KINDS = ((False, True), (False,), (True,))


def longest(error: Tensor, level: float = 0.02) -> int:
    """Length of the longest run of steps above a level."""
    best = now = 0
    for above in (error > level).tolist():
        now = now + 1 if above else 0
        best = max(best, now)
    return best


def row(name: str, series: list[Series], *, wall: bool) -> str:
    """One line of the table."""
    products = [torch.cat([s.products[1:] for s in series if s.own_batch in kinds]).mean() for kinds in KINDS]
    rounds = torch.cat([s.rounds[1:] for s in series]).mean()
    error = torch.cat([s.error for s in series]) * 100
    covered = torch.cat([s.covered for s in series])
    worst = max(float(s.products[1:].mean()) for s in series)
    p50, p95 = error.quantile(torch.tensor([0.5, 0.95], dtype=error.dtype)).tolist()
    cells = [
        name, *(f"{p:.2f}" for p in products), f"{rounds:.2f}", f"{worst:.1f}", f"{p50:.3f}",
        f"{p95:.2f}", f"{error.max():.1f}",
        f"{(error <= 1).double().mean():.2%}", str(int((error > 1).sum())), str(int((error > 2).sum())),
        str(max(longest(s.error) for s in series)), f"{covered.mean():.2%}",
    ]  # fmt: skip
    if wall:
        cells.append(f"{1e3 * sum(s.seconds for s in series) / len(series):.2f}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--runs", choices=list(RUNS), default="held-out",
        help="held-out: seeds that no constant was chosen on; unseen: other kinds of runs; tuning: those it was",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="*", help="instead of the group's own")
    parser.add_argument("--tol", type=float, nargs="*", default=[0.01])
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), help="names of contenders")
    parser.add_argument("--wall", action="store_true", help="add milliseconds a step")
    parser.add_argument("--per-run", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds, specs = RUNS[options.runs]
    for tol in options.tol:
        table = measure(options.only, tol, runs(tuple(options.seeds or seeds), specs))
        series = next(iter(table.values()))
        count, chosen = sum(len(s.error) for s in series), options.seeds or seeds
        print(f"\ntol = {tol}, {len(series)} series, {count} steps, {options.runs} runs, seeds {chosen}\n")
        heads = [
            "solver",
            "products a step",
            "full batch",
            "mini-batch",
            "rounds",
            "worst run",
            "median error %",
            "p95 %",
            "max %",
            "within 1%",
        ]
        heads += [
            "misses > 1%",
            "misses > 2%",
            "longest run > 2%",
            "interval covers",
            *(["ms a step"] if options.wall else []),
        ]
        print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
        for name, found in table.items():
            print(row(name, found, wall=options.wall), flush=True)
        if options.per_run:
            print(f"\n| run | {' | '.join(table)} |\n" + "|---" * (len(table) + 1) + "|")
            for i, one in enumerate(series):
                means = [f"{found[i].products[1:].mean():.2f}" for found in table.values()]
                print(f"| {one.name} | {' | '.join(means)} |")


if __name__ == "__main__":
    main()
