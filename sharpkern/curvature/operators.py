"""The curvature of a loss as linear operators: Hessian and generalised Gauss-Newton."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..rop.layout import Layout
from .base import ParameterOperator
from .engines import Engine, Engines
from .freshness import Freshness
from .losses import FunctionalLoss, LossModule, NonFiniteLossError, check_recordable
from .parameters import select_parameters
from .wrappers import check_one_process, unwrapped


class LossCurvature(ParameterOperator):
    """A loss at the model's present parameters, exported once; products by its tangent sweeps."""

    _needs_outputs = False

    def __init__(
        self,
        model: nn.Module | None,
        loss_fn: Callable[..., Tensor],
        batch: Any,
        *,
        params: Mapping[str, Tensor] | Iterable[str] | Iterable[Tensor] | None = None,
        update_buffers: bool = False,
        verify: bool = True,
        recompute: bool = False,
    ) -> None:
        check_one_process(model)
        model = None if model is None else unwrapped(model)
        self.params = select_parameters(model, params)
        self._selection = params if params is None else list(self.params)
        self.module: Any  # a LossModule or FunctionalLoss
        if model is None:
            self.module = FunctionalLoss(self.params, loss_fn)
            self.params = dict(zip(self.params, self.module.values, strict=True))
        else:
            self.module = LossModule(model, loss_fn)
        self.products = 0
        self._verify, self._recompute = verify, recompute
        self._start()
        self.batch: Any = self.module.accepted(batch)
        self.refresh(update_buffers=update_buffers)

    def _start(self) -> None:
        """Begin anew with the present parameters: their number, dtype and device, and no engine."""
        layout = Layout(self.params)
        self.n, self.dtype, self.device = layout.n, layout.dtype, layout.device
        self._freshness = Freshness(list(self.params.values()))
        self._engines = Engines(
            self.module,
            self.params,
            keep_outputs=self._needs_outputs,
            verify=self._verify,
            recompute=self._recompute,
        )

    def _follow_parameters(self) -> None:
        """Take over parameters that were frozen, unfrozen, replaced or converted since the last refresh."""
        if isinstance(self.module, FunctionalLoss):
            self.module.follow()
            return
        params = select_parameters(self.module.model, self._selection)
        same = len(params) == len(self.params) and all(params[k] is p for k, p in self.params.items() if k in params)
        if not same or list(params) != list(self.params) or Layout(params).dtype != self.dtype:
            self.params = params
            self._start()

    def refresh(self, batch: Any = None, *, update_buffers: bool = False) -> None:
        """Run the primal sweeps at the present parameter values: new loss, new gradient, new products.

        The model is exported again for a batch of new shapes, another mode (train, eval, autocast), parameters that
        were frozen, unfrozen or replaced, and for a Python value that its code reads and that has changed; up to 8
        programs are kept. Every 500 refreshes the program is compared with the eager model again
        (docs/explain/correctness.md).

        Args:
            batch: ``(inputs, targets)`` or a dict; None keeps the last one.
            update_buffers: let the forward pass change the model's buffers (batch-norm statistics), as training does.

        Raises:
            ValueError: the batch is empty, on another device, or neither a pair nor a mapping; the loss is no scalar.
            NonFiniteLossError: the loss is NaN or infinite.
            RuntimeError: this is called within ``torch.inference_mode``, or the batch was made there.
        """
        self.batch = self.batch if batch is None else self.module.accepted(batch)
        check_recordable(self.batch)
        leaves, spec = pytree.tree_flatten(self.batch)
        self._inputs = [x for x in leaves if isinstance(x, Tensor)]
        if not self._engines.unchanged():
            self._follow_parameters()
        check_batch(self._inputs, self.device)
        self._engine = self._engines.for_batch(leaves, spec)
        loss = self._engines.loss_of(self._engine)
        self.loss: Tensor = (
            self._engine.forward(self.module, leaves, update_buffers=update_buffers) if loss is None else loss
        )
        value = float(self.loss)
        if not math.isfinite(value):
            raise NonFiniteLossError(value)
        if loss is None:
            self._engine.backward()
        self._gradient: Tensor | None = None
        self._freshness.renew(self._inputs)

    @property
    def gradient(self) -> Tensor:
        """The loss's gradient ``[n]`` at the last ``refresh``, computed when it is first asked for.

        Raises:
            RuntimeError: it is asked for the first time after parameters or batch have changed in place.
        """
        if self._gradient is None:
            self._check_fresh()
            self._gradient = self._engine.gradient()
        return self._gradient

    @property
    def engine(self) -> Engine:
        """What gives the products at the last ``refresh``: a program, or double backward."""
        return self._engine

    @property
    def others(self) -> list[nn.Module]:
        """Modules that the loss function reaches without being part of the model, such as a teacher."""
        return self._engines.others

    @property
    def iterators(self) -> list[str]:
        """Where the forward pass can reach an iterator, of which every ``refresh`` takes a value."""
        return self._engines.iterators

    @property
    def fallback_ops(self) -> list[str]:
        """Names of the ops without a rule of their own: right, but slow."""
        return self._engine.fallback_ops

    def apply_rows(self, block: Tensor) -> Tensor:
        self._check_fresh()
        self.products += block.shape[0]
        return self._product(block)

    def _check_fresh(self) -> None:
        if not self._freshness.holds():
            raise RuntimeError("parameters or batch changed in place since the last refresh(): call refresh() first.")

    def _product(self, block: Tensor) -> Tensor:
        raise NotImplementedError

    def form_rows(self, block: Tensor) -> Tensor:
        self._check_fresh()
        return self._engine.quadratic_form(block, gauss_newton=self._needs_outputs)


class HessianOperator(LossCurvature):
    """The Hessian of a loss at the model's present parameters, by Pearlmutter's R-operator.

    Exports ``loss_fn(model(inputs), targets)`` once; loss and gradient come from the primal sweeps, and each product
    costs two more sweeps over the same short list of ops. Vectors are float64 if all parameters are, else float32.

    Args:
        model: a module; None for a functional loss ``loss_fn(params, batch)``, with ``params`` a dict of tensors.
        loss_fn: ``(output, targets) -> scalar``; for a dict batch ``(output, batch) -> scalar``.
        batch: ``(inputs, targets)``, inputs a tensor, a tuple (``model(*inputs)``) or a dict (``model(**inputs)``);
            or a dict (``model(**batch)``).
        params: which parameters: names, tensors, or a dict; None for all with ``requires_grad``.
        update_buffers: let the forward pass change the model's buffers.
        verify: compare loss, gradient and buffers of the exported program with one eager forward and backward pass, at
            the first batch and every 500 refreshes; where they differ, double backward takes over, with a warning.
            False trusts the export.
        recompute: keep only a part of the forward pass, and compute the rest again when a product comes to it: the
            same products in less memory, for about twice their time (docs/explain/memory.md). Double backward does not
            have it.

    Attributes:
        loss: 0-d tensor.   gradient: ``[n]``.   params: name -> parameter.   products: products done so far.
        n, shape, dtype, device: of the operator.   fallback_ops: ops without a rule of their own.

    Raises:
        ValueError: empty batch, wrong device, unknown parameter name, or a loss that is no scalar.
        NonFiniteLossError: the loss is NaN or infinite.
        UnsupportedOpError: an op that torch cannot differentiate twice, by name.

    Source: Pearlmutter, Fast exact multiplication by the Hessian (1994).

    >>> model = nn.Linear(3, 1, bias=False)
    >>> x = torch.randn(8, 3)
    >>> H = HessianOperator(model, nn.MSELoss(), (x, torch.randn(8, 1)))
    >>> torch.allclose(H @ torch.eye(3), 2 / 8 * x.T @ x, atol=1e-5)
    True
    """

    def _product(self, block: Tensor) -> Tensor:
        return self._engine.hvp(block)


class GGNOperator(LossCurvature):
    """The generalised Gauss-Newton matrix J' (d2 loss / d output2) J; arguments as ``HessianOperator``.

    J is the derivative of the model's outputs (all tensors it returns) by the parameters, and the loss's second
    derivative is taken by those outputs. A model that computes a loss of its own, as Hugging Face's do, is taken if
    ``loss_fn`` computes the loss again from the other outputs:

        GGNOperator(model, lambda output, batch: F.cross_entropy(output.logits, batch["labels"]), batch)

    Raises:
        ValueError: as ``HessianOperator``; a functional loss, which has no model output; or ``loss_fn`` uses a loss
            that the model has computed.

    Source: Schraudolph, Fast curvature matrix-vector products (2002).
    """

    _needs_outputs = True

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        batch: Any,
        *,
        params: Mapping[str, Tensor] | Iterable[str] | Iterable[Tensor] | None = None,
        verify: bool = True,
        recompute: bool = False,
    ) -> None:
        if model is None:
            raise ValueError("GGNOperator needs a model: a functional loss has no model output.")
        super().__init__(model, loss_fn, batch, params=params, verify=verify, recompute=recompute)

    def _product(self, block: Tensor) -> Tensor:
        return self._engine.ggn(block)


def check_batch(inputs: list[Tensor], device: torch.device) -> None:
    """Check that a batch's tensors are not empty and lie where the parameters do.

    Raises:
        ValueError: one is, or does not.
    """
    if inputs and inputs[0].numel() == 0:
        raise ValueError(f"the batch is empty: a tensor has shape {list(inputs[0].shape)}.")
    for leaf in inputs:
        if leaf.device != device:
            raise ValueError(f"the batch is on {leaf.device}, the parameters on {device}: move one of them.")
