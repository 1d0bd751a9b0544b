"""Ask every eigenvalue solver about thousands of random operators, and count what its claims were worth.

    python scripts/bounds_campaign.py [--cases 5000] [--seed 1] [--out docs/bounds.json]

The operators are those of tests/random_operators.py: clustered, negative, low-rank, zero, bipartite, multiples of the
identity, scales 1e-30 to 1e30, in float32 and float64, from starts that are eigenvectors, orthogonal to the top,
denormal, NaN. The exit code is 1 if a bound does not hold, a start that must be refused is not, or a solver raises.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from random_operators import SOLVERS, Case, bounded_above, cases, judge, refused, solve

COLUMNS = (
    "cases", "error bound holds", "gap estimate holds", "converged", "converged below an eigenvalue asked for",
    "the same, from random starts", "slowest, s"
)  # fmt: skip


class Campaign:
    """Counts of every solver, and the cases that went wrong."""

    def __init__(self) -> None:
        self.counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.slowest: dict[str, float] = collections.defaultdict(float)
        self.faults: list[str] = []
        self.refused = self.cases = 0

    def run(self, case: Case) -> None:
        """Ask every solver about one operator."""
        self.cases += 1
        op, truth, start = case.build()
        if self.cases % 500 == 0:
            print(f"{self.cases} operators, {len(self.faults)} faults", file=sys.stderr, flush=True)
        for name in SOLVERS:
            if name == "lobpcg" and case.n < 3:
                continue
            began = time.perf_counter()
            try:
                result = solve(name, case, op, start)
            except Exception as error:  # a campaign goes on and counts
                if isinstance(error, ValueError) and refused(name, case):
                    self.refused += 1
                else:
                    self.faults.append(f"{name} raised {type(error).__name__}: {error} {case}")
                continue
            if refused(name, case):
                self.faults.append(f"{name} took a start that is {case.start}: {case}")
                continue
            self.slowest[name] = max(self.slowest[name], time.perf_counter() - began)
            verdict = judge(result, truth)
            self.counts[name].update(cases=1, **{key: int(value) for key, value in vars(verdict).items()})
            if case.start in ("none", "random"):
                self.counts[name].update(random=1, random_missed=int(verdict.missed))
            if not verdict.covered:
                self.faults.append(f"{name}: bound does not hold: {case}")
        holds = bounded_above(case, op, truth)
        self.counts["certify"].update(cases=1, covered=holds)
        if not holds:
            self.faults.append(f"certify: bound does not hold: {case}")

    def table(self) -> list[list[str]]:
        """Return the rows behind COLUMNS, one for each solver."""
        rows = []
        for name, c in self.counts.items():
            if name == "certify":  # no result but its bound
                rows.append([name, str(c["cases"]), f"{c['covered'] / c['cases']:.2%}", *5 * [""]])
                continue
            shares = [f"{c[key] / c['cases']:.2%}" for key in ("covered", "estimated", "converged", "missed")]
            shares.append(f"{c['random_missed'] / max(c['random'], 1):.2%}")
            rows.append([name, str(c["cases"]), *shares, f"{self.slowest[name]:.2f}"])
        return rows


def main() -> int:
    """Run the campaign and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the counts to this JSON file")
    given_arguments = parser.parse_args()
    torch.set_num_threads(1)
    campaign = Campaign()

    @seeded(given_arguments.seed)
    @settings(max_examples=given_arguments.cases, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(cases())
    def ask(case: Case) -> None:
        campaign.run(case)

    try:
        ask()
    except KeyboardInterrupt:
        print("interrupted: what was counted until then")
    print(f"{campaign.cases} operators; {campaign.refused} starts refused that are NaN or zero.\n")
    print(f"| solver | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for row in campaign.table():
        print(f"| {' | '.join(row)} |")
    print(f"\n{len(campaign.faults)} faults")
    print("\n".join(campaign.faults[:20]))
    if given_arguments.out:
        given_arguments.out.write_text(json.dumps({k: dict(v) for k, v in campaign.counts.items()}, indent=1) + "\n")
    return 1 if campaign.faults else 0


if __name__ == "__main__":
    sys.exit(main())
