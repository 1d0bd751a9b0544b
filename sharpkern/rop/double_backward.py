"""The engine for models that do not export: double backward, with the interface of ``rop.Program``.

The gradient's graph is kept, so a product is one more backward pass and sees the primal's dropout masks. Of torch's
ways to a second derivative this is the one whose only silent error is known (weight_norm, refused here):
``jvp(jacrev)``, ``grad(jvp)`` and ``linearize`` are silently wrong for layer norm or in-place ops
(docs/correctness.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .export import tensors_of
from .layout import Layout
from .rules.fallback import UnsupportedOpError

_WRONG = {"_weight_norm", "_weight_norm_interface"}


class AutogradProgram:
    """Loss, gradient and products of a module by autograd; one vector of a block after the other.

    Args:
        module: a ``LossModule`` or ``FunctionalLoss``.
        batch: example batch.
        params: name -> parameter, the flat order of vectors.

    Raises:
        UnsupportedOpError: the model uses an op whose second derivative torch gets wrong.
    """

    def __init__(self, module: nn.Module, batch: Any, params: Mapping[str, Tensor]) -> None:
        self.module = module
        self.layout = Layout(params)
        self.spec = pytree.tree_structure(batch)
        own = {id(p): name for name, p in module.named_parameters(remove_duplicate=False)}
        self.names = [own[id(p)] for p in self.layout.tensors]
        self.fallback_ops = ["every op, through autograd"]
        with _Watch() as seen, torch.no_grad(), _same_random_numbers(), _kept_buffers(module):
            module(batch)
        if bad := seen.names & _WRONG:
            raise UnsupportedOpError(
                f"the model does not export and uses {sorted(bad)}, whose second derivative is wrong in torch: "
                "remove the weight normalisation (torch.nn.utils.parametrize.remove_parametrizations) or the "
                "construct that stops the export."
            )

    def forward(self, module: nn.Module, batch_leaves: Iterable[Any], *, update_buffers: bool = False) -> Tensor:
        """Run the loss and its gradient at the parameters' present values; see ``rop.Program.forward``."""
        self.batch = pytree.tree_unflatten(list(batch_leaves), self.spec)
        self.random = torch.get_rng_state()
        tensors = self.layout.tensors
        wanted = [p.requires_grad for p in tensors]
        for p in tensors:
            p.requires_grad_(True)
        try:
            with (
                torch.enable_grad(),
                _kept_buffers(module, keep=not update_buffers),
                sdpa_kernel(SDPBackend.MATH),
            ):
                loss: Tensor = module(self.batch)[0]
                parts = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
        finally:
            for p, flag in zip(tensors, wanted, strict=True):
                p.requires_grad_(flag)
        # A part without a graph is constant in the parameters: its derivative is zero.
        self.parts = [None if g is None or not g.requires_grad else g for g in parts]
        self._gradient = self._flat([None if g is None else g.detach() for g in parts])
        return loss.detach()

    def _flat(self, parts: Sequence[Tensor | None]) -> Tensor:
        filled = [torch.zeros_like(p) if g is None else g for g, p in zip(parts, self.layout.tensors, strict=True)]
        return torch.cat([t.reshape(-1) for t in filled]).to(self.layout.dtype)

    def backward(self) -> None:
        """Nothing: ``forward`` has done it."""

    def gradient(self) -> Tensor:
        """Return the gradient ``[n]`` of the last ``forward``."""
        return self._gradient

    def hvp(self, block: Tensor) -> Tensor:
        """Multiply the Hessian with k vectors: ``[k, n] -> [k, n]``."""
        return torch.stack([self._hessian_column(list(v)) for v in zip(*self.layout.views(block), strict=True)])

    def quadratic_form(self, block: Tensor, *, gauss_newton: bool = False) -> Tensor:
        """Return ``v'Av`` for k vectors ``[k, n]``, from full products; ``[k]`` float64."""
        products = self.ggn(block) if gauss_newton else self.hvp(block)
        return torch.linalg.vecdot(products.double(), block.double())

    def _hessian_column(self, v: list[Tensor]) -> Tensor:
        pairs = [(g, t.to(g.dtype)) for g, t in zip(self.parts, v, strict=True) if g is not None]
        if not pairs:
            return torch.zeros(self.layout.n, dtype=self.layout.dtype, device=self.layout.device)
        gradients, weights = zip(*pairs, strict=True)
        tensors = self.layout.tensors
        try:
            product = torch.autograd.grad(gradients, tensors, weights, retain_graph=True, allow_unused=True)
        except (RuntimeError, NotImplementedError) as error:
            raise UnsupportedOpError(
                f"the model does not export, and autograd cannot differentiate it twice: {str(error).splitlines()[0]}"
            ) from error
        return self._flat(product)

    def ggn(self, block: Tensor) -> Tensor:
        """Multiply the generalised Gauss-Newton matrix with k vectors: ``[k, n] -> [k, n]``."""
        with _same_random_numbers(self.random), _kept_buffers(self.module), sdpa_kernel(SDPBackend.MATH):
            return torch.stack([self._ggn_column(list(v)) for v in zip(*self.layout.views(block), strict=True)])

    def _ggn_column(self, v: list[Tensor]) -> Tensor:
        module, structure = self.module, None

        def outputs(params: dict[str, Tensor]) -> list[Tensor]:
            nonlocal structure
            torch.set_rng_state(self.random)
            structure = functional_call(_OutputOf(module), {f"of.{k}": p for k, p in params.items()}, (self.batch,))
            return tensors_of(structure)

        primals = {name: p.detach() for name, p in zip(self.names, self.layout.tensors, strict=True)}
        tangents = {name: t.to(primals[name].dtype) for name, t in zip(self.names, v, strict=True)}
        values, pull = vjp(outputs, primals)  # type: ignore[misc]
        along = jvp(outputs, (primals,), (tangents,))[1]
        with torch.enable_grad():
            points = [z.detach().requires_grad_() for z in values]
            rest = iter(points)
            output = pytree.tree_map(lambda t: next(rest) if isinstance(t, Tensor) else t, structure)
            loss = module.loss(output, self.batch)  # type: ignore[operator]
            slopes = torch.autograd.grad(loss, points, create_graph=True, materialize_grads=True)
            inner = sum((s * d).sum() for s, d in zip(slopes, along, strict=True))
            curved = torch.autograd.grad(inner, points, materialize_grads=True)
        product = pull(list(curved))[0]
        return self._flat([product[name] for name in self.names])


class _OutputOf(nn.Module):
    """A ``LossModule`` whose forward is the model alone."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = of

    def forward(self, batch: Any) -> Any:
        return self.of.output(batch)  # type: ignore[operator]


class _Watch(TorchDispatchMode):
    """Records the names of the ATen ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class _same_random_numbers:
    """Run with a given generator state (default: the present one), and put the generator back afterwards."""

    def __init__(self, state: Tensor | None = None) -> None:
        self.state = state

    def __enter__(self) -> None:
        self.before = torch.get_rng_state()
        if self.state is not None:
            torch.set_rng_state(self.state)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self.before)


class _kept_buffers:
    """Restore the module's buffers afterwards."""

    def __init__(self, module: nn.Module, *, keep: bool = True) -> None:
        self.buffers = list(module.buffers()) if keep else []

    def __enter__(self) -> None:
        self.copies = [b.clone() for b in self.buffers]

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for b, copy in zip(self.buffers, self.copies, strict=True):
                b.copy_(copy)
