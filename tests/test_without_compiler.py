"""The package without its compiled module: the same numbers in plain torch, and one warning."""

from __future__ import annotations

import os
import subprocess
import sys

ABSENT = 'import sys; sys.modules["sharpkern._C"] = None  # as where it was not built: importing it raises\n'
SHARPNESS = """
import warnings
import torch
from torch import nn
import sharpkern as sk

with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 3)).double()
    x, y = torch.randn(20, 5).double(), torch.randint(3, (20,))
    H = sk.HessianOperator(model, nn.CrossEntropyLoss(), (x, y))
    found = sk.lanczos(H, tol=1e-8).eigenvalues[0].item()
assert sum("right but slower" in str(w.message) for w in told) == 1, [str(w.message) for w in told]
parameters = list(model.parameters())
gradient = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters, create_graph=True)
rows = [torch.autograd.grad(g, parameters, retain_graph=True) for g in torch.cat([g.flatten() for g in gradient])]
dense = torch.stack([torch.cat([r.flatten() for r in row]) for row in rows])
truth = torch.linalg.eigvalsh(dense)[-1].item()
assert abs(found - truth) < 1e-6 * truth, (found, truth)
"""


def run(code: str, **environment: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "SHARPKERN_BACKEND"} | environment
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ABSENT + code], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr


def test_numbers_are_right_and_one_warning_says_that_they_take_longer() -> None:
    run(SHARPNESS)


def test_who_asks_for_plain_torch_is_not_warned() -> None:
    run(
        "import warnings; warnings.simplefilter('error', RuntimeWarning)\nimport sharpkern.kernels",
        SHARPKERN_BACKEND="reference",
    )
