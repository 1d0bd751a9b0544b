"""What does a Hessian-vector product cost, in gradients and in its own matrix products, and how much memory?"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from floor import floor_of
from interleave import interleave
from peers import Peer, truth
from torch.profiler import ProfilerActivity, profile
from workloads import WORKLOADS, Workload

from . import Effort

GRADIENT = "gradient"


def ask(workload: str, k: int, found: dict[str, type[Peer]], effort: Effort) -> dict[str, Any]:
    """Time products with k vectors at the workload's start."""
    torch.manual_seed(0)
    work = WORKLOADS[workload]()
    params = list(work.model.parameters())
    n = sum(p.numel() for p in params)
    V = torch.randn(n, k)
    want = truth.products(work, V)
    contenders: dict[str, Callable[[], object]] = {GRADIENT: lambda: gradient(work)}
    errors: dict[str, float] = {}
    failed: dict[str, str] = {}
    compiling: dict[str, float] = {}
    gradient(work)
    memory = {GRADIENT: peak_bytes(lambda: gradient(work))}
    profiles: dict[str, float] = {}
    peers: list[Peer] = []
    for name, cls in found.items():
        try:
            peer = cls(work)
            peers.append(peer)
            peer.prepare()
            vectors = peer.native(V)
            start = time.perf_counter()
            peer.multiply(vectors)
            first = time.perf_counter() - start
            got = peer.flat(peer.multiply(vectors))
        except (NotImplementedError, RuntimeError) as error:
            failed[name] = str(error).splitlines()[0]
            continue
        errors[name] = float((got.double() - want).norm() / want.norm())
        del got
        contenders[name] = lambda peer=peer, vectors=vectors: peer.multiply(vectors)
        if "JAX" in name:
            memory[name] = peer.bytes
            compiling[name] = peer.compile_seconds
        elif "compiled" in name:  # another one would compile again; this one keeps nothing between products
            memory[name] = peak_bytes(lambda peer=peer: once(peer, V))
            compiling[name] = first
        else:
            memory[name] = peak_bytes(lambda cls=cls: once(cls(work), V))
        if name == "sharpkern":
            contenders["floor"] = floor_of(lambda peer=peer, vectors=vectors: peer.multiply(vectors))
            contenders["sharpkern, with its gradient"] = lambda peer=peer, vectors=vectors: (
                peer.prepare(), peer.multiply(vectors),
            )  # fmt: skip
            profiles = where_time_goes(lambda peer=peer, vectors=vectors: peer.multiply(vectors))
    if any("JAX" in name for name in contenders):
        contenders["JAX gradient"] = next(p for p in peers if hasattr(p, "gradient")).gradient
    if any("compiled" in name for name in found):
        start = time.perf_counter()
        contenders["gradient, compiled"] = compiled_gradient(work)
        contenders["gradient, compiled"]()
        compiling["gradient, compiled"] = time.perf_counter() - start
    try:
        seconds = interleave(contenders, effort.rounds, effort.seconds, effort.untimed)
    finally:
        for peer in peers:
            peer.close()
    return {
        "question": "product", "workload": workload, "k": k, "parameters": n, "base": GRADIENT, "seconds": seconds,
        "errors": errors, "failed": failed, "compile_seconds": compiling, "peak_bytes": memory, "profile": profiles,
    }  # fmt: skip


def gradient(work: Workload) -> tuple[torch.Tensor, ...]:
    """Torch's own forward and backward pass."""
    x, y = work.batch
    return torch.autograd.grad(work.loss_fn(work.model(x), y), list(work.model.parameters()))


def once(peer: Peer, V: torch.Tensor) -> object:
    """From nothing to the second product."""
    peer.prepare()
    vectors = peer.native(V)
    peer.multiply(vectors)
    return peer.multiply(vectors)


def compiled_gradient(work: Workload) -> Callable[[], object]:
    """The same under ``torch.compile``; compiles when first called."""
    x, y = work.batch
    params = list(work.model.parameters())
    loss = torch.compile(lambda x, y: work.loss_fn(work.model(x), y), fullgraph=True, dynamic=False)
    return lambda: torch.autograd.grad(loss(x, y), params)


def where_time_goes(call: Callable[[], object], most: int = 6) -> dict[str, float]:
    """Shares of a call's time by ATen op, the largest first; "the rest" is what torch's profiler does not see.

    That is the package's own compiled kernels, and Python.
    """
    with profile(activities=[ProfilerActivity.CPU]) as record:
        start = time.perf_counter()
        call()
        micros = 1e6 * (time.perf_counter() - start)
    shares = sorted(((e.self_cpu_time_total / micros, e.key) for e in record.key_averages()), reverse=True)
    found = {name: share for share, name in shares[:most] if share > 0.01}
    return {**found, "the rest": max(0.0, 1 - sum(share for share, _ in shares))}


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator held at once during a call, beyond those held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    del result
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
