"""The floor of a computation: its matrix products and convolutions alone, on the same shapes and strides.

The calls are recorded while the computation runs, then replayed on tensors of their own. What lies above the floor is
everything that is not a product: pointwise passes, norms, softmax, allocation, Python.

    OMP_NUM_THREADS=1 python benchmarks/floor.py overhead cnn [--seconds 3]

compares a Hessian-vector product with its floor, the two in turn and nothing between them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from interleave import interleave
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import WORKLOADS

import sharpkern as sk
from sharpkern.rop.recording.bindings import BINDINGS

aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default, aten.mm.out, aten.addmm.default, aten.addmm_.default, aten.addmm.out,
    aten.bmm.default, aten.bmm.out, aten.baddbmm.default, aten.baddbmm_.default, aten.baddbmm.out,
    aten.convolution.default, aten.convolution.out, aten.convolution_backward.default, aten.convolution_backward.out,
    aten.linear.default, aten.matmul.default, aten.conv2d.default,
}  # fmt: skip


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        kwargs = kwargs or {}
        if func in PRODUCTS:
            self.calls.append((func, *pytree.tree_map_only(Tensor, _twin, (args, kwargs))))
        return func(*args, **kwargs)


def _twin(t: Tensor) -> Tensor:
    """A tensor of the same shape, strides and dtype, filled with small random numbers."""
    twin = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    return twin.fill_(0.01) if 0 in t.stride() else twin.normal_(0, 0.01)


def floor_of(computation: Callable[[], object]) -> Callable[[], None]:
    """Return a call that runs only the products of a computation.

    Products that allocate their result in the computation write into preallocated memory here.
    """
    with torch.no_grad(), _Recorder() as recorder:
        computation()
    replays = [_replay(*call) for call in recorder.calls]

    def run() -> None:
        with torch.no_grad():
            for replay in replays:
                replay()

    return run


def _replay(func: Any, args: Any, kwargs: Any) -> Callable[[], object]:
    into = {aten.mm.default: aten.mm.out, aten.addmm.default: aten.addmm.out, aten.bmm.default: aten.bmm.out,
            aten.baddbmm.default: aten.baddbmm.out}.get(func)  # fmt: skip
    # Called as a recording calls them, or the floor would stand above what it is for.
    if into is None:
        call = BINDINGS.get(func, func)
        return lambda: call(*args, **kwargs)
    out, call = func(*args, **kwargs), BINDINGS.get(into, into)
    return lambda: call(*args, **kwargs, out=out)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each workload")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.workloads:
        H = sk.HessianOperator(*WORKLOADS[name]())
        v = torch.randn(H.n)
        H.matvec(v)  # recorded
        start = time.perf_counter()
        H.matvec(v)
        rounds = max(5, int(options.seconds / (2 * (time.perf_counter() - start))))
        times = interleave({"product": lambda H=H, v=v: H @ v, "floor": floor_of(lambda H=H, v=v: H @ v)}, rounds)
        product, floor = (1e3 * min(times[key]) for key in ("product", "floor"))
        print(f"{name}: {product:.3f} ms, its products {floor:.3f} ms, ratio {product / floor:.2f}, {rounds} rounds")


if __name__ == "__main__":
    main()
