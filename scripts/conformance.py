"""Compare sharpkern with eager torch on torch's own samples: every op and module of its test database, in float64.

    python scripts/conformance.py [--samples 2] [--only NAME ...] [--every N] [--out docs/lab/conformance.md]

Each sample becomes a loss of its floating inputs; loss, gradient, Hv, a block of vectors and v'Hv are compared with
autograd twice. A module with parameters is a second sample for its generalised Gauss-Newton matrix, whose truth is made
of the rows of J, one backward pass each, and of the loss's second derivative by the outputs.

A sample ends as ``rule``, ``fallback`` or ``autograd`` (right, by which way), ``refused`` (torch has no second
derivative either), ``REFUSED`` (torch has), ``WRONG``, or ``CRASHED``.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

import sharpkern as sk
from sharpkern.rop import ReplayedProgram

TOLERANCE = 1e-7
GOOD = ("rule", "fallback", "autograd", "refused", "skipped")
ORDER = ("WRONG", "CRASHED", "REFUSED", "refused", "autograd", "fallback", "rule", "skipped")


class Sample(NamedTuple):
    """One loss to check: ``loss_fn(params, None)``, or a module with its batch."""

    name: str
    params: dict[str, Tensor]
    loss_fn: Callable[..., Tensor]
    module: nn.Module | None = None
    batch: Any = None
    gauss_newton: bool = False


class Result(NamedTuple):
    """How a sample ended, and what was off."""

    name: str
    status: str
    detail: str


def op_samples(most: int) -> Iterator[Sample]:
    """Yield samples of the op database."""
    from torch.testing._internal.common_methods_invocations import op_db

    for op in op_db:
        if not op.supports_autograd or torch.float64 not in op.supported_backward_dtypes("cpu"):
            continue
        name = " ".join(filter(None, [op.name, op.variant_test_name]))
        torch.manual_seed(0)
        try:
            samples = list(op.sample_inputs("cpu", torch.float64, requires_grad=True))
        except Exception:  # a sample that this machine cannot make (a missing library)
            continue
        step = max(1, len(samples) // most)
        for sample in samples[::step][:most]:
            leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
            places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad and x.numel()]
            params = {f"p{i}": leaves[i].detach().clone() for i in places if leaves[i].layout is torch.strided}
            yield Sample(name, params, _op_loss(op, leaves, spec, sample.output_process_fn_grad))


def _op_loss(op: Any, leaves: list[Any], spec: Any, process: Callable[[Any], Any]) -> Callable[..., Tensor]:
    fixed = [x.detach() if isinstance(x, Tensor) else x for x in leaves]

    def loss(params: dict[str, Tensor], _: Any) -> Tensor:
        values = [params.get(f"p{i}", x) for i, x in enumerate(fixed)]
        inputs, args, kwargs = pytree.tree_unflatten(values, spec)
        return weighted(process(op(inputs, *args, **kwargs)))

    return loss


def module_samples(most: int) -> Iterator[Sample]:
    """Yield samples of the module database."""
    from torch.testing._internal.common_modules import module_db

    for info in module_db:
        for training in (True, False):
            torch.manual_seed(0)
            try:
                inputs = info.module_inputs_func(
                    info, device="cpu", dtype=torch.float64, requires_grad=False, training=training
                )
            except Exception:
                continue
            for sample in inputs[:most]:
                if sample.forward_input is None:
                    continue
                args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
                module = info.module_cls(*args, **kwargs).double().train(training)
                given = sample.forward_input
                with torch.no_grad():
                    try:
                        module(*given.args, **given.kwargs)  # lazy modules take their shapes
                    except Exception:
                        continue
                params = {n: p for n, p in module.named_parameters() if p.requires_grad}
                one = Sample(
                    info.name, params, lambda out, _: weighted(out), _Bound(module, given), (given.args[:1], None)
                )
                yield one
                if params:
                    yield one._replace(name=f"{info.name}, GGN", gauss_newton=True)


class _Bound(nn.Module):
    """A module on the arguments of its sample."""

    def __init__(self, module: nn.Module, given: Any) -> None:
        super().__init__()
        self.module, self.args, self.kwargs = module, list(given.args), given.kwargs

    def forward(self, *first: Any) -> Any:
        return self.module(*first, *self.args[len(first) :], **self.kwargs)


def weighted(result: Any) -> Tensor:
    """Weigh all floating outputs differently, with second derivatives of their own."""
    total = torch.zeros((), dtype=torch.float64)
    for y in pytree.tree_leaves(result):
        if not isinstance(y, Tensor):
            continue
        y = y.to_dense() if y.layout is not torch.strided else y
        y = torch.view_as_real(y.resolve_conj()) if y.is_complex() else y
        if y.is_floating_point() and y.numel() and y.requires_grad:
            y = y.double()
            w = torch.linspace(0.3, 1.0, y.numel(), dtype=torch.float64).reshape(y.shape)
            total = total + (w * y).sum() + (w * y * y).sum() / 10
    return total


def check(sample: Sample) -> Result:
    """Compare one sample."""
    if not sample.params:
        return Result(sample.name, "skipped", "no parameters")
    torch.manual_seed(1)
    v = torch.randn(sum(p.numel() for p in sample.params.values()), dtype=torch.float64)
    try:
        with _start(sample):
            truth = _ggn_truth(sample, v) if sample.gauss_newton else _truth(sample, v)
    except Exception as error:
        truth = None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if truth is not None and not all(bool(t.isfinite().all()) for t in truth):
        return Result(sample.name, "skipped", "not finite")
    torch.manual_seed(2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _compare(sample, v, truth)
    except sk.UnsupportedOpError as error:
        return Result(sample.name, "refused" if truth is None else "REFUSED", str(error).splitlines()[0])
    except (ValueError, sk.NonFiniteLossError) as error:
        return Result(sample.name, "skipped" if truth is None else "REFUSED", str(error).splitlines()[0])
    except Exception as error:
        message = str(error).splitlines()[0] if str(error) else ""
        return Result(
            sample.name,
            "skipped" if truth is None and message == reason else "CRASHED",
            f"{type(error).__name__}: {message}",
        )


@contextlib.contextmanager
def _start(sample: Sample) -> Iterator[None]:
    """Begin with the random numbers that the check sees, leave buffers as they are, and let attention be derived."""
    torch.manual_seed(2)
    buffers = [] if sample.module is None else [(b, b.clone()) for b in sample.module.buffers()]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        with torch.no_grad():
            for b, before in buffers:
                b.copy_(before)


def _truth(sample: Sample, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and Hv by autograd twice."""
    params = (
        {n: p.detach().clone().requires_grad_() for n, p in sample.params.items()}
        if sample.module is None
        else sample.params
    )
    tensors = list(params.values())
    if sample.module is None:
        loss = sample.loss_fn(params, None)
    else:
        inputs, targets = sample.batch
        loss = sample.loss_fn(sample.module(*inputs), targets)
    parts = torch.autograd.grad(loss, tensors, create_graph=True, materialize_grads=True)
    pieces = [p.view(t.shape) for p, t in zip(v.split([t.numel() for t in tensors]), tensors, strict=True)]
    dot = sum((g * p).sum() for g, p in zip(parts, pieces, strict=True))
    product = (
        torch.autograd.grad(dot, tensors, materialize_grads=True)
        if dot.requires_grad
        else [torch.zeros_like(t) for t in tensors]
    )
    return loss.detach(), _flat(parts), _flat(product)


def _ggn_truth(sample: Sample, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and ``J'(d2 loss) J v``: J row by row, the loss's second derivative by autograd twice."""
    assert sample.module is not None
    tensors = list(sample.params.values())
    inputs, targets = sample.batch
    leaves, spec = pytree.tree_flatten(sample.module(*inputs))
    moving = [i for i, y in enumerate(leaves) if isinstance(y, Tensor) and y.requires_grad]
    outputs = [leaves[i] for i in moving]
    rows = [_back(y, tensors) for output in outputs for y in output.reshape(-1)]
    J = torch.stack(rows)
    # The loss as a function of outputs that are leaves of their own.
    own = [y.detach().requires_grad_() for y in outputs]
    for i, y in zip(moving, own, strict=True):
        leaves[i] = y
    loss = sample.loss_fn(pytree.tree_unflatten(leaves, spec), targets)
    slopes = torch.autograd.grad(loss, own, create_graph=True, materialize_grads=True)
    g, u = _flat(slopes), J @ v
    dot = sum((a.reshape(-1) * b).sum() for a, b in zip(slopes, u.split([y.numel() for y in own]), strict=True))
    curved = _flat(torch.autograd.grad(dot, own, materialize_grads=True))
    return loss.detach(), J.t() @ g, J.t() @ curved


def _back(y: Tensor, tensors: list[Tensor]) -> Tensor:
    return _flat(torch.autograd.grad(y, tensors, retain_graph=True, materialize_grads=True))


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _compare(sample: Sample, v: Tensor, truth: tuple[Tensor, Tensor, Tensor] | None) -> Result:
    if sample.module is None:
        H = sk.HessianOperator(None, sample.loss_fn, None, params=sample.params)
    else:
        operator = sk.GGNOperator if sample.gauss_newton else sk.HessianOperator
        H = operator(sample.module, sample.loss_fn, sample.batch)
    v = v.to(H.dtype)
    product, gradient = H @ v, H.gradient
    block = H @ torch.stack([v, -2 * v, v.flip(0)], 1)
    form = H.quadratic_form(v)
    way = "fallback" if H.fallback_ops else "rule"
    if not isinstance(H.engine, ReplayedProgram):
        way = "autograd"
    coarse = H.engine.program.graph.rounding if isinstance(H.engine, ReplayedProgram) else torch.finfo(H.dtype).eps
    allowed = max(TOLERANCE, 64 * coarse)  # a sample may cast to a narrower dtype itself
    size = float(product.norm()) + 1e-12 * float(gradient.norm())
    off = []
    if truth is not None:
        loss, wanted, hv = truth
        size = max(size, float(hv.norm()))
        off += ["loss"] if not _near(H.loss, loss, float(loss.abs()), allowed) else []
        off += ["gradient"] if not _near(gradient, wanted, float(wanted.norm()), allowed) else []
        off += ["Gv" if sample.gauss_newton else "Hv"] if not _near(product, hv, size, allowed) else []
    off += ["block"] if not _near(block[:, 1], -2 * product, 2 * size, allowed) else []
    off += ["form"] if not _near(form, v @ product, float(v.norm()) * size, allowed) else []
    if truth is None and not off:
        return Result(sample.name, way, f"{', '.join(H.fallback_ops)} (torch has no second derivative)")
    return Result(sample.name, "WRONG" if off else way, ", ".join(off or H.fallback_ops))


def _near(a: Tensor, b: Tensor, size: float, allowed: float) -> bool:
    return float((a.double() - b.double()).norm()) <= allowed * max(size, 1e-10)


def table(results: list[Result], most: int) -> str:
    """Return the page: totals, then each op with how its samples ended."""
    totals = collections.Counter(r.status for r in results)
    lines = [
        "# Conformance",
        "",
        f"torch {torch.__version__}, float64, {len(results)} samples of torch's own database;",
    ]
    lines += [
        f"`python scripts/conformance.py --samples {most} --out docs/lab/conformance.md` makes this page.",
        "",
        "| status | samples |",
        "|---|---|",
    ]
    lines += [f"| {status} | {totals[status]} |" for status in ORDER if totals[status]]
    lines += ["", "| op or module | samples | detail |", "|---|---|---|"]
    by_name: dict[str, list[Result]] = {}
    for r in results:
        by_name.setdefault(r.name, []).append(r)
    for name, group in sorted(by_name.items(), key=lambda item: (min(ORDER.index(r.status) for r in item[1]), item[0])):
        counts = collections.Counter(r.status for r in group)
        detail = next((r.detail for r in sorted(group, key=lambda r: ORDER.index(r.status))), "")
        ends = ", ".join(f"{status} {n}" for status, n in counts.items())
        lines.append(f"| {name} | {ends} | {detail[:110].replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the sweep; return 1 if a sample is wrong, crashed or wrongly refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2, help="of each op, spread over torch's own")
    parser.add_argument("--only", nargs="*", default=[], help="names of ops or modules")
    parser.add_argument("--every", type=int, default=1, help="take every n-th sample")
    parser.add_argument("--out", type=Path, help="write the table there")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    results = []
    samples = [*op_samples(given.samples), *module_samples(given.samples)]
    for sample in samples[:: given.every]:
        if given.only and sample.name.removesuffix(", GGN") not in given.only:
            continue
        results.append(check(sample))
        if results[-1].status not in GOOD:
            print(*results[-1], sep=": ", flush=True)
    if given.out:
        given.out.write_text(table(results, given.samples))
    print({status: n for status, n in collections.Counter(r.status for r in results).items()})
    return int(any(r.status not in GOOD for r in results))


if __name__ == "__main__":
    raise SystemExit(main())
