"""One eager forward and backward pass of the user's own model: what a program must reproduce."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from ..rop.sandbox import requiring_grad, without_trace
from .watch import Kept, Snapshot, changes

_SAME = 1e3  # units of rounding of the loss within which two passes are taken to be the same


@dataclass(frozen=True)
class EagerPass:
    """Loss and gradients of an eager forward and backward pass.

    Attributes:
        loss: 0-d, detached.
        gradients: one for each parameter, None where the loss does not depend on it.
        buffers: name -> value that the forward pass left, for the module's own buffers.
        unseen: what the pass did that an export does not see, one phrase each: functions with a backward of their own,
            hooks on gradients, numbers drawn from Python's or NumPy's generator, Python values that it changes.
        moves: it changes Python values, or tensors that are no buffers, at every pass.
        draws: torch's random state moved: the loss has dropout or other noise.
    """

    loss: Tensor
    gradients: list[Tensor | None]
    buffers: dict[str, Tensor]
    unseen: list[str]
    draws: bool
    moves: bool = False


def run_eagerly(
    module: nn.Module, batch: Any, params: Mapping[str, Tensor], others: Sequence[nn.Module] = ()
) -> EagerPass:
    """Run ``module(batch)`` and its gradient, leaving buffers, random states, ``p.grad`` and Python values as they are.

    Values that the first of several passes leaves and the next ones do not change, such as a table made when it is
    needed, stay.

    Args:
        module: a ``LossModule`` or ``FunctionalLoss``.
        batch: as the module takes it.
        params: name -> parameter.
        others: modules that the loss reaches without containing them, such as a teacher in a closure.

    Raises:
        ValueError: the loss is no floating scalar, or does not depend on the parameters.
        Exception: whatever the user's own code raises, as it is.
    """
    tensors = list(params.values())
    devices = {t.device for t in tensors}
    kept = Kept(module)
    before = _python_random_states()
    with without_trace([module, *others], devices), requiring_grad(tensors), _gradient_hooks() as hooks:
        states = _random_states(devices)
        loss = check_loss(module(batch)[0])
        # Told by the state and not by the modules: a user's own code may draw noise too.
        draws = any(not torch.equal(a, b) for a, b in zip(states, _random_states(devices), strict=True))
        unseen = [f"the autograd.Function {name}" for name in sorted(python_functions(loss))]
        unseen += [f"a gradient hook on {place}" for place in hooks]
        unseen += [f"a gradient hook on {name}" for name, p in params.items() if p._backward_hooks]
        unseen += _drawn(before, _python_random_states())
        # Not ``backward()``, which would add to ``p.grad``. Unused parameters have no gradient, which is no error in
        # eager training.
        gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
        # An embedding with ``sparse=True`` has a sparse one.
        dense: list[Tensor | None] = [g if g is None or g.layout is torch.strided else g.to_dense() for g in gradients]
        # Inside the block, after which the module has its old buffers back.
        buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
    moved = _moved(module, batch, kept, loss.detach(), others, devices)
    unseen += [f"a Python value that its own forward pass changes ({what})" for what in moved[:1]]
    return EagerPass(loss.detach(), dense, buffers, list(dict.fromkeys(unseen)), draws, bool(moved))


def _moved(
    module: nn.Module,
    batch: Any,
    kept: Kept,
    loss: Tensor,
    others: Sequence[nn.Module],
    devices: set[torch.device],
) -> list[str]:
    """Name what every pass changes, and put it back; leave alone what only the first one does."""
    first = Snapshot(module)
    written, changed = kept.written(), list(changes(kept.snapshot.values, first.values))
    if not written and not changed:
        return []
    if not written:
        # Once more from the same random state. A table is made once; a counter moves again; and a tensor that this pass
        # has only left behind, such as an attention map, is another one but plays no part.
        with without_trace([module, *others], devices):
            again = module(batch)[0].detach()
        second = Snapshot(module)
        written = [n for n in changes(first.values, second.values) if not _is_tensor(n, first, second)]
        if float((again - loss).abs()) > _SAME * torch.finfo(loss.dtype).eps * float(loss.abs()):
            written = written or changed
        if not written:
            first.put_back()
            return []
    kept.put_back()
    return written


def _is_tensor(name: str, first: Snapshot, second: Snapshot) -> bool:
    # Also one more in a list that a hook fills.
    return all(isinstance(s.values[name], tuple) for s in (first, second) if name in s.values)


def run_forward(module: nn.Module, batch: Any, params: Mapping[str, Tensor], others: Sequence[nn.Module] = ()) -> None:
    """Run ``module(batch)`` alone, for what its forward hooks keep; arguments and traces left as in ``run_eagerly``."""
    tensors = list(params.values())
    with ExitStack() as stack:
        stack.enter_context(without_trace([module, *others], {t.device for t in tensors}))
        # With gradients, for a hook may call ``retain_grad``. But a tensor that it keeps would hold the graph, and this
        # all activations: the graph saves none.
        stack.enter_context(requiring_grad(tensors))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_forget, _forget))
        module(batch)


def _forget(_: Any) -> Any:
    return None


def check_loss(loss: Any) -> Tensor:
    """Return the loss if it is a scalar that can be differentiated.

    Raises:
        ValueError: it is none, and what to return instead.
    """
    # The forms that losses of other libraries have, each with its own remedy.
    if isinstance(loss, Mapping | tuple | list):
        kind = f"a {type(loss).__name__}" + (f" with {sorted(map(str, loss))}" if isinstance(loss, Mapping) else "")
        raise ValueError(f"loss_fn must return one scalar tensor, got {kind}: return the entry to differentiate.")
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"loss_fn must return a scalar tensor that depends on the model, got a {type(loss).__name__}: return the "
            "tensor itself, without .item() or float()."
        )
    if loss.ndim != 0 or not loss.dtype.is_floating_point:
        raise ValueError(
            f"loss_fn must return a floating scalar, got shape {list(loss.shape)} and {loss.dtype}: "
            "reduce it, for example with .mean()."
        )
    if not loss.requires_grad:
        raise ValueError(
            "loss_fn must return a scalar tensor that depends on the model; got a constant: the selected parameters "
            "do not reach it (a .detach(), a no_grad block, or tensors made anew?)."
        )
    return loss


def python_functions(loss: Tensor) -> set[str]:
    """Name the ``autograd.Function`` classes in a loss's graph: their backward need not be the forward's derivative."""
    names: set[str] = set()
    seen: set[Any] = set()
    # A list and not recursion: graphs of deep models are deeper than Python's stack.
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # The base class of the nodes that torch makes for Python functions.
        if isinstance(node, BackwardCFunction):
            names.add(type(node).__name__.removesuffix("Backward"))
        stack += [following for following, _ in node.next_functions]
    return names


@contextmanager
def _gradient_hooks() -> Iterator[list[str]]:
    """Collect where tensors get hooks while the forward pass runs."""
    found: list[str] = []
    # Patched while the model runs: afterwards nobody holds the intermediate tensors on which hooks are listed.
    original = torch.Tensor.register_hook

    def register(tensor: Tensor, hook: Any) -> Any:
        found.append(f"a tensor of shape {list(tensor.shape)}")
        return original(tensor, hook)

    torch.Tensor.register_hook = register  # type: ignore[method-assign]
    try:
        yield found
    finally:
        torch.Tensor.register_hook = original  # type: ignore[method-assign]


def _random_states(devices: set[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda")]


def _python_random_states() -> tuple[Any, Any]:
    kind, keys, position, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  (the generator that user code draws from)
    return random.getstate(), (kind, keys.tobytes(), position, *rest)  # type: ignore[union-attr]


def _drawn(before: tuple[Any, Any], after: tuple[Any, Any]) -> list[str]:
    generators = ("Python's random module", "NumPy's random module")
    return [f"numbers drawn from {g}" for g, a, b in zip(generators, before, after, strict=True) if a != b]
