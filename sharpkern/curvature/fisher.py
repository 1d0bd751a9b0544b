"""The empirical Fisher matrix as an operator, by the sweeps of a Gauss-Newton matrix: no gradient is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..rop.export import tensors_of
from ..rop.sandbox import random_state, without_trace
from .base import ParameterOperator
from .losses import LossModule, NonFiniteLossError, check_recordable
from .operators import GGNOperator
from .wrappers import check_one_process, unwrapped


class EmpiricalFisherOperator(ParameterOperator):
    """The empirical Fisher matrix (1/B) sum g_i g_i', g_i the gradient of ``loss_fn`` on example i of B alone.

    With z_i the outputs for example i, J_i their derivative and s_i = d loss_i / d z_i, g_i is J_i' s_i. So the matrix
    is the Gauss-Newton matrix of (1/2B) sum (s_i . z_i)^2 with s_i held fixed, and products are blocks of its sweeps.
    An example is a row of the batch: of a language model it is a sequence, of which ``loss_fn`` takes the mean or sum.

    Args:
        model: a module that computes each example by itself and without random numbers: batch norm and dropout in
            evaluation mode.
        loss_fn: as for ``HessianOperator``, on batches of one example too.
        batch: as for ``HessianOperator``; every tensor has one row per example.
        params: which parameters, as for ``HessianOperator``.
        verify: compare the exported program with the eager model; see ``HessianOperator``.

    Attributes:
        loss: float, the examples' mean loss at the last ``refresh``.
        n, shape, dtype, device, params: as of ``HessianOperator``.

    Raises:
        ValueError: the examples of a batch are not apart (batch norm in training mode, dropout, tensors without one row
            per example); ``loss_fn`` uses a loss that the model has computed; as ``GGNOperator``.
        NonFiniteLossError: the loss of an example is NaN or infinite.

    Cost: a forward pass and B losses of one example per ``refresh``; a product is a Gauss-Newton product.
    Source: Kunstner, Balles and Hennig, Limitations of the empirical Fisher approximation (2019), equation 3.

    >>> model, x = nn.Linear(2, 1, bias=False), torch.randn(8, 2)
    >>> F = EmpiricalFisherOperator(model, nn.MSELoss(), (x, torch.zeros(8, 1)))
    >>> g = 2 * model(x).detach() * x
    >>> torch.allclose(F @ torch.eye(2), g.T @ g / 8, atol=1e-5)
    True
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        batch: Any,
        *,
        params: Mapping[str, Tensor] | Iterable[str] | Iterable[Tensor] | None = None,
        verify: bool = True,
    ) -> None:
        if model is None:
            raise ValueError("EmpiricalFisherOperator needs a model: a functional loss has no model output.")
        check_one_process(model)
        self._module = LossModule(unwrapped(model), loss_fn)
        self.batch = self._module.accepted(batch)
        self._ggn = GGNOperator(model, _half_mean_square, self._with_slopes(), params=params, verify=verify)
        self._follow()

    def refresh(self, batch: Any = None) -> None:
        """Take the parameters' present values, and another batch if one is given.

        Raises:
            ValueError, NonFiniteLossError: as for a new operator.
        """
        self.batch = self.batch if batch is None else self._module.accepted(batch)
        self._ggn.refresh(self._with_slopes())
        self._follow()

    def apply_rows(self, block: Tensor) -> Tensor:
        return self._ggn.apply_rows(block)

    def form_rows(self, block: Tensor) -> Tensor:
        return self._ggn.form_rows(block)

    def _follow(self) -> None:
        ggn = self._ggn
        self.params, self.n, self.dtype, self.device = ggn.params, ggn.n, ggn.dtype, ggn.device

    def _with_slopes(self) -> tuple[Any, Any]:
        """Return the model's inputs; and s_i of the outputs that the loss uses, place -> ``[B, ...]``, with targets."""
        model, batch = self._module.model, self.batch
        length = _examples(batch)
        check_recordable(batch)
        _check_batch_norm(model)
        with without_trace([self._module], {p.device for p in model.parameters()}):
            output = self._output_of_rows(batch, length)
            with torch.enable_grad():
                self._module.check_outputs(batch)
        # A dict by place: which outputs the loss uses is then part of the batch's structure, and another set of them
        # gets another program. Losses one by one, because a mean over the batch would hide their weights.
        slopes: dict[str, list[Tensor]] = {}
        total = 0.0
        for i in range(length):
            loss, parts = self._slopes_of(_row(output, i, length), _row(batch, i, length))
            total += loss
            for place, part in parts.items():
                slopes.setdefault(str(place), []).append(part)
        if not math.isfinite(total):
            raise NonFiniteLossError(total / length)
        self.loss = total / length
        # The targets are in the slopes already; they go along so that a change of them in place is noticed.
        inputs, targets = (batch, None) if isinstance(batch, Mapping) else batch
        return inputs, ({place: torch.cat(parts) for place, parts in slopes.items()}, targets)

    def _output_of_rows(self, batch: Any, length: int) -> Any:
        """Run the model; compare its first row with what it makes of the first example alone."""
        with torch.enable_grad():  # a forward pass may put hooks on its tensors
            # The states tell for certain what a comparison of two outputs would show most of the time only.
            cpu, cuda = random_state()
            output = self._module.output(batch)
            drawn_cpu, drawn_cuda = random_state()
            if not torch.equal(cpu, drawn_cpu) or any(not torch.equal(cuda[i], drawn_cuda[i]) for i in cuda):
                raise ValueError(
                    "the model draws random numbers, so the examples' gradients differ from pass to pass: call "
                    "model.eval(), or set its dropout to 0."
                )
            alone = self._module.output(_row(batch, 0, length))
        for all_rows, one in zip(map(Tensor.detach, tensors_of(output)), tensors_of(alone), strict=True):
            if all_rows.is_floating_point() and all_rows.ndim and not _close(all_rows[: len(one)], one.detach()):
                raise ValueError(
                    f"the model gives the first example another output when it is alone, of shape {list(one.shape)}: "
                    "examples that depend on each other, as in batch norm in training, have no gradients of their own."
                )
        return output

    def _slopes_of(self, output: Any, batch: Any) -> tuple[float, dict[int, Tensor]]:
        """Return the loss of one example, and its derivative by each output that it uses."""
        tensors = tensors_of(output)
        leaves = {i: t.detach().requires_grad_() for i, t in enumerate(tensors) if t.is_floating_point()}
        with torch.enable_grad():
            # Copies of the leaves, which a loss may change in place.
            copies = {id(tensors[i]): leaf.clone() for i, leaf in leaves.items()}
            apart = pytree.tree_map(lambda t: copies.get(id(t), t), output)
            loss = self._module.loss(apart, batch)
        if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
            raise ValueError("loss_fn must return a scalar tensor that depends on the model's outputs.")
        parts = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        used = {i: s for i, s in zip(leaves, parts, strict=True) if s is not None}
        if shared := [list(tensors[i].shape) for i, s in used.items() if s.ndim == 0]:
            raise ValueError(f"loss_fn uses an output of shape {shared[0]}, which has no row for each example.")
        return float(loss.detach()), used


def _half_mean_square(output: Any, slopes_and_targets: tuple[Mapping[str, Tensor], Any]) -> Tensor:
    """Return (1/2B) sum_i (s_i . z_i)^2, whose second derivative by z is that of the empirical Fisher matrix."""
    tensors, slopes = tensors_of(output), slopes_and_targets[0]
    # Entries of one example add up before the square: its gradient runs through all outputs together.
    along = sum(_inner(tensors[int(place)], s) for place, s in slopes.items())
    assert isinstance(along, Tensor)
    return 0.5 * along.square().mean()


def _inner(z: Tensor, s: Tensor) -> Tensor:
    # Half precision would lose what a sum over a vocabulary cancels.
    dtype = torch.promote_types(z.dtype, torch.float32)
    return (z.to(dtype) * s.to(dtype)).flatten(1).sum(1) if z.ndim > 1 else z.to(dtype) * s.to(dtype)


def _examples(batch: Any) -> int:
    """Return the number of rows that every tensor of a batch has."""
    shapes = [list(t.shape) for t in pytree.tree_leaves(batch) if isinstance(t, Tensor)]
    lengths = {shape[0] if shape else 0 for shape in shapes}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"every tensor of the batch must have one row for each example, got shapes {shapes}.")
    return lengths.pop()


def _row(nest: Any, i: int, length: int) -> Any:
    """Return example i of a batch or an output as a batch of one; scalars stay as they are."""
    for t in tensors_of(nest):
        if t.ndim and len(t) != length:
            raise ValueError(
                f"the model has an output of shape {list(t.shape)} for {length} examples: the first dimension must "
                "count examples, so that each has a gradient of its own."
            )
    return pytree.tree_map(lambda t: t[i : i + 1] if isinstance(t, Tensor) and t.ndim else t, nest)


def _close(a: Tensor, b: Tensor) -> bool:
    # Half of the digits: sums over more rows round differently, but another mean or mask changes leading ones.
    tolerance = math.sqrt(torch.finfo(a.dtype).eps)
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * float(a.abs().max())


def _check_batch_norm(model: nn.Module) -> None:
    # By class first, which can name the module; whatever else mixes examples shows in the first example's output.
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{name!r} ({type(module).__name__}) normalises over the batch, so examples have no gradients of their "
                "own: call model.eval() to use its running statistics, or replace it."
            )
