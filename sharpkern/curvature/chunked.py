"""The Hessian of one step's loss, summed over micro-batches, so that only one of them has to fit into memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..rop.sandbox import RandomState, kept_random_states, random_state, set_random_state
from .base import ParameterOperator
from .operators import HessianOperator
from .repeatable import check_no_iterator, check_same_loss


class MicroBatches:
    """One optimizer step's batch in pieces, as gradient accumulation sees it.

    Its loss is ``sum_i w_i loss_i``.

    Args:
        batches: at least one; each as for ``HessianOperator``.
        weights: what the loop multiplies each loss with before ``backward()``. None for each one's share of the
            examples (the length of the first tensor), which makes it the mean over all examples.
        random_states: for each micro-batch, ``rop.sandbox.random_state()`` just before the loop's own forward pass, so
            that its dropout masks are drawn again; None to draw new ones.

    Raises:
        ValueError: no batch; another number of weights or states than of batches; a weight that is negative or not
            finite, or none that is positive; a batch without a tensor, whose examples cannot be counted.

    >>> parts = MicroBatches([(torch.ones(3, 2), torch.ones(3)), (torch.ones(1, 2), torch.ones(1))])
    >>> parts.weights
    [0.75, 0.25]
    """

    def __init__(
        self,
        batches: Sequence[Any],
        weights: Sequence[float] | None = None,
        *,
        random_states: Sequence[RandomState] | None = None,
    ) -> None:
        self.batches: list[Any] = list(batches)
        if not self.batches:
            raise ValueError("MicroBatches needs at least one batch, got none.")
        if weights is None:
            rows = [_examples(b) for b in self.batches]
            weights = [count / max(sum(rows), 1) for count in rows]
        self.weights = [float(w) for w in weights]
        self.random_states = None if random_states is None else list(random_states)
        for what, given in (("weight", self.weights), ("random state", self.random_states)):
            if given is not None and len(given) != len(self.batches):
                raise ValueError(f"need one {what} for each of {len(self.batches)} micro-batches, got {len(given)}.")
        if not all(math.isfinite(w) and w >= 0 for w in self.weights) or not any(self.weights):
            raise ValueError(f"weights must be finite, not negative, and not all zero, got {self.weights}.")

    @classmethod
    def split(cls, batch: Any, size: int) -> MicroBatches:
        """Cut a batch into micro-batches of ``size`` examples; the last one may be smaller.

        Args:
            batch: as for ``HessianOperator``. Every tensor in it that has a dimension has one row per example; other
                values go into each micro-batch.
            size: at least 1.

        Raises:
            ValueError: size below 1, no tensor, or tensors of different lengths.
        """
        if size < 1:
            raise ValueError(f"the size of a micro-batch must be at least 1, got {size}.")
        leaves, spec = pytree.tree_flatten(batch)
        rows = _examples(batch)
        cut = [isinstance(leaf, Tensor) and leaf.ndim > 0 for leaf in leaves]
        lengths = [len(leaf) for leaf, is_cut in zip(leaves, cut, strict=True) if is_cut]
        if not rows or any(length != rows for length in lengths):
            raise ValueError(
                f"the batch cannot be cut into rows: its tensors have lengths {lengths}. Cut it yourself, and pass "
                "MicroBatches([...])."
            )
        starts = range(0, rows, size)
        # Views: cutting costs no memory.
        pieces = [
            [leaf[i : i + size] if is_cut else leaf for leaf, is_cut in zip(leaves, cut, strict=True)] for i in starts
        ]
        return cls([pytree.tree_unflatten(p, spec) for p in pieces], [min(size, rows - i) / rows for i in starts])


class ChunkedHessian(ParameterOperator):
    """The Hessian of a weighted sum of micro-batch losses; every product runs through all of them.

    Batch norm in training mode normalises each micro-batch by itself, as gradient accumulation does. Noise such as
    dropout is drawn once per ``refresh`` for every micro-batch, and each product sees the same.

    Args:
        model: a module.
        loss_fn: ``(output, targets) -> scalar``, as for ``HessianOperator``.
        batch: the micro-batches.
        params: which parameters; None for all with ``requires_grad``.
        update_buffers: let the forward passes change the model's buffers, once per micro-batch.
        verify: compare programs with the eager model; see ``HessianOperator``.
        recompute: keep less of the micro-batch's forward pass; see ``HessianOperator``.

    Attributes:
        loss: 0-d tensor, of the whole step.   gradient: ``[n]``.   params, n, dtype, device: as ``HessianOperator``.

    Raises:
        ValueError, NonFiniteLossError: as ``HessianOperator``.
        NotRepeatableError: there are several micro-batches, and the model reads an iterator.
        ChangedLossError: the loss of a micro-batch is another when a product runs it again.

    Cost: with c micro-batches, c gradients and c products for each product: the primal values of one micro-batch make
    room for those of the next. With a single one, just a product. Memory: that of one micro-batch.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        batch: MicroBatches,
        *,
        params: Mapping[str, Tensor] | Iterable[str] | Iterable[Tensor] | None = None,
        update_buffers: bool = False,
        verify: bool = True,
        recompute: bool = False,
    ) -> None:
        self.batch = batch
        self._random: list[RandomState] = []  # in which each micro-batch's forward pass began
        with self._noise(0):
            self.part = HessianOperator(
                model,
                loss_fn,
                batch.batches[0],
                params=params,
                update_buffers=update_buffers,
                verify=verify,
                recompute=recompute,
            )
        self._take_over(update_buffers=update_buffers, first_done=True)

    def refresh(self, batch: MicroBatches | None = None, *, update_buffers: bool = False) -> None:
        """Compute loss and gradient at the present parameters.

        Args:
            batch: None keeps the last one.
            update_buffers: let the forward passes change the model's buffers.

        Raises:
            NonFiniteLossError: the loss of a micro-batch is NaN or infinite.
        """
        self.batch = self.batch if batch is None else batch
        self._random.clear()
        self._take_over(update_buffers=update_buffers, first_done=False)

    def _take_over(self, *, update_buffers: bool, first_done: bool) -> None:
        """Run every micro-batch once, with the noise and the changes of buffers that a training step has."""
        loss = gradient = None
        self._losses: list[Tensor] = []
        for i, (batch, weight) in enumerate(zip(self.batch.batches, self.batch.weights, strict=True)):
            if i or not first_done:
                with self._noise(i):
                    self.part.refresh(batch, update_buffers=update_buffers)
            elif len(self.batch.batches) > 1:
                check_no_iterator(self.part.iterators)
            self._losses.append(self.part.loss)
            part = self.part.gradient * weight
            gradient = part if gradient is None else gradient.add_(part)
            # In float64, so that a thousand micro-batches add up like one.
            value = self.part.loss.double() * weight
            loss = value if loss is None else loss + value
        assert loss is not None
        assert gradient is not None
        self.loss, self.gradient = loss, gradient
        self.params, self.others = self.part.params, self.part.others
        self.n, self.dtype, self.device = self.part.n, self.part.dtype, self.part.device
        self._held = len(self.batch.batches) - 1  # the micro-batch whose primal values the operator holds

    @contextmanager
    def _noise(self, index: int) -> Iterator[None]:
        """Let a micro-batch draw the loop's own random numbers again if they are known; note where it began."""
        if self.batch.random_states is None:
            self._random.append(random_state())
            yield
            return
        self._random.append(self.batch.random_states[index])
        with kept_random_states(_cuda_devices()):
            set_random_state(self._random[-1])
            yield

    @property
    def iterators(self) -> list[str]:
        """Where the forward pass can reach an iterator."""
        return self.part.iterators

    @property
    def engine(self) -> Any:
        """What gives the products: a program, or double backward."""
        return self.part.engine

    def apply_rows(self, block: Tensor) -> Tensor:
        return self._total(lambda: self.part.apply_rows(block))

    def form_rows(self, block: Tensor) -> Tensor:
        return self._total(lambda: self.part.form_rows(block))

    def _total(self, term: Callable[[], Tensor]) -> Tensor:
        total = None
        for weight in self._visited():
            part = term() * weight
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def _visited(self) -> Iterator[float]:
        """Bring the operator to each micro-batch, with the noise that its loss was computed with; yield the weight."""
        # The one that is held comes first: it needs no primal sweeps, and with a single one there are none at all.
        order = sorted(range(len(self.batch.batches)), key=lambda i: i != self._held)
        for i in order:
            if i != self._held:
                with kept_random_states(_cuda_devices()):
                    set_random_state(self._random[i])
                    self.part.refresh(self.batch.batches[i])
                check_same_loss(self.part.loss, self._losses[i], f"micro-batch {i}")
                self._held = i
            yield self.batch.weights[i]


def _cuda_devices() -> list[torch.device]:
    """Return every CUDA device in use: their generators are what a random state holds."""
    count = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    return [torch.device("cuda", i) for i in range(count)]


def _examples(batch: Any) -> int:
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return len(leaf)
    raise ValueError("the batch holds no tensor with rows, so its examples cannot be counted: give weights.")
