"""A whole sweep whose cells are trained together, against the same cells one after the other, in this process.

    python benchmarks/bench_sweep.py [--rounds 3]

FCN-3 with 784 inputs, mean squares, one thread, no tracking after the first step; both ways share data and exported
program. Processor seconds of all cells, evaluation, files and critical learning rate included, the smallest of
interleaved rounds after one cell as warm-up.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from interleave import interleave

from sharpkern.sweep.grid import read_sweep
from sharpkern.sweep.groups import groups, run_group
from sharpkern.sweep.run import run_cell

# width, examples, steps, mini-batch, cells
CASES = ((32, 500, 160, None, 32), (64, 500, 160, None, 32), (64, 1000, 160, None, 16), (64, 1000, 160, 32, 32))
TEXT = """
loss = "mse"
steps = {steps}
eval_every = 20
{batch}
[model]
width = {width}
depth = 3
[data]
limit = {examples}
[tracking]
every = {steps}
[sweep.grid]
optimizer.lr = [0.01, 0.02, 0.04, 0.08]
optimizer.warmup_steps = [1, 16]
seed = {seeds}
"""


def seconds(text: str, *, together: bool) -> float:
    """Return the processor time of a sweep from nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sweep.toml"
        path.write_text(text)
        cells = read_sweep(path, Path(folder) / "out").cells
        start = time.process_time()
        if together:
            for group in groups(cells):
                run_group(group)
        else:
            for cell in cells:
                run_cell(cell)
        return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| width, images, batch, steps, cells | one after the other, s | together, s | gain |\n|---|---|---|---|")
    for width, examples, steps, batch, cells in CASES:
        size = "" if batch is None else f"batch_size = {batch}"
        text = TEXT.format(steps=steps, batch=size, width=width, examples=examples, seeds=list(range(cells // 8)))
        seconds(text.replace("[0.01, 0.02, 0.04, 0.08]", "[0.01]").replace("[1, 16]", "[1]"), together=False)
        calls: dict[str, Callable[[], float]] = {
            "alone": partial(seconds, text, together=False), "together": partial(seconds, text, together=True)
        }  # fmt: skip
        best = {name: min(found) for name, found in interleave(calls, rounds, untimed=0).items()}
        print(
            f"| {width}, {examples}, {batch or 'full'}, {steps}, {cells} | {best['alone']:.1f} "
            f"| {best['together']:.1f} | × {best['alone'] / best['together']:.2f} |", flush=True
        )  # fmt: skip


if __name__ == "__main__":
    main()
