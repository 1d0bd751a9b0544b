"""The Hessian of a whole data set's loss, accumulated over batches that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..rop.sandbox import kept_random_states, random_state, set_random_state
from .base import ParameterOperator
from .operators import HessianOperator
from .repeatable import check_no_iterator


class DatasetHessian(ParameterOperator):
    """The exact Hessian over all batches of a loader: each product runs through them, primal sweeps included.

    Args:
        model: a module; in training mode batch norm normalises each batch by itself, so that the Hessian depends on how
            the data are cut into batches; dropout's masks are the same in every product.
        loss_fn: ``(output, targets) -> scalar``, averaged or summed over the examples of a batch.
        batches: can be iterated again and again and gives the same examples (a list, a ``DataLoader``); a batch as for
            ``HessianOperator``, its first tensor one row per example.
        params: which parameters; None for all with ``requires_grad``.
        verify: compare programs with the eager model; see ``HessianOperator``.
        recompute: keep less of a batch's forward pass; see ``HessianOperator``.
        reduction: "mean" if the loss is the examples' mean (batches are then weighted by their length), or "sum".

    Raises:
        ValueError: no batch, an empty one, or an unknown reduction.
        NonFiniteLossError: the loss of a batch is NaN or infinite.
        NotRepeatableError: the model reads an iterator.

    Cost: for a block of k vectors, as many gradients and k-vector products as there are batches. Memory: one batch.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        batches: Iterable[Any],
        *,
        params: Mapping[str, Tensor] | Iterable[str] | Iterable[Tensor] | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        verify: bool = True,
        recompute: bool = False,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}.")
        self.batches, self.reduction = batches, reduction
        # Only to export: every product begins again from the first batch.
        first = next(iter(batches), None)
        if first is None:
            raise ValueError("the loader gives no batch.")
        self._random = random_state()
        self._hessian = HessianOperator(model, loss_fn, first, params=params, verify=verify, recompute=recompute)
        check_no_iterator(self._hessian.iterators)
        self.params = self._hessian.params
        self.n, self.dtype, self.device = self._hessian.n, self._hessian.dtype, self._hessian.device

    def _weighted(self) -> Iterator[float]:
        """Bring the operator to one batch after the other, and yield its weight in the sum."""
        # The primal sweeps of every batch run again for each product, as only one batch's activations fit into memory.
        # Every product must see the same dropout masks and the same order of batches, or it is no linear operator;
        # and training's own random numbers must not depend on how many products were made.
        with kept_random_states({self.device}):
            set_random_state(self._random)
            for batch in self.batches:
                self._hessian.refresh(batch)
                yield float(examples_of(batch)) if self.reduction == "mean" else 1.0

    def apply_rows(self, block: Tensor) -> Tensor:
        return self._total(lambda: self._hessian.apply_rows(block))

    def form_rows(self, block: Tensor) -> Tensor:
        return self._total(lambda: self._hessian.form_rows(block))

    def _total(self, term: Callable[[], Tensor]) -> Tensor:
        total, weights = None, 0.0
        for weight in self._weighted():
            part = term() * weight
            # ``part`` is a new tensor (the product with the weight), so adding to it in place changes nothing of the
            # operator's.
            total = part if total is None else total.add_(part)
            weights += weight
        if total is None:
            raise ValueError(
                "the loader gives no batch any more: pass one that can be iterated again, not a generator."
            )
        # Weighted by length: a smaller last batch counts for its examples only.
        return total.div_(weights) if self.reduction == "mean" else total


def examples_of(batch: Any) -> int:
    """Return how many examples a batch holds: the length of its first tensor."""
    return next(len(leaf) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor))
