"""The tracker's first solve, with and without the gradient as a hint: ``python benchmarks/first_step.py``.

The kinds of runs of ``tracking_runs.py``, at initialisation and after 60 steps, each operator (H, and for Adam the
preconditioned one) from five random starts. The truth is a solve to a hundredth of the tolerance from four random
vectors. Prints products, and how often the value is off.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from tracking_runs import SPECS, UNSEEN_SPECS, Spec, problem

import sharpkern as sk
from sharpkern.eigen import WarmLanczos, lanczos

TOL, STARTS, AGES = 0.01, 5, (0, 60)


def moments(spec: Spec) -> Iterator[tuple[str, sk.HessianOperator | sk.PreconditionedOperator, Tensor]]:
    """Give each operator of a run with the gradient in its coordinates, ``[1, n]``."""
    model, loss_fn, x, y = problem(spec, torch.float32)
    size = spec.batch or len(x)
    H = sk.HessianOperator(model, loss_fn, (x[:size], y[:size]))
    if spec.optimizer == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=spec.lr / 10)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5 / float(lanczos(H, 1, tol=TOL).eigenvalues[0]))
    for step in range(AGES[-1] + 1):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        if step in AGES:
            H.refresh()
            yield f"{spec.name}, step {step}", H, H.gradient[None].clone()
        optimizer.step()
        if step in AGES and spec.optimizer == "adam":
            H.refresh()
            P = sk.PreconditionedOperator(H, sk.preconditioner(optimizer))
            yield f"{spec.name}, step {step}, preconditioned", P, H.gradient[None] * P.inv_sqrt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12])
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    products: dict[bool, list[int]] = {True: [], False: []}
    errors: dict[bool, list[float]] = {True: [], False: []}
    for spec in (replace(s, seed=seed) for seed in seeds for s in (*SPECS, *UNSEEN_SPECS)):
        for name, op, gradient in moments(spec):
            start = torch.randn(4, op.n, generator=torch.Generator().manual_seed(spec.seed))
            truth = float(lanczos(op, 2, tol=TOL / 100, v0=start, max_matvecs=1500, max_basis=100).eigenvalues[0])
            for hinted in (True, False):
                for seed in range(STARTS):
                    solver = WarmLanczos(tol=TOL, generator=torch.Generator().manual_seed(seed))
                    result = solver.step(op, hint=gradient if hinted else None)
                    products[hinted].append(result.matvecs)
                    errors[hinted].append(abs(float(result.eigenvalues[0]) / truth - 1))
                    if errors[hinted][-1] > TOL:
                        print(f"{name}: off by {errors[hinted][-1]:.1%}")
    print("| start | solves | products | 95% below | most | off by > 0.2% | > 1% | largest error % |")
    print("|---|---|---|---|---|---|---|---|")
    for hinted, what in ((True, "gradient and random"), (False, "random, with the audit")):
        p, e = torch.tensor(products[hinted], dtype=torch.float64), torch.tensor(errors[hinted])
        print(
            f"| {what} | {len(p)} | {float(p.mean()):.1f} | {float(p.quantile(0.95)):.0f} | {int(p.max())} | "
            f"{int((e > 0.002).sum())} | {int((e > 0.01).sum())} | {100 * float(e.max()):.2f} |"
        )


if __name__ == "__main__":
    main()
