"""The curvature of a loss as linear operators: Hessian and generalised Gauss-Newton."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..rop import Program, ReplayedProgram, UnsupportedModelError, UnsupportedOpError, export
from ..rop.double_backward import AutogradProgram
from ..rop.layout import Layout
from .base import ParameterOperator
from .losses import FunctionalLoss, LossModule, NonFiniteLossError
from .parameters import select_parameters, unwrapped


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
    ) -> None:
        model = None if model is None else unwrapped(model)
        self.params = select_parameters(model, params)
        self.module: nn.Module
        if model is None:
            self.module = FunctionalLoss(self.params, loss_fn)
            self.params = dict(zip(self.params, self.module.values, strict=True))
        else:
            self.module = LossModule(model, loss_fn)
        layout = Layout(self.params)
        self.n, self.dtype, self.device = layout.n, layout.dtype, layout.device
        self.products = 0
        self._engines: dict[Any, ReplayedProgram | AutogradProgram] = {}
        self.refresh(batch, update_buffers=update_buffers)

    def refresh(self, batch: Any = None, *, update_buffers: bool = False) -> None:
        """Run the primal sweeps at the present parameter values: new loss, new gradient, new products.

        The model is exported again only for a batch of new shapes or a change between train and eval mode.

        Args:
            batch: ``(inputs, targets)`` or a dict; None keeps the last one.
            update_buffers: let the forward pass change the model's buffers (batch-norm statistics), as training does.

        Raises:
            ValueError: the batch is empty or on another device.
            NonFiniteLossError: the loss is NaN or infinite.
        """
        self.batch: Any = self.batch if batch is None else batch
        batch = self.batch
        leaves, spec = pytree.tree_flatten(batch)
        self._inputs = [x for x in leaves if isinstance(x, Tensor)]
        _check_batch(self._inputs, self.device)
        signature = [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves]
        key = (spec, str(signature), tuple(m.training for m in self.module.modules()))
        if key not in self._engines:
            self._engines[key] = self._engine_for(batch)
        self._engine = self._engines[key]
        self.loss: Tensor = self._engine.forward(self.module, leaves, update_buffers=update_buffers)
        value = float(self.loss)
        if not math.isfinite(value):
            raise NonFiniteLossError(value)
        self._engine.backward()
        self._gradient: Tensor | None = None
        self._versions = self._present_versions()

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

    def _engine_for(self, batch: Any) -> ReplayedProgram | AutogradProgram:
        try:
            graph = export(self.module, batch)
            return ReplayedProgram(Program(graph, self.params, keep_outputs=self._needs_outputs))
        except UnsupportedOpError:
            raise
        except UnsupportedModelError as error:
            warnings.warn(
                f"sharpkern: the model does not export, products go through autograd (slower). {error}",
                stacklevel=5,
            )
            return AutogradProgram(self.module, batch, self.params)

    @property
    def fallback_ops(self) -> list[str]:
        """Names of the ops without a rule of their own: right, but slow."""
        return self._engine.fallback_ops

    def _present_versions(self) -> list[int]:
        return [t._version for t in (*self.params.values(), *self._inputs)]

    def apply_rows(self, block: Tensor) -> Tensor:
        self._check_fresh()
        self.products += block.shape[0]
        return self._product(block)

    def _check_fresh(self) -> None:
        if self._present_versions() != self._versions:
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
    derivative is taken by those outputs; so the model must not compute the loss itself.

    Raises:
        ValueError: as ``HessianOperator``; or a functional loss, which has no model output.

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
    ) -> None:
        if model is None:
            raise ValueError("GGNOperator needs a model: a functional loss has no model output.")
        super().__init__(model, loss_fn, batch, params=params)

    def _product(self, block: Tensor) -> Tensor:
        return self._engine.ggn(block)


def _check_batch(inputs: list[Tensor], device: torch.device) -> None:
    for leaf in inputs:
        if leaf.numel() == 0:
            raise ValueError(f"the batch is empty: a tensor has shape {list(leaf.shape)}.")
        if leaf.device != device:
            raise ValueError(f"the batch is on {leaf.device}, the parameters on {device}: move one of them.")
