"""Curvature as linear operators: Hessian, generalised Gauss-Newton, and the symmetrically preconditioned form."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import kernels
from .flat import Layout, trainable
from .preconditioning import Preconditioner
from .rop import (
    FunctionalLoss,
    LossModule,
    Program,
    ReplayedProgram,
    UnsupportedModelError,
    UnsupportedOpError,
    export,
)
from .rop.double_backward import AutogradProgram


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite. Attributes: ``loss`` (float), ``step`` (int, or None outside training)."""

    def __init__(self, loss: float, step: int | None = None) -> None:
        self.loss, self.step = loss, step
        where = "" if step is None else f" at step {step}"
        super().__init__(
            f"the loss is {loss}{where}: the learning rate may be too high, or the batch holds bad values."
        )


class Operator(Protocol):
    """What a solver needs to know of a symmetric operator."""

    n: int
    dtype: torch.dtype
    device: torch.device

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply with the columns of ``[n, k]``."""


class _Operator:
    """Shape checks and the spellings of a product, on top of ``_apply``: ``[k, n] -> [k, n]``."""

    n: int
    dtype: torch.dtype
    device: torch.device

    def _apply(self, block: Tensor) -> Tensor:
        raise NotImplementedError

    def _form(self, block: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``."""
        return self.n, self.n

    def matvec(self, v: Tensor) -> Tensor:
        """Multiply with one vector.

        Args:
            v: ``[n]``, the operator's dtype and device, in the flat order of ``model.parameters()``.

        Returns:
            ``[n]``.

        Raises:
            ValueError: shape, dtype or device of v is wrong.
            RuntimeError: the parameters changed since the last ``refresh``.
        """
        self._check(v, "v", (self.n,))
        return self._apply(v[None].contiguous())[0]

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply with the columns of V, all at once.

        Args:
            V: ``[n, k]``; the transpose of a contiguous ``[k, n]`` block is used without a copy.

        Returns:
            ``[n, k]``, the transpose of a contiguous ``[k, n]`` block.

        Raises:
            ValueError: shape, dtype or device of V is wrong.
            RuntimeError: the parameters changed since the last ``refresh``.
        """
        self._check(V, "V", (self.n, V.shape[-1] if V.ndim == 2 else "k"))
        if V.shape[1] == 0:
            return torch.empty_like(V)
        return self._apply(_rows(V)).t()

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.matvec(v) if v.ndim == 1 else self.matmat(v)

    def quadratic_form(self, V: Tensor) -> Tensor:
        """Return ``v'Av`` of this operator A, without Av: about half the multiplications of a product.

        Args:
            V: ``[n]`` or ``[n, k]``, as for ``matvec`` and ``matmat``.

        Returns:
            float64, 0-d or ``[k]``.

        Raises:
            ValueError: shape, dtype or device of V is wrong.
            RuntimeError: the parameters changed since the last ``refresh``.

        Source: the second directional derivative of the loss; Griewank and Walther, Evaluating Derivatives (2008),
        chapter 13.
        """
        self._check(V, "V", (self.n, *V.shape[1:2]))
        values = self._form(V[None].contiguous() if V.ndim == 1 else _rows(V))
        return values[0] if V.ndim == 1 else values

    def _check(self, v: Tensor, name: str, shape: tuple[int | str, ...]) -> None:
        if v.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} for this operator, got {list(v.shape)}.")
        if v.dtype != self.dtype or v.device != self.device:
            raise ValueError(
                f"{name} must be {self.dtype} on {self.device}, got {v.dtype} on {v.device}: "
                f"use {name}.to(device, dtype)."
            )

    def to_scipy(self) -> Any:
        """Return a ``scipy.sparse.linalg.LinearOperator`` on NumPy vectors (copied to the device and back)."""
        from scipy.sparse.linalg import LinearOperator

        def product(array: Any) -> Any:
            V = torch.as_tensor(array, dtype=self.dtype, device=self.device)
            return (self.matvec(V.reshape(-1)) if V.ndim == 1 or V.shape[1] == 1 else self.matmat(V)).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=product, matmat=product, rmatvec=product, dtype=dtype)


class _Parametrised(_Operator):
    """An operator on the space of named parameters."""

    params: dict[str, Tensor]


class _Curvature(_Parametrised):
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
        model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
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

    def _apply(self, block: Tensor) -> Tensor:
        self._check_fresh()
        self.products += block.shape[0]
        return self._product(block)

    def _check_fresh(self) -> None:
        if self._present_versions() != self._versions:
            raise RuntimeError("parameters or batch changed in place since the last refresh(): call refresh() first.")

    def _product(self, block: Tensor) -> Tensor:
        raise NotImplementedError

    def _form(self, block: Tensor) -> Tensor:
        self._check_fresh()
        return self._engine.quadratic_form(block, gauss_newton=self._needs_outputs)


class HessianOperator(_Curvature):
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


class GGNOperator(_Curvature):
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


class PreconditionedOperator(_Operator):
    """``P^-1/2 A P^-1/2``: symmetric, with the eigenvalues of ``P^-1 A``.

    Args:
        operator: A, an operator with ``params`` (``HessianOperator``, ``GGNOperator``, ``DatasetHessian``).
        preconditioner: P, from ``sharpkern.preconditioner``; taken as it is now.

    Raises:
        ValueError: a parameter of A is not one of P's.

    Cost: two diagonal scalings more than A.
    Source: Cohen et al., Adaptive gradient methods at the edge of stability (2022).
    """

    def __init__(self, operator: _Parametrised, preconditioner: Preconditioner) -> None:
        self.operator = operator
        self.preconditioner = preconditioner
        self.n, self.dtype, self.device = operator.n, operator.dtype, operator.device
        self.inv_sqrt = preconditioner.inv_sqrt(list(operator.params.values())).to(self.dtype)

    def _apply(self, block: Tensor) -> Tensor:
        scaled = self.operator._apply(kernels.scale(block, self.inv_sqrt))
        return kernels.scale(scaled, self.inv_sqrt)

    def _form(self, block: Tensor) -> Tensor:
        return self.operator._form(kernels.scale(block, self.inv_sqrt))


def select_parameters(
    model: nn.Module | None, params: Mapping[str, Tensor] | Iterable[str] | Iterable[Tensor] | None
) -> dict[str, Tensor]:
    """Resolve names, tensors, a dict or None to name -> parameter in the order of ``model.named_parameters()``.

    Raises:
        ValueError: an unknown name or tensor, or nothing selected.
    """
    if model is None:
        if not isinstance(params, Mapping) or not params:
            raise ValueError("a functional loss (model=None) needs params: a dict name -> tensor.")
        return dict(params)
    everything: dict[str, Tensor] = dict(model.named_parameters())
    if params is None:
        chosen: dict[str, Tensor] = dict(trainable(model))
    else:
        wanted = list(params.values() if isinstance(params, Mapping) else params)
        by_id = {id(p): name for name, p in everything.items()}
        names = {w if isinstance(w, str) else by_id.get(id(w), f"a tensor of shape {list(w.shape)}") for w in wanted}
        if unknown := names - everything.keys():
            raise ValueError(f"not among the model's parameters: {sorted(unknown)}. It has {list(everything)}.")
        chosen = {name: p for name, p in everything.items() if name in names}
    if not chosen:
        raise ValueError("no parameter is selected: the model has none with requires_grad=True.")
    return chosen


def _check_batch(inputs: list[Tensor], device: torch.device) -> None:
    for leaf in inputs:
        if leaf.numel() == 0:
            raise ValueError(f"the batch is empty: a tensor has shape {list(leaf.shape)}.")
        if leaf.device != device:
            raise ValueError(f"the batch is on {leaf.device}, the parameters on {device}: move one of them.")


def _rows(V: Tensor) -> Tensor:
    # viewed anew: with one column the stride over it may be 1, and torch then copies it 80 times slower (transposing)
    return V.t().contiguous().view(V.shape[1], V.shape[0])
