"""Compare sharpkern with eager torch on tiny Hugging Face models and constructs of plain torch.

    python scripts/models.py [--only NAME ...] [--modes train eval] [--jobs 2] [--limit 300] [--out docs/lab/models.md]

For each model and mode: the gradient that the tracker leaves in ``p.grad`` against eager torch's (float32), a
Hessian-vector product against double backward (float64), and what ``sharpkern.audit`` says. Each runs in a process of
its own, which may take ``--limit`` seconds. Returns 1 if a number is wrong, or the audit's verdict is.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from model_list import CASES, Case
from models_page import CASTS, Row, line, page
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import sharpkern as sk
from sharpkern.rop import ReplayedProgram

SHIFTS = (1e-4, 1e-5, 1e-6)  # of differences, in units of the parameters' norm
DIFFERENCES = 1e-6  # relative: how far differences in float64 can be trusted
DOUBTFUL = 1e-2  # distance from differences at which double backward itself is taken to be wrong
SEED = 7


def built(case: Case, mode: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Return model and batch; the same at every call."""
    torch.manual_seed(SEED)
    model = case.make().train(mode == "train")
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Off the zeros and ones at which biases and norms start, where wrong terms would vanish.
            p.add_(0.1 * torch.randn_like(p))
            p.requires_grad_(not case.frozen or not name.startswith(case.frozen))
    batch = case.batch()
    wide = pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, batch)
    return model.to(dtype), wide


def trained(model: nn.Module) -> list[Tensor]:
    """Return the trainable parameters, each once."""
    return [p for p in model.parameters() if p.requires_grad]


def eager_loss(case: Case, model: nn.Module, batch: Any) -> Tensor:
    """Run the model as its user would."""
    torch.manual_seed(SEED)
    if isinstance(batch, dict):
        return case.loss(model(**batch), batch)
    inputs, targets = batch
    return case.loss(model(*inputs) if isinstance(inputs, tuple) else model(inputs), targets)


def flat(parts: Any, params: list[Tensor]) -> Tensor:
    """Join parts to one float64 vector; None is zero."""
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(parts, params, strict=True)]
    return torch.cat([g.detach().reshape(-1).double() for g in filled])


def eager_gradient(case: Case, mode: str, dtype: torch.dtype) -> tuple[float, Tensor]:
    """Return loss and flat gradient of eager torch."""
    model, batch = built(case, mode, dtype)
    loss = eager_loss(case, model, batch)
    loss.backward()
    params = trained(model)
    return float(loss.detach()), flat([p.grad for p in params], params)


def tracked_gradient(case: Case, mode: str) -> Tensor:
    """Return the flat gradient that ``SharpnessTracker.step`` leaves."""
    model, batch = built(case, mode, torch.float32)
    params = trained(model)
    tracker = sk.SharpnessTracker(model, case.loss, torch.optim.SGD(params, lr=0.01), max_matvecs=2, directions=False)
    torch.manual_seed(SEED)
    tracker.step(batch)
    return flat([p.grad for p in params], params)


def truths(case: Case, mode: str, v: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return Hv by double backward, None where torch has none, and by the best of central differences of gradients."""
    model, batch = built(case, mode, v.dtype)
    params = trained(model)
    pieces = [x.view(p.shape) for x, p in zip(v.split([p.numel() for p in params]), params, strict=True)]
    values = [p.detach().clone() for p in params]
    # Each evaluation starts from the same buffers: a spectral norm moves its vectors at every one.
    buffers = [(b, b.clone()) for b in model.buffers()]

    def gradient(shift: float, create_graph: bool = False) -> Any:
        with torch.no_grad():
            for b, before in buffers:
                b.copy_(before)
            for p, old, d in zip(params, values, pieces, strict=True):
                p.copy_(old + shift * d)
        model.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):
            loss = eager_loss(case, model, batch)
            if create_graph:
                return torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
            loss.backward()  # and not ``grad``, which reentrant checkpoints refuse
        return [p.grad for p in params]

    try:
        pairs = [(g, d) for g, d in zip(gradient(0.0, True), pieces, strict=True) if g is not None and g.requires_grad]
        gs, ds = zip(*pairs, strict=True)
        double = flat(torch.autograd.grad(gs, params, ds, allow_unused=True), params)
    except (RuntimeError, NotImplementedError):
        double = None
    size = float(torch.cat([p.reshape(-1) for p in values]).norm() / v.norm())
    steps = [shift * size for shift in SHIFTS]
    slopes = [(flat(gradient(h), params) - flat(gradient(-h), params)) / (2 * h) for h in steps]
    # The step whose neighbour agrees best: chosen without a look at the product that is to be judged.
    gaps = [relative(a, b) for a, b in zip(slopes, slopes[1:], strict=False)]
    return double, slopes[min(range(len(gaps)), key=gaps.__getitem__)]


def widest(case: Case, mode: str) -> torch.dtype:
    """Return float64, or float32 for a model that torch does not run in float64 (its grouped matrix products)."""
    model, batch = built(case, mode, torch.float64)
    try:
        eager_loss(case, model, batch)
    except RuntimeError:
        return torch.float32
    return torch.float64


def gradients(case: Case, mode: str, row: Row) -> None:
    """Fill in how far the tracker's gradient is from eager torch's, and that from its own in float64."""
    loss, eager = eager_gradient(case, mode, torch.float32)
    row.gradient = relative(tracked_gradient(case, mode), eager)
    if widest(case, mode) == torch.float64:
        wide_loss, wide = eager_gradient(case, mode, torch.float64)
        # Noise may be drawn otherwise in another dtype: then the two gradients have nothing to do with each other.
        if abs(loss / wide_loss - 1) < 1e-4:
            row.rounding = relative(eager, wide)


def product(case: Case, mode: str, row: Row) -> None:
    """Fill in engine, loss and product of the float64 model."""
    dtype = widest(case, mode)
    model, batch = built(case, mode, dtype)
    torch.manual_seed(SEED)
    H = sk.HessianOperator(model, case.loss, batch)
    program = isinstance(H.engine, ReplayedProgram)
    row.engine = f"program, {len(H.fallback_ops)} op(s) by autograd" if program and H.fallback_ops else "program"
    if not program:
        row.engine = "double backward"
    row.coarsest = coarsest(case, mode, dtype)
    row.loss = abs(float(H.loss) / eager_gradient(case, mode, dtype)[0] - 1)
    v = torch.randn(H.n, generator=torch.Generator().manual_seed(SEED), dtype=dtype)
    double, differences = truths(case, mode, v)
    mine = H @ v
    # Without a Hessian there is but torch's own second pass to agree with; in float32 differences say too little.
    judged = case.symmetric and not case.moving and dtype == torch.float64
    doubtful = double is None or (judged and relative(double, differences) > DOUBTFUL)
    row.truth = "differences" if doubtful else "double backward"
    row.product = relative(mine, differences if doubtful else double)
    if doubtful:
        row.coarsest = max(row.coarsest, DIFFERENCES / CASTS)


class _Coarsest(TorchFunctionMode):
    """Notes the largest unit of rounding among results that depend on parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = torch.finfo(torch.float64).eps

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point() and result.requires_grad:
            self.eps = max(self.eps, torch.finfo(result.dtype).eps)
        return result


def coarsest(case: Case, mode: str, dtype: torch.dtype) -> float:
    """Return the unit of rounding of the narrowest dtype in which the model works, its own casts included."""
    model, batch = built(case, mode, dtype)
    with _Coarsest() as seen:
        eager_loss(case, model, batch)
    return seen.eps


def relative(a: Tensor, b: Tensor) -> float:
    """Return the distance in units of b's length."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300))


def audited(case: Case, mode: str, row: Row) -> None:
    """Fill in what the audit says of the float32 model."""
    model, batch = built(case, mode, torch.float32)
    report = sk.audit(model, case.loss, batch)
    row.status, row.verdict = report.status, report.verdict
    row.claimed = max(check.error for check in report.checks)


def compared(case: Case, mode: str) -> Row:
    """Run everything for one model; an error is noted in the row."""
    row = Row(case.name, case.group, mode, symmetric=case.symmetric)
    row.parameters = parameters(case)
    warnings.simplefilter("ignore")  # the engine is in the table
    try:
        product(case, mode, row)
        gradients(case, mode, row)
        audited(case, mode, row)
    except sk.UnsupportedOpError as error:
        row.engine, row.error = "refused", first_line(error)
    except Exception as error:  # one model that fails must not stop the list
        row.error = first_line(error)
    return row


def parameters(case: Case) -> int:
    """Count what is trained."""
    return sum(p.numel() for p in trained(built(case, case.modes[0], torch.float32)[0]))


def first_line(error: Exception) -> str:
    """Return an error's class and first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


class Job:
    """One comparison in a process of its own."""

    def __init__(self, case: Case, mode: str, limit: float) -> None:
        self.case, self.mode, self.limit, self.start = case, mode, limit, time.monotonic()
        # Forked, because importing the libraries anew would take longer than most models.
        context = multiprocessing.get_context("fork")
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=lambda: sender.send(compared(case, mode)))
        self.process.start()
        sender.close()  # so that a process that dies is seen as the end of the pipe

    def result(self) -> Row | None:
        """Return the row once there is one; an error for a process that died or took too long."""
        failed = Row(self.case.name, self.case.group, self.mode)
        if self.receiver.poll(0.2):
            try:
                row = self.receiver.recv()
            except EOFError:
                self.process.join()
                failed.error = f"the process ended with code {self.process.exitcode}"
                return failed
            self.process.join()
            return row
        if time.monotonic() - self.start > self.limit:
            self.process.kill()
            self.process.join()
            failed.error = f"not done after {self.limit:.0f} s"
            return failed
        return None


def run_all(work: list[tuple[Case, str]], jobs: int, limit: float, kept: Path | None) -> list[Row]:
    """Run the comparisons that are not among the kept rows, so many at once; print and keep each as it ends."""
    lines = kept.read_text().splitlines() if kept and kept.exists() else []
    rows = {(row.name, row.mode): row for row in (Row(**json.loads(text)) for text in lines)}
    for case, _ in work:
        for row in rows.values():
            if row.name == case.name and not row.parameters:
                row.parameters = parameters(case)
    waiting, running = [(case, mode) for case, mode in work if (case.name, mode) not in rows], []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(Job(*waiting.pop(0), limit))
        for job in list(running):
            row = job.result()
            if row is not None:
                running.remove(job)
                rows[row.name, row.mode] = row
                print(line(row), f"{time.monotonic() - job.start:.0f} s", row.verdict, flush=True)
                if kept:
                    with kept.open("a") as file:
                        file.write(json.dumps(asdict(row)) + "\n")
    return [rows[case.name, mode] for case, mode in work]


def main() -> int:
    """Run the list; return 1 if anything is wrong, failed, or judged wrongly by the audit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="names of models")
    parser.add_argument("--modes", nargs="*", default=["train", "eval"], help="train, eval or both")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--limit", type=float, default=300, help="seconds for a model in one mode")
    parser.add_argument("--rows", type=Path, help="keep rows there (JSON lines); what stands there is not run again")
    parser.add_argument("--out", type=Path, help="write the page there")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    sk.sharpness(nn.Linear(2, 2), nn.MSELoss(), (torch.randn(3, 2), torch.randn(3, 2)))  # what an export imports
    work = [
        (case, mode)
        for case in CASES
        for mode in given.modes
        if mode in case.modes and case.name in (given.only or [case.name])
    ]
    rows = run_all(work, given.jobs, given.limit, given.rows)
    if given.out:
        given.out.write_text(page(rows))
    print(dict(collections.Counter(row.end for row in rows)))
    return int(any(row.end not in ("right", "refused", "unchecked") for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
