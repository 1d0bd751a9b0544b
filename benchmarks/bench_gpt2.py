"""GPT-2 with 124 million parameters on four texts of 1,024 tokens: forecast, and what the process then needed.

    OMP_NUM_THREADS=2 python benchmarks/bench_gpt2.py [--texts 4] [--context 1024]

One text at a time, with ``recompute``. Prints what ``tracker.memory`` says, in a process of its own, and then the
seconds and the process's peak, parameters and libraries included, after loss and gradient, a product, and a form.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from workloads import gpt2

import sharpkern as sk

GB = 1e9


def peak() -> float:
    """Return the most memory that this process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


def told(what: str, call: Callable[[], object]) -> object:
    """Run and print the seconds and the peak so far."""
    start = time.perf_counter()
    result = call()
    print(f"{what}: {time.perf_counter() - start:.0f} s, peak {peak():.1f} GB", flush=True)
    return result


def forecast(model: torch.nn.Module, loss_fn: Callable[..., torch.Tensor], batch: object) -> None:
    """Print what the tracker says that a step will need."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = sk.SharpnessTracker(model, loss_fn, optimizer, chunk=1, recompute=True)
    start = time.perf_counter()
    need = tracker.memory(batch)
    said = ", ".join(f"{name} {getattr(need, name) / GB:.1f}" for name in ("gradient", "primal", "form", "product"))
    print(f"forecast, GB beyond parameters: {said}; it took {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--forecast", action="store_true", help="print the forecast alone")
    options = parser.parse_args()
    model, loss_fn, batch = gpt2(options.context, options.texts)
    if options.forecast:
        forecast(model, loss_fn, batch)
        return
    flags = ["--texts", str(options.texts), "--context", str(options.context)]
    subprocess.run([sys.executable, __file__, "--forecast", *flags], check=True)  # its peak is not ours
    print(f"parameters and batch: peak {peak():.1f} GB")
    parts = sk.MicroBatches.split(batch, 1)
    H: sk.ChunkedHessian = told("loss and gradient", lambda: sk.ChunkedHessian(model, loss_fn, parts, recompute=True))
    v = torch.randn(H.n)
    product: torch.Tensor = told("product", lambda: H @ v)
    form: torch.Tensor = told("form", lambda: H.quadratic_form(v))
    print(f"loss {float(H.loss):.4f}; v'(Hv) {float(v.double() @ product.double()):.6g}, form {float(form):.6g}")


if __name__ == "__main__":
    main()
