"""Check the sharpkern that is installed: its sharpness against a dense Hessian, and that it runs on what is expected.

python scripts/smoke.py compiled|plain
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

import sharpkern as sk
from sharpkern import kernels


def main() -> None:
    """Check, and print a line."""
    expected = sys.argv[1]
    assert Path(sys.prefix) in Path(sk.__file__).parents, f"{sk.__file__} is not the installed package"
    reason = kernels.why_not("cpu", "gram", torch.zeros(1, 1))
    assert (reason is None) == (expected == "compiled"), reason

    # Two would fight for the processors.
    maps = Path("/proc/self/maps")
    openmp = (
        {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line} if maps.exists() else set()
    )
    assert len(openmp) <= 1, openmp

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)).double()
    batch, loss_fn = (torch.randn(40, 6).double(), torch.randint(3, (40,))), nn.CrossEntropyLoss()
    found = sk.sharpness(model, loss_fn, batch, tol=1e-8).value
    truth = torch.linalg.eigvalsh(dense_hessian(model, loss_fn, batch))[-1].item()
    assert abs(found - truth) <= 1e-6 * truth, (found, truth)
    # From the environment's own script, as a user types it.
    command = Path(sys.executable).parent / "sharpkern"
    subprocess.run([command, "train", "--help"], check=True, stdout=subprocess.DEVNULL)
    where = f"{expected}, Python {sys.version.split()[0]}, torch {torch.__version__}"
    print(
        f"smoke: {where}: sharpness {found:.6f} as the dense Hessian's, {milliseconds():.2f} ms a product", flush=True
    )


def dense_hessian(model: nn.Module, loss_fn: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Differentiate twice, row by row."""
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(loss_fn(model(batch[0]), batch[1]), parameters, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradient])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in flat]
    return torch.stack([torch.cat([r.flatten() for r in row]) for row in rows])


def milliseconds() -> float:
    """Time a product of a network with norms, where compiled kernels matter; the least of 30."""
    layers = [layer for _ in range(4) for layer in (nn.Linear(256, 256), nn.LayerNorm(256), nn.GELU())]
    model, batch = nn.Sequential(*layers, nn.Linear(256, 10)), (torch.randn(128, 256), torch.randint(10, (128,)))
    hessian = sk.HessianOperator(model, nn.CrossEntropyLoss(), batch)
    v, seconds = torch.randn(hessian.n), []
    for _ in range(30):
        start = time.perf_counter()
        hessian @ v
        seconds.append(time.perf_counter() - start)
    return 1e3 * min(seconds)


if __name__ == "__main__":
    main()
