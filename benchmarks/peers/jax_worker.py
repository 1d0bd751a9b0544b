"""JAX in a process of its own, so that two thread pools never run at once. Lines of JSON in, lines of JSON out.

    python jax_worker.py FOLDER WORKLOAD THREADS

FOLDER holds weights.npz and batch.npz. Every request names a method and a file of vectors; the first run of a shape
compiles and is reported as such.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

folder, workload, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # XLA sizes its thread pool by this

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax_models import loss  # noqa: E402

weights = {name: jnp.asarray(a) for name, a in np.load(folder / "weights.npz").items()}
x, y = (jnp.asarray(a) for a in np.load(folder / "batch.npz").values())
value = loss(workload)


def _gradient(p: Any, x: Any, y: Any) -> Any:
    return jax.grad(value)(p, x, y)


def _product(p: Any, x: Any, y: Any, block: Any) -> Any:
    def one(v: Any) -> Any:
        return jax.jvp(lambda q: _gradient(q, x, y), (p,), (v,))[1]

    if len(next(iter(block.values()))) == 1:  # vmap over one column costs XLA its best layouts
        return {name: t[None] for name, t in one({name: t[0] for name, t in block.items()}).items()}
    return jax.vmap(one)(block)


def _linearization(p: Any, x: Any, y: Any) -> Any:
    """The primal residuals, with the linear function of tangents: a pytree that jitted functions take."""
    return jax.linearize(lambda q: _gradient(q, x, y), p)[1]


def _linear(linear: Any, block: Any) -> Any:
    if len(next(iter(block.values()))) == 1:
        return {name: t[None] for name, t in linear({name: t[0] for name, t in block.items()}).items()}
    return jax.vmap(linear)(block)


compiled: dict[Any, Any] = {}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    method, vectors = request["method"], request.get("vectors")
    compile_seconds = 0.0
    if method == "linearize" and "linear" not in loaded:
        start = time.perf_counter()
        loaded["linear"] = jax.block_until_ready(jax.jit(_linearization)(weights, x, y))
        compile_seconds = time.perf_counter() - start
    arguments = (loaded["linear"],) if method == "linearize" else (weights, x, y)
    if vectors:
        arguments += (vectors_of(vectors),)
    key = (method, vectors)
    if key not in compiled:
        start = time.perf_counter()
        function = {"gradient": _gradient, "jvp": _product, "linearize": _linear}[method]
        compiled[key] = jax.jit(function).lower(*arguments).compile()
        compile_seconds += time.perf_counter() - start
    run = compiled[key]
    start = time.perf_counter()
    result = jax.block_until_ready(run(*arguments))
    seconds = time.perf_counter() - start
    if "result" in request:
        np.savez(request["result"], **{name: np.asarray(t) for name, t in result.items()})
    memory = run.memory_analysis()
    used = memory.temp_size_in_bytes + memory.output_size_in_bytes if memory else None
    if method == "linearize" and used:
        used += sum(leaf.nbytes for leaf in jax.tree.leaves(loaded["linear"]))
    return {"seconds": seconds, "compile_seconds": compile_seconds, "bytes": used}


loaded: dict[str, Any] = {}


def vectors_of(path: str) -> Any:
    if path not in loaded:
        loaded[path] = {name: jnp.asarray(a) for name, a in np.load(path).items()}
    return loaded[path]


print(json.dumps({"jax": jax.__version__}), flush=True)
for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)
