"""The critical learning rate at initialisation in units of 2 / lambda_0, by width: near 1 where the network is wide.

    python examples/critical_rate.py [SEEDS]            # eight fresh seeds by default, about 2 minutes

For a quadratic it is lambda_0 / lambda_D, with the curvature lambda_D = D'HD / D'g along the gradient D: printed, too.
What exceeds that is the fall of the curvature within the step, which narrow networks show. Mean squares, full batch.
"""

from __future__ import annotations

import random
import sys

import torch
from common import figure, images, loss_fn, network, save

import sharpkern as sk

WIDTHS = (64, 128, 256, 512)


def main(count: int) -> None:
    """Measure each width and parameterisation at fresh seeds."""
    batch = images(1000)
    seeds = [random.SystemRandom().randrange(2**31) for _ in range(count)]
    print(f"seeds {seeds}")
    made, axes = figure(1, 2, "Critical learning rate at initialisation, FCN-4, mean squares, 1,000 images", height=3.4)
    for panel, parameterisation in zip(axes[0], ("sp", "mup"), strict=True):
        for width in WIDTHS:
            found, quadratic, rises = [], [], []
            for seed in seeds:
                model = network(parameterisation, seed, width)
                sharpness = sk.sharpness(model, loss_fn, batch).value
                optimizer = torch.optim.SGD(model.parameters(), lr=1 / sharpness)
                critical = sk.critical_learning_rate(model, loss_fn, batch, optimizer)
                hessian = sk.HessianOperator(model, loss_fn, batch)
                g = hessian.gradient
                rises.append(critical.rise)
                found.append(critical.value * sharpness / 2)
                quadratic.append(float(sharpness * (g @ g) / (g @ (hessian @ g))))
            panel.plot(
                [width] * count, found, "o", color="#1f5fa8", alpha=0.6, label="measured" if width == 64 else None
            )
            panel.plot(
                [width * 1.08] * count, quadratic, "_", color="#555555", markersize=9,
                label="of the quadratic model" if width == 64 else None,
            )  # fmt: skip
            inside = sum(1 <= x <= 3 for x in found)
            print(
                f"{parameterisation}, width {width}: {min(found):.2f} to {max(found):.2f}, {inside} of {count} within "
                f"[1, 3]; quadratic model {min(quadratic):.2f} to {max(quadratic):.2f}; there the loss has risen by at "
                f"most {max(rises):.1%}",
                flush=True,
            )
        panel.axhspan(1, 3, color="#2e8b57", alpha=0.12)
        panel.set_xscale("log", base=2)
        panel.set_xticks(WIDTHS, [str(w) for w in WIDTHS])
        panel.set(title={"sp": "SP", "mup": "muP"}[parameterisation], xlabel="width", ylabel="critical lr × λ₀ / 2")
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=9)
    save(made, "critical_rate")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8)
