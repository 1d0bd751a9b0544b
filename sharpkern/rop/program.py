"""The four sweeps over an exported loss: forward, backward, tangent, backward tangent (Pearlmutter 1994).

The first two run once per parameter value and are the training step's own forward and backward. The last two run once
per block of k vectors and give the Hessian-vector products; they touch nothing but what the rules saved.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from . import liveness
from .export import Graph
from .layout import Layout
from .rules.fallback import Fallback
from .rules.head import fuse_head
from .step import NOTHING, Step, step_of
from .sweeps import run_backward, run_forward, run_gradient, run_reverse, run_tangent


class Program:
    """An exported loss that can be run forward, backward, and along tangents.

    Args:
        graph: from ``export``.
        params: name -> parameter, the flat order of vectors; gradients flow to these only.
        keep_outputs: keep the model's outputs apart from the loss, as ``ggn`` needs it.
    """

    replayable = True  # the sweeps make the same calls each time

    def __init__(self, graph: Graph, params: Mapping[str, Tensor], *, keep_outputs: bool = True) -> None:
        self.graph = graph
        self._made_from = dict(params), keep_outputs
        self.layout = Layout(params)
        self.steps: list[Step] = []
        self._build(graph)
        # A fused head leaves no slot for the logits, at which ``ggn`` would split the program.
        if not keep_outputs:
            self.output_slots.clear()
            self.steps = fuse_head(self.steps, self.loss_slot, self._shapes)
        self._mark_live()

    def anew(self) -> Program:
        """Return a program of the same graph that has run nothing."""
        params, keep_outputs = self._made_from
        return type(self)(self.graph, params, keep_outputs=keep_outputs)

    # -- building -----------------------------------------------------------------------------------------------

    def _build(self, graph: Graph) -> None:
        slot_of: dict[str, Any] = {}
        self.size = 0
        by_tensor: dict[int, int] = {}
        for node in graph.nodes:
            if node.op == "placeholder" or node.op == "get_attr":
                tensor = graph.parameters.get(node.name)
                if tensor is not None and id(tensor) in by_tensor:  # tied: one tensor, one slot
                    slot_of[node.name] = by_tensor[id(tensor)]
                    continue
                slot_of[node.name] = self._new_slot()
                if tensor is not None:
                    by_tensor[id(tensor)] = slot_of[node.name]
            # An op with several results has a slot for each, so that picking one of them is no step of its own.
            elif node.op == "call_function" and node.target is operator.getitem:
                source: Any = node.args[0]
                slot_of[node.name] = slot_of[source.name][node.args[1]]
            elif node.op == "call_function":
                value = node.meta["val"]
                many = isinstance(value, tuple | list)
                slots = [self._new_slot() for _ in value] if many else [self._new_slot()]
                self.steps.append(step_of(node, slot_of, slots))
                self.steps[-1].many = many
                slot_of[node.name] = slots if many else slots[0]
        # The exported module's parameters may be more than those of the layout (a user may ask for some of them only):
        # all are read, and the others are constants to every derivative. One of the layout that the program lacks has
        # no slot.
        self._params = [(by_tensor[id(t)], t) for t in _unique(graph.parameters.values())]
        self.param_slots = [by_tensor.get(id(t), NOTHING) for t in self.layout.tensors]
        self._buffers = [(slot_of[name], target) for name, target in graph.buffers.items()]
        self._constants = [(slot_of[name], value) for name, value in graph.constants.items()]
        self._user = [None if name is None else slot_of[name] for name in graph.user_inputs]
        self._mutations = [(target, slot_of[node.name]) for target, node in graph.mutations.items()]
        self.loss_slot: int = slot_of[graph.loss.name]
        self.output_slots: list[int] = [slot_of[node.name] for node in graph.outputs]
        self._floating = _floating_slots(graph.nodes, slot_of)
        self._shapes: dict[int, tuple[int, ...]] = {
            slot_of[node.name]: tuple(node.meta["val"].shape)
            for node in graph.nodes
            if isinstance(node.meta.get("val"), Tensor) and node.name in slot_of
        }

    def _new_slot(self) -> int:
        self.size += 1
        return self.size - 1

    def _mark_live(self) -> None:
        """Give a rule to each step on a path from a parameter to the loss; find the last use of every value."""
        self.live = liveness.live_steps(self.steps, self.param_slots, self.loss_slot, self._floating)
        self.fallback_ops = sorted({str(step.op) for step in self.live if isinstance(step.rule, Fallback)})
        last = self.live[-1].rule if self.live and self.live[-1].outputs == [self.loss_slot] else None
        self._ends_in_final = last is not None and last.can_end_program
        # The loss's own tangent is then needed by nobody, and the tangent of its cotangent is zero: both are left out.
        if last is not None:
            last.ends_program = last.can_end_program
        liveness.mark_last_uses(self.steps, {self.loss_slot, *self.output_slots, *(s for _, s in self._mutations)})
        self._direct = liveness.used_once(self.live, self.param_slots)
        self.model_steps = liveness.steps_before(self.live, self.output_slots)

    def _direct_to(self, out: Tensor | None, linear_steps: frozenset[str] = frozenset()) -> list[Tensor]:
        """Let rules write to out, ``[k, n]``, but not those of the steps given; return its parts by parameter."""
        parts = [] if out is None else list(self.layout.views(out))
        for index, step, position in self._direct:
            assert step.rule is not None
            step.rule.write_to(position, parts[index] if parts and step.name not in linear_steps else None)
        return parts

    # -- primal sweeps ------------------------------------------------------------------------------------------

    def forward(self, module: torch.nn.Module, batch_leaves: Iterable[Any], *, update_buffers: bool = False) -> Tensor:
        """Run the loss at the parameters' present values and save what the other sweeps need.

        Args:
            module: holds the buffers; written only with ``update_buffers``.
            batch_leaves: the batch, flattened as at export.
            update_buffers: write the buffers that the forward pass changes (batch-norm statistics).

        Returns:
            The loss, 0-d, detached.
        """
        with torch.no_grad():
            values = self._start_values(module, batch_leaves)
            run_forward(self.steps, values)
            # Kept and not written: whether they are is the caller's choice at each call, which a recording of this
            # sweep could not make.
            self._new_buffers = [(target, values[slot]) for target, slot in self._mutations]
            if update_buffers:
                self.update_buffers(module)
            # A copy: the result may be a view of what a rule has saved, and belongs to the caller.
            loss: Tensor = values[self.loss_slot].clone()
        return loss

    def _start_values(self, module: torch.nn.Module, batch_leaves: Iterable[Any]) -> list[Any]:
        """Fill the slots of parameters, buffers, constants and the batch."""
        values: list[Any] = [None] * self.size
        for slot, tensor in self._params:
            # Detached: the fallback enables gradients, and a parameter outside the layout would become part of its
            # graphs.
            values[slot] = tensor.detach()
        for slot, target in self._buffers:
            values[slot] = module.get_buffer(target)
        for slot, value in self._constants:
            values[slot] = value
        for slot_or_none, leaf in zip(self._user, batch_leaves, strict=True):
            if slot_or_none is not None:
                values[slot_or_none] = leaf.detach()
        return values

    def new_buffers(self) -> dict[str, Tensor]:
        """Return the buffers that the last ``forward`` changes, by qualified name."""
        return dict(self._new_buffers)

    def update_buffers(self, module: torch.nn.Module) -> None:
        """Write the buffers that the last ``forward`` changed."""
        with torch.no_grad():
            for target, value in self._new_buffers:
                module.get_buffer(target).copy_(value)

    def backward(self) -> None:
        """Sweep from the loss to where the parameters enter; save what products and ``gradient`` need."""
        with torch.no_grad():
            cotangents = self._empty_slots()
            cotangents[self.loss_slot] = self.empty_loss()[None].fill_(1)
            run_backward(self.live, cotangents)

    def _empty_slots(self) -> list[Any]:
        # One more than there are slots: NOTHING is the index -1, so that its entry is the last one and stays None.
        return [None] * (self.size + 1)

    def gradient(self, out: Tensor) -> None:
        """Write the gradient ``[1, n]``, after ``backward``."""
        with torch.no_grad():
            cotangents = self._empty_slots()
            parts = self._direct_to(out)
            run_gradient(self.live, cotangents, set())
            self._collect(cotangents, parts)

    @property
    def activation_bytes(self) -> int:
        """Size of all results on a path from a parameter to the loss."""
        sizes = self.slot_bytes()
        return sum(sizes.get(slot, 0) for step in self.live for slot in step.outputs if slot in self._floating)

    def slot_bytes(self) -> dict[int, int]:
        """Return the size of each slot's tensor, as if all had the parameters' dtype."""
        return {slot: math.prod(shape) * self.layout.dtype.itemsize for slot, shape in self._shapes.items()}

    def empty_loss(self) -> Tensor:
        """Return memory for the loss, 0-d."""
        return torch.empty((), dtype=self.graph.loss.meta["val"].dtype, device=self.layout.device)

    # -- tangent sweeps -----------------------------------------------------------------------------------------

    def hvp(self, block: Tensor, out: Tensor) -> None:
        """Multiply the Hessian with k vectors: ``[k, n]`` to out ``[k, n]``, after ``backward``."""
        with torch.no_grad():
            self._tangent(block, out)
            self._reverse(frozenset(), out)

    def ggn(self, block: Tensor, out: Tensor) -> None:
        """Multiply the generalised Gauss-Newton matrix J' (d2 loss / d output2) J with k vectors ``[k, n]``, into out.

        The tangent sweep, then the loss's own second derivative, then the linear part of the model's backward sweep
        (Schraudolph 2002).
        """
        with torch.no_grad():
            linear_steps = frozenset(self.model_steps)
            # The model's own steps must not begin a part of d(gW) from dx and g: their second order does not belong to
            # this matrix. The loss's steps may.
            self._tangent(block, out, linear_steps)
            self._reverse(linear_steps, out)

    def quadratic_form(self, block: Tensor, out: Tensor, *, gauss_newton: bool = False) -> None:
        """Write ``v'Hv`` of k vectors ``[k, n]`` to out ``[k]``, float64: the tangent sweep, one contraction per op.

        The generalised Gauss-Newton matrix leaves out the second order of the model's own ops.
        """
        with torch.no_grad():
            # Without a result there is no reverse sweep, and nobody would read what a rule begins.
            self._tangent(block, None, frozenset(self.model_steps if gauss_newton else ()), out.zero_())

    def _tangent(
        self,
        block: Tensor,
        out: Tensor | None,
        linear_steps: frozenset[str] = frozenset(),
        second: Tensor | None = None,
    ) -> None:
        """Sweep from the parameters to the loss.

        Args:
            block: the vectors.
            out: of the product, whose parts the rules may begin.
            linear_steps: those whose second order is left out.
            second: where to add the second order of all others.
        """
        self._direct_to(out, linear_steps)
        run_tangent(self.live, self._tangents_of(block), linear_steps, second)

    def _tangents_of(self, block: Tensor) -> list[Any]:
        """Fill the slots of the parameters with their parts of the vectors."""
        tangents = self._empty_slots()
        for slot, view, tensor in zip(self.param_slots, self.layout.views(block), self.layout.tensors, strict=True):
            if slot != NOTHING:
                # Flat vectors are float32 at least, also where parameters are 16-bit floats.
                tangents[slot] = view.to(tensor.dtype)
        return tangents

    def _reverse(self, linear_steps: frozenset[str], out: Tensor) -> None:
        """Sweep from the loss to the parameters along the last tangents, into out.

        The steps named contribute only the part that is linear in the cotangent's tangent.
        """
        cotangents = self._seeded(out.shape[0])
        parts = self._direct_to(out)
        run_reverse(self.live, cotangents, set(), linear_steps)
        self._collect(cotangents, parts)

    def _seeded(self, k: int) -> list[Any]:
        """Fill the slot of the loss for a reverse sweep of k vectors."""
        cotangents = self._empty_slots()
        # The loss's cotangent is the constant 1, so its tangent is zero; a rule that can end a program knows by itself.
        if not self._ends_in_final:
            cotangents[self.loss_slot] = self.empty_loss().new_zeros(k)
        return cotangents

    def _collect(self, cotangents: list[Any], parts: list[Tensor]) -> None:
        """Copy what rules have not written to its place."""
        # Rules let go of the result's memory, which is the caller's: nothing later may write there.
        self._direct_to(None)
        for slot, part in zip(self.param_slots, parts, strict=True):
            value = cotangents[slot]
            if value is None:
                # The result was allocated and not cleared; the loss does not depend on this parameter.
                part.zero_()
            # Identity is enough: a rule that has written to its place returns the very tensor that it was given.
            elif value is not part:
                part.copy_(value)


def _unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


def _floating_slots(nodes: list[fx.Node], slot_of: Mapping[str, Any]) -> set[int]:
    # But for empty ones, of which no derivative is anything but zero: no rule has to know what it does without numbers.
    floating = set()
    for node in nodes:
        value = node.meta.get("val")
        entries = (
            zip(slot_of[node.name], value, strict=True)
            if isinstance(value, tuple | list) and node.op == "call_function"
            else None
        )
        for slot, val in entries or [(slot_of.get(node.name), value)]:
            if isinstance(val, Tensor) and val.dtype.is_floating_point and 0 not in val.shape and isinstance(slot, int):
                floating.add(slot)
    return floating
