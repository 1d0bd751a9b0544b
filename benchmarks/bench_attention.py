"""Hessian-vector products of causal attention: ``python benchmarks/bench_attention.py``.

The loss is half the sum of squares of the output, so that its Hessian has every term of attention's second derivative.
Contenders, interleaved: the blocked rule, the rule that keeps the probabilities, and double backward on torch's math
path (the one with second derivatives), with the gradient's graph kept and with all of it computed again. Products are
checked against each other first. Memory is the growth of a fresh process's peak, primal sweeps included. On a machine
that does other work too, set ``OMP_WAIT_POLICY=passive``, or threads that wait take the time of those that work.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from interleave import interleave, ratio
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpkern.rop.rules.attention import Blocked, Kept

WIDTH = 64
Product = Callable[[], tuple[Tensor | None, ...]]


def inputs(T: int, heads: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return q, k, v and their tangents, ``[heads, T, 64]``."""
    torch.manual_seed(0)
    six = torch.randn(6, heads, T, WIDTH).unbind()
    return six[:3], six[3:]


def by_rule(way: Blocked | Kept, o: Tensor, tangents: tuple[Tensor, ...]) -> Product:
    """Go on after the forward sweep, whose result is o; return the product."""
    g = o[None].clone()  # of half the sum of squares
    way.backward(g)
    way.prepare(g)
    dq, dk, dv = (d[None] for d in tangents)
    return lambda: way.backward_tangent(way.tangent(dq, dk, dv), g)


def blocked(point: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Product:
    """Return the product of the rule that forms the probabilities in blocks."""
    way = Blocked(WIDTH**-0.5)
    return by_rule(way, way.forward(*point, None, True), tangents)


def kept(point: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Product:
    """Return the product of the rule that keeps the probabilities."""
    way = Kept(WIDTH**-0.5, (True, True, True))
    return by_rule(way, way.forward(*point, None, 0.0, True), tangents)


def gradient(point: tuple[Tensor, ...]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Return leaves and the gradient with its graph."""
    leaves = [t.clone().requires_grad_() for t in point]
    with sdpa_kernel(SDPBackend.MATH):
        o = F.scaled_dot_product_attention(*leaves, is_causal=True)
        return leaves, torch.autograd.grad(0.5 * o.square().sum(), leaves, create_graph=True)


def graph_kept(point: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Product:
    """Return double backward through one graph."""
    leaves, grads = gradient(point)
    return lambda: torch.autograd.grad(grads, leaves, tangents, retain_graph=True)


def recomputed(point: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Product:
    """Return double backward with forward and gradient in each product."""

    def product() -> tuple[Tensor, ...]:
        leaves, grads = gradient(point)
        return torch.autograd.grad(grads, leaves, tangents)

    return product


CONTENDERS = {"blocked": blocked, "P kept": kept, "autograd, graph kept": graph_kept, "autograd": recomputed}


def peak(name: str, T: int, heads: int) -> float:
    """Return MiB by which the peak of this process grows."""
    CONTENDERS[name](*inputs(64, heads))()  # libraries allocate their workspaces
    point, tangents = inputs(T, heads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    CONTENDERS[name](point, tangents)()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def peak_of_fresh_process(name: str, T: int, options: argparse.Namespace) -> float:
    """Run ``peak`` by itself."""
    flags = ["--peak", name, "--heads", str(options.heads), "--threads", str(options.threads), str(T)]
    return float(subprocess.run([sys.executable, __file__, *flags], check=True, capture_output=True, text=True).stdout)


def seconds(T: int, heads: int, rounds: int) -> dict[str, list[float]]:
    """Check the contenders against each other, then time them."""
    point, tangents = inputs(T, heads)
    products = {name: make(point, tangents) for name, make in CONTENDERS.items()}
    want = products["autograd"]()
    for name, product in products.items():
        for part, expected in zip(product(), want, strict=True):
            error = float((part.view_as(expected) - expected).norm() / expected.norm())
            if not error <= 1e-4:
                raise SystemExit(f"T = {T}, {name}: the product is wrong ({error:.1e}); nothing was timed.")
    return interleave(products, rounds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--peak", choices=CONTENDERS, help="print the peak memory of one contender, in MiB")
    parser.add_argument("lengths", nargs="*", type=int, default=[512, 1024, 2048, 4096])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak(options.peak, options.lengths[0], options.heads))
        return
    # a child's peak starts at its parent's, so all memory comes before the parent holds any
    peaks = {(T, name): peak_of_fresh_process(name, T, options) for T in options.lengths for name in CONTENDERS}
    print(f"Causal, {options.heads} heads of width {WIDTH}, float32, {options.threads} threads, one vector.\n")
    print("| T | contender | ms | to blocked, minima (median) | peak MiB |\n|---|---|---|---|---|")
    for T in options.lengths:
        times = seconds(T, options.heads, options.rounds)
        for name in CONTENDERS:
            r = ratio(times, name, "blocked")
            cells = f"{1e3 * min(times[name]):.1f} | {r['minima']:.2f} ({r['median']:.2f}) | {peaks[T, name]:.0f}"
            print(f"| {T} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
