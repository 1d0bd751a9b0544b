"""The second engine: double backward of the whole model, with the interface of ``ReplayedProgram``.

It takes what the program does not: constructs that do not export, functions with a backward of their own, hooks,
complex numbers. The gradient's graph is kept, so a product is one more backward pass and sees the primal's dropout
masks. Of torch's ways to a second derivative this is the one with the fewest silent errors: ``jvp(jacrev)``,
``grad(jvp)`` and ``linearize`` are wrong for layer norm or in-place ops (docs/explain/correctness.md). Its one known
error, weight norm, is composed of primitives here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .decompositions import pairwise_distances, weight_norm, weight_norm_interface
from .export import tensors_of
from .layout import Layout
from .rules.fallback import UnsupportedOpError
from .sandbox import buffers_on_copies, differentiable_checkpoints, kept_random_states, requiring_grad, user_code


class DoubleBackward:
    """Loss, gradient and products of a module by autograd; one vector of a block after the other.

    Args:
        module: a ``LossModule`` or ``FunctionalLoss``.
        spec: of the batch, from ``torch.utils._pytree.tree_flatten``.
        params: name -> parameter, the flat order of vectors.
        others: modules that the loss reaches without containing them; their buffers are kept, too.
        keep_outputs: keep the graph of the model's outputs too, as ``ggn`` needs it.
        kept: makes a context that puts back the Python values that a pass changes; a ``forward`` that updates buffers
            lets them move.

    Memory: the graph of loss and gradient, until the next ``forward``.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: pytree.TreeSpec,
        params: Mapping[str, Tensor],
        others: Sequence[nn.Module] = (),
        *,
        keep_outputs: bool = False,
        kept: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.module, self.spec, self.others, self.keep_outputs = module, spec, others, keep_outputs
        self._kept = kept
        self.layout = Layout(params)
        self.fallback_ops = ["every op, through autograd"]

    def forward(self, module: nn.Module, batch_leaves: Iterable[Any], *, update_buffers: bool = False) -> Tensor:
        """Run the loss and its gradient at the parameters' present values; see ``Program.forward``."""
        batch = pytree.tree_unflatten(list(batch_leaves), self.spec)
        with ExitStack() as stack:
            for context in (
                user_code,
                nullcontext() if update_buffers else self._kept(),
                requiring_grad(self.layout.tensors),
                buffers_on_copies([module, *self.others], updated=module if update_buffers else None),
                twice_differentiable(),
            ):
                stack.enter_context(context)
            loss = self._split_at_outputs(batch) if self.keep_outputs else module(batch)[0]
            # ``allow_unused``: the loss need not depend on every parameter. The derivative is zero there.
            parts = torch.autograd.grad(loss, self.layout.tensors, create_graph=True, allow_unused=True)
        # A part without a graph is constant in the parameters: its derivative is zero.
        self.parts = [None if g is None or not g.requires_grad else _dense(g) for g in parts]
        # Detached, or who keeps a gradient would keep the graph.
        self._gradient = self._flat([None if g is None else g.detach() for g in parts])
        return loss.detach()

    def _split_at_outputs(self, batch: Any) -> Tensor:
        """Run model and loss apart, so that the loss's own second derivative can be taken at the outputs."""
        output = self.module.output(batch)  # type: ignore[operator]
        self.outputs = [z for z in tensors_of(output) if z.requires_grad]
        # By id: an output that appears twice in the nest is one point.
        points = {id(z): z.detach().requires_grad_() for z in self.outputs}
        self.points = list(points.values())
        apart = pytree.tree_map(lambda t: points.get(id(t), t), output)
        with kept_random_states({self.layout.device}), self._kept():  # both see the same noise, and the same values
            apart_loss = self.module.loss(apart, batch)  # type: ignore[operator]
        self.slopes = torch.autograd.grad(apart_loss, self.points, create_graph=True, materialize_grads=True)
        # The loss twice: at cut points for its own second derivative, and on the model's graph for the gradient.
        loss: Tensor = self.module.loss(output, batch)  # type: ignore[operator]
        return loss

    def _flat(self, parts: Sequence[Tensor | None]) -> Tensor:
        filled = [torch.zeros_like(p) if g is None else g for g, p in zip(parts, self.layout.tensors, strict=True)]
        return torch.cat([_dense(t).reshape(-1) for t in filled]).to(self.layout.dtype)

    def backward(self) -> None:
        """Nothing: ``forward`` has done it."""

    def gradient(self) -> Tensor:
        """Return the gradient ``[n]`` of the last ``forward``."""
        return self._gradient

    def hvp(self, block: Tensor) -> Tensor:
        """Multiply the Hessian with k vectors: ``[k, n] -> [k, n]``."""
        return self._columns(self._hessian_column, block)

    def ggn(self, block: Tensor) -> Tensor:
        """Multiply the generalised Gauss-Newton matrix with k vectors: ``[k, n] -> [k, n]``."""
        return self._columns(self._ggn_column, block)

    def quadratic_form(self, block: Tensor, *, gauss_newton: bool = False) -> Tensor:
        """Return ``v'Av`` for k vectors ``[k, n]``, from full products; ``[k]`` float64."""
        products = self.ggn(block) if gauss_newton else self.hvp(block)
        return torch.linalg.vecdot(products.double(), block.double())

    def _columns(self, product: Callable[[list[Tensor]], Tensor], block: Tensor) -> Tensor:
        tensors = self.layout.tensors
        try:
            with ExitStack() as stack:
                for context in (
                    user_code,
                    requiring_grad(tensors),
                    # A checkpointed region runs again in every product, with what it does to buffers and values.
                    self._kept(),
                    buffers_on_copies([self.module, *self.others]),
                ):
                    stack.enter_context(context)
                # One after the other: batched cotangents are an experiment of torch, without a rule for some ops, and
                # the unusual ops are those that end here.
                columns = zip(*self.layout.views(block), strict=True)
                return torch.stack([product([t.to(p.dtype) for t, p in zip(v, tensors, strict=True)]) for v in columns])
        except (RuntimeError, NotImplementedError) as error:
            raise UnsupportedOpError(
                f"the products go through autograd, which cannot differentiate this model twice: "
                f"{str(error).splitlines()[0]}"
            ) from error

    def _hessian_column(self, v: list[Tensor]) -> Tensor:
        # grad <grad, v>, without forming the sum: v is given as the cotangent of the gradient's parts.
        pairs = [(g, t) for g, t in zip(self.parts, v, strict=True) if g is not None]
        return self._flat(self._pull(pairs) if pairs else [None] * len(v))

    def _ggn_column(self, v: list[Tensor]) -> Tensor:
        # J v by two pulls: J'u is linear in u, and its derivative along v by u is J v.
        # Any u would do, for J'u is linear in it; but torch's way to it may have a kink at zero, as in the fallback.
        dummies = [torch.ones_like(z, requires_grad=True) for z in self.outputs]
        pulled = torch.autograd.grad(self.outputs, self.layout.tensors, dummies, create_graph=True, allow_unused=True)
        pairs = [(_dense(g), t) for g, t in zip(pulled, v, strict=True) if g is not None]
        gs, ts = zip(*pairs, strict=True)
        along = torch.autograd.grad(gs, dummies, ts, materialize_grads=True)
        curved = self._loss_curvature(along)
        return self._flat(self._pull(list(zip(self.outputs, curved, strict=True))))

    def _loss_curvature(self, along: Sequence[Tensor]) -> Sequence[Tensor]:
        """Multiply the loss's second derivative by the outputs with a tangent of the outputs."""
        pairs = [(s, d) for s, d in zip(self.slopes, along, strict=True) if s.requires_grad]
        if not pairs:  # linear in the outputs
            return [torch.zeros_like(z) for z in self.points]
        slopes, tangents = zip(*pairs, strict=True)
        return torch.autograd.grad(slopes, self.points, tangents, retain_graph=True, materialize_grads=True)

    def _pull(self, pairs: list[tuple[Tensor, Tensor]]) -> Sequence[Tensor | None]:
        ys, cotangents = zip(*pairs, strict=True)
        # The graph stays: the next product runs through it again.
        return torch.autograd.grad(ys, self.layout.tensors, cotangents, retain_graph=True, allow_unused=True)


def _dense(g: Tensor) -> Tensor:
    # An embedding with ``sparse=True`` has sparse gradients.
    return g if g.layout is torch.strided else g.to_dense()


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Within the block, replace what torch cannot differentiate twice, or gets wrong."""
    with differentiable_checkpoints(), sdpa_kernel(SDPBackend.MATH), _Composed():  # other kernels: first order only
        yield


class _Composed(TorchFunctionMode):
    """Composes of primitives what torch cannot differentiate twice, or gets wrong: weight norm, pairwise distances."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        if func is torch._weight_norm:
            return weight_norm(*args, **(kwargs or {}))
        if func is torch._weight_norm_interface:
            return weight_norm_interface(*args, **(kwargs or {}))
        if func is torch.cdist:
            return _cdist(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:  # noqa: ARG001
    return pairwise_distances(x1, x2, p)
