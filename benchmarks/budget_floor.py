"""What a tracker could do with 30% of the time at batch 128: ``python benchmarks/budget_floor.py [--steps 110]``.

FCN-4-512 on real images, mean squares, SGD through warmup and its first catapult. At every step the sharpness of
fixed probes of several sizes is found; then values are bought from these series, for what a value costs: the probe's
primal sweeps and two products (what an oracle needs that knows when to stop). Between them the last value is carried.

- oracle: the steps that are measured are chosen in hindsight, so that the sum of errors (each at most 1) is least.
- evenly: every so many steps.
- alarm: evenly, and besides where the loss of the step's batch is 30% above or below what it was at the last value;
  paid from the same purse, which may be overdrawn by ten values and measures nothing else until it is paid.

Writes results/budget_floor.json and prints the table. Times are those of the processor, on one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from run import machine, versions
from torch import Tensor

import sharpkern as sk
from sharpkern.train.config import DataConfig
from sharpkern.train.data import load
from sharpkern.train.models import FCN

BATCH, FRACTION, PRODUCTS, SIZES = 128, 0.3, 2, (16, 64, 128)
ALARM, DEBT = 0.3, 10
ROOT = Path(__file__).parents[1]


def series(steps: int) -> dict[str, Any]:
    """Train, and return loss by step and sharpness by probe and step, with what a value costs in steps."""
    data = load(DataConfig("fashion-mnist-5k"))
    x, y = data.train_inputs, F.one_hot(data.train_targets, 10).float()
    model = FCN(784, 10, depth=4, width=512, activation="relu", parameterisation="sp", seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = sk.WarmupLR(optimizer, 0.5, 150)
    generator = torch.Generator().manual_seed(1)
    probes = {m: sk.HessianOperator(model, F.mse_loss, (x[:m], y[:m])) for m in SIZES}
    vectors: dict[int, Tensor | None] = dict.fromkeys(SIZES)
    found: dict[str, Any] = {"loss": [], "sharpness": {m: [] for m in SIZES}, "price": {}}
    own: list[float] = []
    for _ in range(steps):
        rows = torch.randperm(len(x), generator=generator)[:BATCH]
        for m, H in probes.items():
            H.refresh()
            start = torch.randn(1, H.n)
            last = vectors[m]
            result = sk.lanczos(H, tol=1e-3, v0=start if last is None else torch.cat([last, start]))
            vectors[m] = result.eigenvectors
            found["sharpness"][m].append(float(result.eigenvalues[0]))
        begun = time.process_time()
        optimizer.zero_grad()
        loss = F.mse_loss(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        own.append(time.process_time() - begun)
        schedule.step()
        found["loss"].append(loss.item())
    for m, H in probes.items():
        v = torch.randn(H.n)

        def value(H: sk.HessianOperator = H, v: Tensor = v) -> None:
            H.refresh()
            for _ in range(PRODUCTS):
                H @ v

        value()
        found["price"][m] = statistics.median(timed(value) for _ in range(9)) / statistics.median(own)
    return found


def timed(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def errors(values: list[float], measured: list[int]) -> list[float]:
    """Return each step's relative error of the value carried from the last step measured."""
    result, last = [], measured[0]
    for t, value in enumerate(values):
        last = t if t in measured else last
        result.append(abs(values[last] / value - 1))
    return result


def oracle(values: list[float], count: int) -> list[int]:
    """Choose the steps to measure in hindsight, the first among them: least sum of errors, each at most 1."""
    n = len(values)
    v = torch.tensor(values, dtype=torch.float64)
    cost = ((v[:, None] / v[None] - 1).abs().clamp(max=1)).triu().cumsum(1)  # [i, t]: carried from i through t
    best = cost[0].clone()  # through step t, with one value
    choices = []
    for _ in range(1, count):
        # A new value at i, after the best for the steps before it.
        through = torch.cat([torch.full((1,), torch.inf, dtype=torch.float64), best[:-1]])[:, None] + cost
        through = torch.where(torch.ones(n, n).triu().bool(), through, torch.inf)
        best, chosen = through.min(0)
        choices.append(chosen)
    measured, t = [], n - 1
    for chosen in reversed(choices):
        measured.append(int(chosen[t]))
        t = measured[-1] - 1
    return [0, *reversed(measured)]


def evenly(values: list[float], count: int) -> list[int]:
    return sorted({int(i * len(values) / count) for i in range(count)})


def alarmed(values: list[float], losses: list[float], price: float) -> list[int]:
    """Measure when the purse is full, and on the alarm of the loss seen so far."""
    measured, purse = [0], 0.0
    for t in range(1, len(values)):
        purse += FRACTION
        # The loss of the step just taken; the present one is known too, for the gradient is.
        jump = abs(losses[t] / losses[measured[-1]] - 1) > ALARM
        if purse >= price or (jump and purse > -DEBT * price):
            measured.append(t)
            purse -= price
    return measured


def rows(found: dict[str, Any]) -> list[list[Any]]:
    """Return size, price, way, values bought, median, 95% and largest error."""
    table = []
    for m in SIZES:
        values, price = found["sharpness"][m], found["price"][m]
        count = max(1, min(len(values), int(FRACTION * len(values) / price)))
        ways = {"oracle": oracle(values, count), "evenly": evenly(values, count),
                "alarm": alarmed(values, found["loss"], price)}  # fmt: skip
        for way, measured in ways.items():
            e = torch.tensor(errors(values, measured), dtype=torch.float64)
            table.append([m, price, way, len(measured), *(float(e.quantile(q)) for q in (0.5, 0.95, 1.0))])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=110)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = series(options.steps)
    result = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine(), "versions": versions(), "series": found,
        "rows": rows(found),
    }  # fmt: skip
    (ROOT / "benchmarks" / "results" / "budget_floor.json").write_text(json.dumps(result))
    print(
        "| probe | a value costs, in steps | way | values | median error % | p95 % | largest % |\n" + "|---" * 7 + "|"
    )
    for m, price, way, count, *e in result["rows"]:
        print(f"| {m} | {price:.2f} | {way} | {count} | " + " | ".join(f"{100 * x:.1f}" for x in e) + " |")


if __name__ == "__main__":
    main()
