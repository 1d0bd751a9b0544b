"""How much memory the sweeps over a loss need: the most bytes of tensors that are held at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..rop import ReplayedProgram
from ..rop.sandbox import kept_random_states, requiring_grad, without_trace
from .chunked import ChunkedHessian, MicroBatches
from .operators import HessianOperator

BLOCK = 3  # vectors in the block that is measured
_SHARES = 8, 4  # of a batch, from whose memory that of the whole is forecast


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors held at once, besides parameters and batch, for each way to use a loss.

    What the primal sweeps keep is part of each, and so is the result; vectors given are not, nor what libraries use
    within a call. Of micro-batches it is that of the first.

    Attributes:
        gradient: the model's own forward and backward pass, by autograd.
        primal: loss and gradient by the package's sweeps.
        form: a quadratic form.   product: a Hessian-vector product.   block: a product with three vectors.
    """

    gradient: int
    primal: int
    form: int
    product: int
    block: int


class _Held(TorchDispatchMode):
    """Counts the memory of tensors that are made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, Any] = {}  # address of a storage object -> what keeps watch over it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        for t in pytree.tree_leaves((args, kwargs)):
            if isinstance(t, Tensor):
                self._watch(t, 0)  # not made here, or it would be known
        result = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(result):
            if isinstance(t, Tensor):
                self._watch(t, t.untyped_storage().nbytes())
        return result

    def _watch(self, t: Tensor, size: int) -> None:
        if t.layout is not torch.strided:
            return
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self.now += size
            self.most = max(self.most, self.now)
            self._known[key] = weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.now -= size
        del self._known[key]


@contextmanager
def _watched(peaks: dict[str, int], name: str, held: _Held) -> Iterator[None]:
    held.most = held.now
    with held:
        yield
    peaks[name] = held.most


def memory_of(hessian: HessianOperator | ChunkedHessian) -> Memory:
    """Measure the memory at an operator's batch and the present parameters, by running everything once.

    Args:
        hessian: one that nobody else uses: it may be left with other noise, or at another micro-batch.

    Cost: two gradients, two products, a form and a block, run slowly; and their memory besides the operator's own.
    """
    operator, batch = hessian, hessian.batch
    with kept_random_states({hessian.device}):
        if isinstance(hessian, ChunkedHessian):
            operator, batch = hessian.part, hessian.batch.batches[0]
            operator.refresh(batch)  # it may hold the last one, which may be smaller
        assert isinstance(operator, HessianOperator)
        return _measured(operator, batch)


def _measured(operator: HessianOperator, batch: Any) -> Memory:
    engine, peaks, held = operator.engine, dict[str, int](), _Held()
    if isinstance(engine, ReplayedProgram):
        engine = ReplayedProgram(engine.program.anew())  # which holds nothing yet
    vectors = torch.randn(BLOCK, operator.n, generator=torch.Generator().manual_seed(0))
    vectors = vectors.to(operator.device, operator.dtype)
    quiet = without_trace([operator.module, *operator.others], {operator.device})
    with quiet, requiring_grad(operator.params.values()), _watched(peaks, "gradient", held):
        gradient_of(operator, batch)
    with _watched(peaks, "primal", held):
        engine.forward(operator.module, pytree.tree_leaves(batch))
        engine.backward()
        engine.gradient()
    # From the least to the most, for what a recording needs is kept for the next.
    calls: dict[str, Callable[[], object]] = {
        "form": lambda: engine.quadratic_form(vectors[:1]),
        "product": lambda: engine.hvp(vectors[:1]),
        "block": lambda: engine.hvp(vectors),
    }
    for name, call in calls.items():
        with _watched(peaks, name, held):
            call()
    return Memory(**peaks)


def gradient_of(operator: HessianOperator, batch: Any) -> tuple[Tensor | None, ...]:
    """Run the model's own forward and backward pass; the caller sees to traces."""
    return torch.autograd.grad(operator.module(batch)[0], list(operator.params.values()), allow_unused=True)


def memory_forecast(make: Callable[[Any], HessianOperator], batch: Any) -> Memory:
    """Say what a batch will need, from runs with an eighth and a quarter of its examples; one example is run itself.

    Args:
        make: an operator of a batch.
        batch: every tensor in it that has a dimension has one row per example.

    Returns:
        A straight line through the two, at the whole batch; exact where all results grow with the examples, or where
        there is one.

    Raises:
        ValueError: the batch cannot be cut into examples.

    Cost: two exports, and ``memory_of`` of small batches.
    """
    rows = len(MicroBatches.split(batch, 1).batches)
    if rows == 1:
        return memory_of(make(batch))
    few, more = (max(least, rows // share) for share, least in zip(_SHARES, (1, 2), strict=True))
    small, large = (memory_of(make(MicroBatches.split(batch, size).batches[0])) for size in (few, more))
    steps = (rows - few) / (more - few)
    return Memory(
        *(round(a + steps * (b - a)) for a, b in zip(asdict(small).values(), asdict(large).values(), strict=True))
    )
