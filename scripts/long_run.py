"""Track a long run: are memory, time per step and accuracy at its end what they were at its start?

    python scripts/long_run.py                       # 20,000 steps, about ten minutes on one core
    python scripts/long_run.py --steps 2000 --out docs/long_run.json

A small network is trained by Adam on batches that are new at every step. Most have one of three sizes. Every 100 steps
comes one of another size, of twelve that take turns: more than the engines that are kept, so that exported programs are
made and dropped all the time. Every 500 steps the step's Hessian is multiplied by blocks of more widths than the
recordings that are kept. At 40 steps the tracked values are compared with those of the dense Hessian in float64.

Exit code 1: the memory grew by more than 2% after a tenth of the run, the median time of a step (of this process, not
of the clock) in the last quarter is more than 10% above that of the first, or the largest error of the last quarter is
larger than that of the first by more than ``tol``.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpkern as sk

TOL = 0.01  # of the tracker
MEMORY, SLOWER = 0.02, 0.10  # what may be gained
_USUAL, _OTHERS = (32, 24, 16), tuple(range(33, 45))  # sizes of batches
_OTHER_EVERY, _BLOCKS_EVERY = 100, 500
_WIDTHS = range(1, 13)  # of blocks
_COMPARED = 40  # steps at which there is a truth
_ROWS = 20  # of the table


@dataclass(frozen=True)
class Row:
    """A stretch of the run.

    Attributes:
        step: its last one.
        mebibytes: resident memory after a collection of garbage.
        objects: tensors that are alive.
        milliseconds: median time of a tracked step, of this process and without the optimizer's.
        products: mean number of products of a step.
        engines: programs that are kept.
        made: programs made since the start.
        error: largest relative error of both tracked values.
    """

    step: int
    mebibytes: float
    objects: int
    milliseconds: float
    products: float
    engines: int
    made: int
    error: float


class Run:
    """A model in training with its tracker.

    Args:
        seed: of model, data and noise.
    """

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 3))
        self.teacher = torch.randn(8, 3)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.tracker = sk.SharpnessTracker(self.model, F.cross_entropy, self.optimizer, tol=TOL)
        self.seen: set[int] = set()  # engines by identity, as long as they are alive
        self.made = 0

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return a new batch, with a quarter of its labels at random: there is no end to this training."""
        size = _USUAL[step % len(_USUAL)]
        if step % _OTHER_EVERY == 0:
            size = _OTHERS[step // _OTHER_EVERY % len(_OTHERS)]
        x = torch.randn(size, 8)
        y = (x @ self.teacher).argmax(1)
        return x, torch.where(torch.rand(size) < 0.25, torch.randint(0, 3, (size,)), y)

    def step(self, step: int, *, compared: bool) -> tuple[float, int, float]:
        """Train one step; return its seconds, its products and, if it is compared, its largest error."""
        batch = self.batch(step)
        dense = self._dense(batch) if compared else None
        start = time.process_time()
        record = self.tracker.step(batch)
        seconds = time.process_time() - start
        self._count()
        if step % _BLOCKS_EVERY == 0:
            for width in _WIDTHS:
                self.tracker.hessian @ torch.randn(self.tracker.hessian.n, width)
        self.optimizer.step()
        return seconds, record.matvecs, 0.0 if dense is None else self._error(dense, record)

    def _count(self) -> None:
        present = {id(engine) for engine in self.tracker.hessian._engines}
        self.made += len(present - self.seen)
        self.seen = present

    def _dense(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the Hessian ``[n, n]`` of the step, by torch alone."""
        x, y = batch[0].double(), batch[1]
        sizes = [p.shape for p in self.model.parameters()]
        names = [name for name, _ in self.model.named_parameters()]
        flat = torch.cat([p.detach().double().flatten() for p in self.model.parameters()])

        def loss(v: Tensor) -> Tensor:
            parts = v.split([size.numel() for size in sizes])
            named = {name: p.view(size) for name, p, size in zip(names, parts, sizes, strict=True)}
            return F.cross_entropy(torch.func.functional_call(self.model, named, (x,)), y)

        return torch.autograd.functional.hessian(loss, flat)

    def _error(self, dense: Tensor, record: sk.Record) -> float:
        """Compare with the Hessian, and with that in Adam's metric, whose second moments the step has updated."""
        group = self.optimizer.param_groups[0]
        states = [self.optimizer.state[p] for p in self.model.parameters()]
        first, second = (1 - beta ** int(states[0]["step"]) for beta in group["betas"])
        v = torch.cat([state["exp_avg_sq"].double().flatten() for state in states])
        s = (first * ((v / second).sqrt() + group["eps"])).rsqrt()
        truths = (float(torch.linalg.eigvalsh(A)[-1]) for A in (dense, s[:, None] * dense * s))
        values = record.sharpness, record.preconditioned_sharpness
        return max(abs(value / truth - 1) for value, truth in zip(values, truths, strict=True))


def rows_of(run: Run, steps: int) -> Iterator[Row]:
    """Train, and give a row after each twentieth of the steps."""
    stretch, between = max(1, steps // _ROWS), max(1, steps // _COMPARED)
    spent, products, errors = [], [], []
    for step in range(1, steps + 1):
        seconds, matvecs, error = run.step(step, compared=step % between == 0)
        spent.append(seconds)
        products.append(matvecs)
        errors.append(error)
        if step % stretch == 0:
            gc.collect()
            yield Row(
                step, _resident(), tensors_alive(), 1e3 * statistics.median(spent), statistics.fmean(products),
                len(run.tracker.hessian._engines), run.made, max(errors),
            )  # fmt: skip
            spent, products, errors = [], [], []


def tensors_alive() -> int:
    """Count the tensors of this process."""
    return sum(type(x) is Tensor or type(x) is nn.Parameter for x in gc.get_objects())


def faults(rows: list[Row]) -> list[str]:
    """Say what is worse at the end than at the start."""
    quarter = len(rows) // 4
    first, last = rows[:quarter], rows[-quarter:]
    found = []
    settled = rows[max(0, len(rows) // 10 - 1)]
    most = max(row.mebibytes for row in rows if row.step >= settled.step)
    if most > (1 + MEMORY) * settled.mebibytes:
        found.append(f"memory grew from {settled.mebibytes:.1f} MiB at step {settled.step} to {most:.1f} MiB.")
    before, after = (statistics.median(row.milliseconds for row in part) for part in (first, last))
    if after > (1 + SLOWER) * before:
        found.append(f"a step takes {after:.2f} ms in the last quarter, {before:.2f} ms in the first.")
    before, after = (max(row.error for row in part) for part in (first, last))
    if after > before + TOL:
        found.append(f"the largest error is {after:.1e} in the last quarter, {before:.1e} in the first.")
    return found


def _resident() -> float:
    """Return this process's resident memory in MiB, of Linux."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def main() -> int:
    """Run, print the table, and say what is worse at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file")
    given = parser.parse_args()
    rows = []
    print("| step | memory, MiB | tensors | ms a step | products a step | programs kept | made | largest error |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows_of(Run(given.seed), given.steps):
        rows.append(row)
        print(
            f"| {row.step:,} | {row.mebibytes:.1f} | {row.objects} | {row.milliseconds:.2f} | {row.products:.1f} | "
            f"{row.engines} | {row.made} | {row.error:.1e} |",
            flush=True,
        )
    if given.out is not None:
        given.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    for fault in (found := faults(rows)):
        print(fault)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
