"""What a Hessian-vector product costs, in gradients of the same loss: ``python benchmarks/bench_hvp.py``.

Contenders run interleaved: torch's forward + backward (the unit), sharpkern's primal sweeps, its product with one
vector (the first after the primal sweeps also computes what all products of a step share) and with four, and double
backward with the graph kept (attention on the math path, which alone has second derivatives). The floor is the
product's matrix products and convolutions alone. Every timed product is checked against double backward first.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
from floor import floor_of
from interleave import interleave, ratio
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import WORKLOADS

import sharpkern as sk


def measure(name: str, rounds: int) -> dict[str, object]:
    """Time one workload; see the module's docstring."""
    torch.manual_seed(0)
    model, loss_fn, (x, y) = WORKLOADS[name]()
    params = list(model.parameters())
    H = sk.HessianOperator(model, loss_fn, (x, y))
    V = torch.randn(4, H.n)
    with sdpa_kernel(SDPBackend.MATH):
        kept = torch.autograd.grad(loss_fn(model(x), y), params, create_graph=True)
    vectors = [part.view_as(p) for part, p in zip(V[0].split([p.numel() for p in params]), params, strict=True)]

    def double_backward() -> list[torch.Tensor]:
        return list(torch.autograd.grad(kept, params, vectors, retain_graph=True))

    want = torch.cat([t.reshape(-1) for t in double_backward()])
    got = H.matvec(V[0])
    error = float((got - want).norm() / want.norm())
    block_error = float((H.matmat(V.t())[:, 0] - want).norm() / want.norm())
    if not max(error, block_error) <= 1e-4:
        raise SystemExit(f"{name}: products are wrong ({error:.1e}, block {block_error:.1e}); nothing was timed.")
    seconds = interleave(
        {
            "gradient": lambda: torch.autograd.grad(loss_fn(model(x), y), params),
            "primal sweeps": H.refresh,
            "first HVP": lambda: H.matvec(V[0]),
            "HVP": lambda: H.matvec(V[0]),
            "HVP, 4 vectors": lambda: H.matmat(V.t()),
            "autograd, graph kept": double_backward,
            "floor": floor_of(lambda: H.matvec(V[0])),
        },
        rounds,
    )
    ratios = {key: ratio(seconds, key, "gradient") for key in seconds if key != "gradient"}
    ratios["HVP / floor"] = ratio(seconds, "HVP", "floor")
    return {
        "parameters": H.n,
        "error": error,
        "gradient_ms": 1e3 * min(seconds["gradient"]),
        "ratios": ratios,
        "seconds": seconds,
    }


def main() -> None:
    """Print the table; write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write all timings here")
    parser.add_argument("names", nargs="*", default=[], help=f"of {', '.join(WORKLOADS)}; all by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {}
    columns = ["primal sweeps", "first HVP", "HVP", "HVP, 4 vectors", "autograd, graph kept", "HVP / floor"]
    print("Ratios to one gradient (torch's forward + backward): of minima, and median of per-round ratios.\n")
    print(f"| {'workload':<9} | parameters | gradient ms | " + " | ".join(f"{c:>20}" for c in columns) + " |")
    print("|---|---|---|" + "---|" * len(columns))
    for name in options.names or WORKLOADS:
        results[name] = row = measure(name, options.rounds)
        cells = " | ".join(f"{row['ratios'][c]['minima']:>9.2f} {row['ratios'][c]['median']:>10.2f}" for c in columns)
        print(f"| {name:<9} | {row['parameters']:>10,} | {row['gradient_ms']:>11.2f} | {cells} |", flush=True)
    if options.json:
        machine = {
            "torch": torch.__version__,
            "threads": options.threads,
            "cpu": platform.processor() or platform.machine(),
        }
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
