"""What tracking will cost a step, measured before the training on the user's own model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..curvature.chunked import ChunkedHessian, MicroBatches
from ..curvature.memory import BLOCK, Memory, gradient_of, memory_forecast, memory_of
from ..curvature.operators import HessianOperator
from ..rop.sandbox import kept_random_states, requiring_grad, without_trace
from .target import Target

_ROUNDS = 3, 15  # the fewest, and the most
_SECONDS = 2.0  # after which no further round begins
_UNTIMED = 2  # rounds before, in which sweeps are recorded and replayed for the first time
_PRODUCTS = {"full batch": 4.0, "mini-batch": 6.5}  # a step, by docs/explain/tracking.md


@dataclass(frozen=True)
class Price:
    """What one thing costs.

    Attributes:
        seconds: median.
        gradients: how many forward and backward passes of the model take as long, by the median ratio.
        bytes: the most memory that its tensors hold at once, besides parameters and batch; see ``Memory``.
        memory: the same, in that of a forward and backward pass.
    """

    seconds: float
    gradients: float
    bytes: int
    memory: float


@dataclass(frozen=True)
class Cost:
    """What tracking costs, by parts; ``print`` shows the table.

    Attributes:
        gradient: the model's own forward and backward pass, which is the unit.
        primal: loss and gradient of the step by ``tracker.step``, in its place; ``observe`` runs it besides.
        form: one quadratic form, as for the batch sharpness.
        product: one Hessian-vector product.
        block: a product with three vectors at once.
        setup: seconds of the export and its check against the model, once for each shape of batch.
    """

    gradient: Price
    primal: Price
    form: Price
    product: Price
    block: Price
    setup: float

    def step(self, products: float, *, beside: bool = False) -> float:
        """Return what a step with so many products takes, in gradients.

        Args:
            products: of all operators; 0 leaves the form for the batch sharpness alone (``products=False``).
            beside: measured by ``observe``, beside a loop that computes its own gradient.
        """
        own = self.primal.gradients + (1.0 if beside else 0.0)
        return own + self.form.gradients + products * self.product.gradients

    def __str__(self) -> str:
        """Return the table."""
        rows = {
            "forward and backward": self.gradient, "primal sweeps": self.primal, "quadratic form": self.form,
            "product": self.product, f"block of {BLOCK}": self.block,
        }  # fmt: skip
        lines = [f"{'':<22}{'seconds':>10}{'gradients':>11}{'MB':>10}{'gradients':>11}"]
        lines += [
            f"{name:<22}{p.seconds:>10.3g}{p.gradients:>11.2f}{p.bytes / 1e6:>10.1f}{p.memory:>11.2f}"
            for name, p in rows.items()
        ]
        lines.append(f"set up once: {self.setup:.1f} s. A tracked step, in gradients:")
        lines.append(f"  without products (products=False): {self.step(0):.2f}")
        lines += [f"  with {n:g} products, as usual in {kind}: {self.step(n):.2f}" for kind, n in _PRODUCTS.items()]
        return "\n".join(lines)


def cost_of(target: Target, batch: Any) -> Cost:
    """Measure what a target costs on a batch.

    Args:
        target: one that nobody tracks with; its model is left as it is.
        batch: of a step; the target's own probe or loader is what products are measured on, if it has one.

    Raises:
        ValueError: the model is wrapped for several processes; bad batch, or None.
    """
    _check(target, batch)
    devices = {p.device for p in target.model.parameters()}
    with kept_random_states(devices):
        start = time.perf_counter()
        hessian, tracked = target.operators(batch)
        setup = time.perf_counter() - start
        assert isinstance(hessian, HessianOperator | ChunkedHessian)
        vectors = torch.randn(BLOCK, hessian.n, generator=torch.Generator().manual_seed(0))
        vectors = vectors.to(hessian.device, hessian.dtype)
        vectors /= torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        seconds = _interleaved(
            {
                "gradient": lambda: _eager_seconds(hessian),
                "primal": lambda: _timed(lambda: (hessian.refresh(), hessian.gradient), hessian.device),
                "form": lambda: _timed(lambda: tracked.form_rows(vectors[:1]), hessian.device),
                "product": lambda: _timed(lambda: tracked.apply_rows(vectors[:1]), hessian.device),
                "block": lambda: _timed(lambda: tracked.apply_rows(vectors), hessian.device),
            }
        )
        memory = memory_of(tracked if isinstance(tracked, HessianOperator | ChunkedHessian) else hessian)
    prices = {
        name: Price(
            statistics.median(own),
            statistics.median(a / b for a, b in zip(own, seconds["gradient"], strict=True)),
            getattr(memory, name),
            getattr(memory, name) / memory.gradient,
        )
        for name, own in seconds.items()
    }
    return Cost(**prices, setup=setup)


def forecast(target: Target, batch: Any) -> Memory:
    """Forecast the memory that a target needs for a batch; see ``memory_forecast``."""
    _check(target, batch)
    part = batch if target.chunk is None else MicroBatches.split(batch, target.chunk).batches[0]
    with kept_random_states({p.device for p in target.model.parameters()}):
        return memory_forecast(target.plain_hessian, part)


def _check(target: Target, batch: Any) -> None:
    if target.kind != "plain":
        raise ValueError(f"costs are for a model that one process holds; this one is wrapped ({target.kind}).")
    if batch is None:
        raise ValueError("before the first step there is no batch to measure: pass one.")


def _interleaved(contenders: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Time round by round, so that a stall of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    least, most = _ROUNDS
    spent = 0.0
    for number in range(-_UNTIMED, most):
        if number >= least and spent > _SECONDS:
            break
        for name, call in contenders.items():
            took = call()
            if number >= 0:
                seconds[name].append(took)
                spent += took
    return seconds


def _timed(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _eager_seconds(hessian: HessianOperator | ChunkedHessian) -> float:
    """Time the model's own forward and backward passes alone, without what undoes their traces."""
    if isinstance(hessian, ChunkedHessian):
        operator, batches = hessian.part, hessian.batch.batches
    else:
        operator, batches = hessian, [hessian.batch]
    quiet = without_trace([operator.module, *operator.others], {operator.device})
    with quiet, requiring_grad(operator.params.values()):
        return _timed(lambda: [gradient_of(operator, batch) for batch in batches], operator.device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
