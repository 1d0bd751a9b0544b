"""How often the regime classifier agrees with how a network was built: muP and zero readout C1, standard C2.

    python benchmarks/regimes.py [--seeds 20] [--steps 256] [--width 128] [--examples 500]

Full-batch gradient descent on real images with mean squares; a linear warmup from 0 to twice the inverse of the
initial sharpness, so that the threshold is met early only if the sharpness rises. Seeds are fresh and printed.
"""

from __future__ import annotations

import argparse
import random

import torch

import sharpkern as sk
from sharpkern.train.config import DataConfig
from sharpkern.train.data import load
from sharpkern.train.losses import half_mean_squares
from sharpkern.train.models import FCN

BUILT = {
    "mup": ({"parameterisation": "mup"}, "C1"),
    "zero readout": ({"parameterisation": "sp", "zero_readout": True}, "C1"),
    "sp": ({"parameterisation": "sp"}, "C2"),
}


def regime(options: dict, seed: int, *, steps: int, width: int, batch: tuple[torch.Tensor, torch.Tensor]) -> sk.Regime:
    model = FCN(batch[0][0].numel(), 10, width=width, seed=seed, **options)
    sharpness = sk.sharpness(model, half_mean_squares, batch).value
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = sk.WarmupLR(optimizer, 2 / sharpness, steps)
    tracker = sk.SharpnessTracker(model, half_mean_squares, optimizer, tol=0.03)
    records = []
    for _ in range(steps):
        records.append(tracker.step(batch))
        optimizer.step()
        schedule.step()
    return sk.classify_regime([r.sharpness for r in records], [r.lr for r in records], 2.0)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("seeds", 20), ("steps", 256), ("width", 128), ("examples", 500)):
        parser.add_argument(f"--{name}", type=int, default=default)
    o = parser.parse_args()
    torch.set_num_threads(1)
    data = load(DataConfig("fashion-mnist-5k", limit=o.examples))
    batch = data.train_inputs, torch.nn.functional.one_hot(data.train_targets, 10).float()
    seeds = [random.SystemRandom().randrange(2**31) for _ in range(o.seeds)]
    for name, (options, want) in BUILT.items():
        right, trends = 0, []
        for seed in seeds:
            found = regime(options, seed, steps=o.steps, width=o.width, batch=batch)
            trends.append(found.trend)
            right += found.name == want
            if found.name != want:
                print(f"  {name}, seed {seed}: {found.name}: {found.evidence}", flush=True)
        spread = f"{min(trends):.2f} to {max(trends):.2f}"
        print(f"{name}: {right} of {o.seeds} seeds {want}; trend {spread}", flush=True)


if __name__ == "__main__":
    main()
