"""Model and loss as one module, the forms of batch that are accepted, and the error of a loss that is not finite."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..rop.export import tensors_of

_LEAF = pytree.tree_structure(0)


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite.

    Attributes:
        loss: the value.
        step: of a training run, from 1; None outside training.
    """

    def __init__(self, loss: float, step: int | None = None) -> None:
        self.loss, self.step = loss, step
        where = "" if step is None else f" at step {step}"
        super().__init__(
            f"the loss is {loss}{where}: the learning rate may be too high, or the batch holds bad values."
        )


def check_recordable(batch: Any) -> None:
    """Check that torch can record gradients of a batch's loss; a caller's ``no_grad`` is no obstacle.

    Raises:
        RuntimeError: within ``torch.inference_mode``, or a tensor of the batch was made there.
    """
    within = torch.is_inference_mode_enabled()
    if within or any(t.is_inference() for t in pytree.tree_leaves(batch) if isinstance(t, Tensor)):
        raise RuntimeError(
            f"{'this call is within' if within else 'the batch was made within'} torch.inference_mode, where torch "
            "records no gradients: leave that block (of Lightning's by Trainer(inference_mode=False)), and clone "
            "tensors that were made in it."
        )


class Opened:
    """A mapping whose class pytree does not know, such as ``UserDict``: with it around, its entries can be replaced."""

    def __init__(self, mapping: Any) -> None:
        self.mapping = mapping

    def with_values(self, values: Iterable[Any]) -> Opened:
        """Return a copy of the same class with other values."""
        changed = copy.copy(self.mapping)
        for key, value in zip(self.mapping, values, strict=True):
            changed[key] = value
        return Opened(changed)


pytree.register_pytree_node(
    Opened,
    lambda o: (list(o.mapping.values()), o),
    lambda values, o: o.with_values(values),
)


class LossModule(nn.Module):
    """Model and loss as one module: ``(inputs, targets)`` or a dict batch in, loss and model outputs out.

    Args:
        model: called as ``model(inputs)``, ``model(*inputs)`` for a tuple or list, ``model(**inputs)`` for a dict.
        loss_fn: ``(output, targets) -> scalar``, or ``(output, batch) -> scalar`` for a dict batch.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def accepted(self, batch: Any) -> Any:
        """Return a batch in one of the forms that are understood; other mappings, such as ``UserDict``, as a dict.

        Raises:
            ValueError: it is neither a pair nor a mapping.
        """
        if isinstance(batch, Mapping):
            # Mappings that pytree does not know would be one opaque leaf, whose tensors no export could see.
            return batch if pytree.tree_structure(batch) != _LEAF else dict(batch)
        # Two and no other number: of three, nobody knows which are inputs, and a guess would give a wrong number.
        if isinstance(batch, tuple | list) and len(batch) == 2:
            return batch
        if isinstance(batch, Tensor):
            got = f"a tensor of shape {list(batch.shape)}"
        elif isinstance(batch, tuple | list):
            got = f"a {type(batch).__name__} of {len(batch)}"
        else:
            got = f"a {type(batch).__name__}"
        raise ValueError(
            f"batch must be (inputs, targets) or a dict, got {got}. Several inputs go into a tuple of their own, "
            "((a, b), targets); a model without targets takes (inputs, None)."
        )

    def forward(self, batch: Any) -> tuple[Tensor, list[Tensor]]:
        """Return the scalar loss and every tensor of the model's output."""
        output = self.output(batch)
        return self.loss(output, batch), tensors_of(output)

    def output(self, batch: Any) -> Any:
        """Run the model alone; a mapping that pytree does not know is ``Opened``, which ``loss`` undoes."""
        inputs = batch if isinstance(batch, Mapping) else batch[0]
        if isinstance(inputs, Mapping):
            output = self.model(**inputs)
        else:
            output = self.model(*inputs) if isinstance(inputs, tuple | list) else self.model(inputs)
        unknown = isinstance(output, Mapping) and pytree.tree_structure(output) == _LEAF
        return Opened(output) if unknown else output

    def check_outputs(self, batch: Any) -> None:
        """Check that a generalised Gauss-Newton matrix can be split at the model's output.

        A model may compute a loss of its own beside its outputs, as Hugging Face's do, if ``loss_fn`` does not use it.
        The model runs in the present grad mode. Gradients should be recorded, for a forward pass may put hooks on its
        tensors.

        Raises:
            ValueError: the output holds no tensor that torch's pytree finds, or ``loss_fn`` uses the model's own loss.
        """
        output = self.output(batch)
        tensors = tensors_of(output)
        if not tensors:
            raise ValueError(
                f"GGNOperator finds no tensor in the model's output, a {type(output).__name__}: return a tensor, or a "
                "tuple, list or dict of tensors (or register the class with torch.utils._pytree)."
            )
        # Split there, the loss would be linear in the outputs, and the matrix zero.
        if self._uses_own_loss(output, tensors, batch):
            form = "output['logits']" if isinstance(output, Mapping | Opened) else "output"
            targets = "batch['labels']" if isinstance(batch, Mapping) else "targets"
            second = "batch" if isinstance(batch, Mapping) else "targets"
            raise ValueError(
                "the model computes the loss itself, and loss_fn uses it, so there is no output to split at: compute "
                f"the loss from the outputs, as in loss_fn = lambda output, {second}: F.cross_entropy({form}.flatten("
                f"0, -2), {targets}.flatten()). A causal language model's logits [:, :-1] belong to labels [:, 1:]."
            )

    def _uses_own_loss(self, output: Any, tensors: list[Tensor], batch: Any) -> bool:
        """Ask autograd whether the loss is linear in a scalar output, or reads an entry of the name "loss"."""
        own = _own_loss(output)
        scalars = [t for t in tensors if (t.ndim == 0 or t is own) and t.is_floating_point()]
        if not scalars:
            return False
        leaves = {id(t): t.detach().requires_grad_() for t in tensors if t.is_floating_point()}
        with torch.enable_grad():
            # Copies of the leaves, which a loss may change in place.
            apart = pytree.tree_map(lambda t: leaves[id(t)].clone() if id(t) in leaves else t, output)
            loss = self.loss(apart, batch)
        if not loss.requires_grad:
            return False
        # With every output a leaf, a slope without a graph is constant: a sum of the model's loss and other terms has
        # no curvature by that loss, and all of the model behind it would be left out.
        slopes = torch.autograd.grad(loss, [leaves[id(t)] for t in scalars], create_graph=True, allow_unused=True)
        pairs = zip(scalars, slopes, strict=True)
        return any(s is not None and (t is own or not s.requires_grad) for t, s in pairs)

    def loss(self, output: Any, batch: Any) -> Tensor:
        """Run the loss alone: on (output, targets), or on (output, batch) for a dict batch."""
        output = output.mapping if isinstance(output, Opened) else output
        return self.loss_fn(output, batch if isinstance(batch, Mapping) else batch[1])


def _own_loss(output: Any) -> Any:
    """Return what the model calls its loss, or None."""
    named = output.mapping if isinstance(output, Opened) else output
    return named.get("loss") if isinstance(named, Mapping) else None


class FunctionalLoss(nn.Module):
    """A loss of named parameters and a batch, without a module: ``loss_fn(params, batch)``.

    Args:
        params: name -> tensor, in the flat order of vectors.
        loss_fn: ``(params, batch) -> scalar``.

    Attributes:
        values: parameters that share the memory of the tensors given.
    """

    def __init__(self, params: Mapping[str, Tensor], loss_fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.names = list(params)
        self.given = list(params.values())
        # A ParameterList, because the export and the gate look for parameters in a module.
        self.values = nn.ParameterList(list(params.values()))
        self.loss_fn = loss_fn

    def forward(self, batch: Any) -> tuple[Tensor, list[Tensor]]:
        """Return the scalar loss; there is no model output."""
        return self.loss_fn(dict(zip(self.names, self.values, strict=True)), batch), []

    def accepted(self, batch: Any) -> Any:
        """Return the batch: a functional loss takes what it likes."""
        return batch

    def follow(self) -> None:
        """Share the memory of the tensors given again, where their ``.data`` was assigned anew."""
        for value, tensor in zip(self.values, self.given, strict=True):
            # An assigned ``.data`` gives the user's tensor new memory; a program reads the old one until it is told.
            if value.data_ptr() != tensor.data_ptr():
                value.data = tensor.data
