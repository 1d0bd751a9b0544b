"""Count what a gradient and a Hessian-vector product do, without a clock: ``python benchmarks/counts.py OUT.json``.

Three exact figures a workload and block size, the same in every run: floating-point operations of matrix products and
convolutions, ATen calls that do work (views and allocations left out), calls of compiled kernels. regress.py compares
them like times, with no noise allowed. They depend on torch's version and on whether the compiled module is there.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from workloads import cnn, gpt, mlp, wrn

from sharpkern.curvature.losses import LossModule
from sharpkern.kernels.cpu import native
from sharpkern.rop import Program, export

SMALL = {
    "mlp": lambda: mlp(width=128, batch=64),
    "cnn": lambda: cnn(batch=2),
    "wrn": lambda: wrn(widen=1, batch=2),
    "gpt": lambda: gpt(context=32, batch=2, d=96, blocks=2),
}  # calls do not depend on sizes; the sizes keep the count cheap
aten = torch.ops.aten
_NO_WORK = ("aten::empty", "aten::new_empty")


def _multiply_adds(_out: Any, a: Any, b: Any, **_: Any) -> int:
    """FLOPs of ``out += a @ b``, from shapes."""
    return 2 * math.prod(a) * b[-1]


_IN_PLACE = {aten.addmm_: _multiply_adds, aten.baddbmm_: _multiply_adds}  # not among those that torch counts


class _Calls(TorchDispatchMode):
    """Counts calls that are neither views nor allocations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        schema = func._schema
        view = not schema.is_mutable and any(r.alias_info is not None for r in schema.returns)
        self.count += not view and not schema.name.startswith(_NO_WORK)
        return func(*args, **(kwargs or {}))


def count(call: Callable[[], object]) -> dict[str, int]:
    """Run a call under all three counters."""
    kernels: list[Any] = []
    with (
        FlopCounterMode(display=False, custom_mapping=_IN_PLACE) as operations,
        _Calls() as calls,
        native.recorded(lambda *kernel: kernels.append(kernel)),
    ):
        call()
    return {"FLOPs": operations.get_total_flops(), "ATen calls": calls.count, "kernel calls": len(kernels)}


def counts() -> dict[str, Any]:
    """Count the sweeps of all workloads, live: a recording replays the same calls."""
    entries = []
    for name, build in SMALL.items():
        torch.manual_seed(0)
        work = build()
        module, params = LossModule(work.model, work.loss_fn), dict(work.model.named_parameters())
        program = Program(export(module, work.batch), params, keep_outputs=False)

        def primal(program: Program = program, module: LossModule = module, batch: Any = work.batch) -> None:
            program.forward(module, batch)
            program.backward()
            program.gradient(program.layout.empty(1))

        found = {"primal sweeps": count(primal)}
        for k in (1, 4):
            V = torch.randn(k, program.layout.n)
            found[f"product with {k}"] = count(partial(program.hvp, V, torch.empty_like(V)))
        entries += [{"question": f"count {what}", "workload": name, "counts": c} for what, c in found.items()]
    machine = {"torch": torch.__version__.split("+")[0], "compiled module": native.REASON is None}
    return {"machine": machine, "entries": entries}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(counts(), indent=1) + "\n")
