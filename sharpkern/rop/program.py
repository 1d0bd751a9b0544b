"""The four sweeps over an exported loss: forward, backward, tangent, backward tangent (Pearlmutter 1994).

The first two run once per parameter value and are the training step's own forward and backward. The last two run once
per block of k vectors and give the Hessian-vector products; they touch nothing but what the rules saved.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..flat import Layout
from .export import Graph
from .fallback import Fallback
from .head import fuse_head
from .rule import RULES, Rule
from .step import NOTHING, Step, call, flat_slots, is_slot, step_of

aten = torch.ops.aten

# Ops that no derivative passes, although they give floating tensors: constants, random numbers, steps.
_STOPS = {
    op.default
    for op in (
        aten.detach, aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.rand_like,
        aten.randn_like, aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, aten.bernoulli, aten.sign,
        aten.floor, aten.ceil, aten.round, aten.trunc,
    )
} | {aten.bernoulli.p, aten.round.decimals}  # fmt: skip


class Program:
    """An exported loss that can be run forward, backward, and along tangents.

    Args:
        graph: from ``export``.
        params: name -> parameter, the flat order of vectors; gradients flow to these only.
        keep_outputs: keep the model's outputs apart from the loss, as ``ggn`` needs it.
    """

    def __init__(self, graph: Graph, params: Mapping[str, Tensor], *, keep_outputs: bool = True) -> None:
        self.graph = graph
        self.layout = Layout(params)
        self.steps: list[Step] = []
        self._build(graph)
        if not keep_outputs:
            self.output_slots.clear()
            self.steps = fuse_head(self.steps, self.loss_slot, self._shapes)
        self._mark_live()

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
            elif node.op == "call_function" and node.target is operator.getitem:
                source: Any = node.args[0]
                slot_of[node.name] = slot_of[source.name][node.args[1]]
            elif node.op == "call_function":
                value = node.meta["val"]
                many = isinstance(value, tuple | list)
                slots = [self._new_slot() for _ in value] if many else [self._new_slot()]
                self.steps.append(step_of(node, slot_of, slots))
                slot_of[node.name] = slots if many else slots[0]
        self._params = [(slot, t) for t, slot in ((t, by_tensor[id(t)]) for t in _unique(graph.parameters.values()))]
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
        active = {slot for slot in self.param_slots if slot != NOTHING}
        candidates = []
        for step in self.steps:
            differentiable = RULES[step.op].differentiable if step.op in RULES else None
            outs = [s for i, s in enumerate(step.outputs) if differentiable is None or i in differentiable]
            if step.op not in _STOPS and any(s in active for s in flat_slots(step.inputs)):
                outs = [s for s in outs if s in self._floating]
                active.update(outs)
                if outs:
                    candidates.append(step)
        wanted = {self.loss_slot}
        live = []
        for step in reversed(candidates):
            if wanted.intersection(step.outputs) and active.intersection(step.outputs):
                wanted.update(flat_slots(step.inputs))
                live.append(step)
        self.live = live[::-1]
        for step in self.live:
            step.inputs = [_keep(entry, active) for entry in step.inputs]
            needs = tuple(_needs(entry) for entry in step.inputs)
            cls = RULES.get(step.op)
            step.rule = cls(step.op, needs) if cls else Fallback(step.op, needs, step.kwarg_names)
        self.fallback_ops = sorted({str(step.op) for step in self.live if isinstance(step.rule, Fallback)})
        last = self.live[-1].rule if self.live and self.live[-1].outputs == [self.loss_slot] else None
        self._ends_in_final = last is not None and last.may_be_final
        if last is not None:
            last.final = last.may_be_final
        self._find_last_uses()
        self._find_direct_results()
        model_part = set(self.output_slots)
        self.model_steps = []
        for step in reversed(self.live):
            if model_part.intersection(step.outputs):
                model_part.update(flat_slots(step.inputs))
                self.model_steps.append(step.name)

    def _find_last_uses(self) -> None:
        keep = {self.loss_slot, *self.output_slots, *(slot for _, slot in self._mutations)}
        seen = set(keep)
        for step in reversed(self.steps):
            used = [slot for _, slot in step.refs] + [s for _, slots in step.list_refs for s in slots if is_slot(s)]
            for slot in [*used, *step.outputs]:
                if slot not in seen:
                    seen.add(slot)
                    step.last_use.append(slot)

    def _find_direct_results(self) -> None:
        """Find parameters used once: their rule may write its result into the flat vector itself."""
        uses: dict[int, list[tuple[Rule, int]]] = {}
        for step in self.live:
            assert step.rule is not None
            for position, entry in enumerate(step.inputs):
                for slot in entry if isinstance(entry, list) else [entry]:
                    place = (step.rule, -1 if isinstance(entry, list) else position)
                    uses.setdefault(slot, []).append(place)
        self._direct: list[tuple[int, Rule, int]] = []
        for index, slot in enumerate(self.param_slots):
            places = uses.get(slot, [])
            if slot != NOTHING and len(places) == 1 and places[0][1] >= 0:
                self._direct.append((index, *places[0]))

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
            values: list[Any] = [None] * self.size
            for slot, tensor in self._params:
                values[slot] = tensor.detach()
            for slot, target in self._buffers:
                values[slot] = module.get_buffer(target)
            for slot, value in self._constants:
                values[slot] = value
            for slot_or_none, leaf in zip(self._user, batch_leaves, strict=True):
                if slot_or_none is not None:
                    values[slot_or_none] = leaf.detach()
            for step in self.steps:
                args = step.template.copy()
                for position, slot in step.refs:
                    args[position] = values[slot]
                for position, slots in step.list_refs:
                    args[position] = [values[s] if is_slot(s) else s for s in slots]
                result = step.rule.forward(*args) if step.rule is not None else call(step, args)
                if isinstance(result, tuple | list):
                    for slot, value in zip(step.outputs, result, strict=True):
                        values[slot] = value
                else:
                    values[step.outputs[0]] = result
                for slot in step.last_use:
                    values[slot] = None
            self._new_buffers = [(target, values[slot]) for target, slot in self._mutations]
            if update_buffers:
                self.update_buffers(module)
            loss: Tensor = values[self.loss_slot].clone()
        return loss

    def update_buffers(self, module: torch.nn.Module) -> None:
        """Write the buffers that the last ``forward`` changed."""
        with torch.no_grad():
            for target, value in self._new_buffers:
                module.get_buffer(target).copy_(value)

    def backward(self) -> Tensor:
        """Run the backward sweep of the last ``forward``.

        Returns:
            The gradient ``[n]``.
        """
        with torch.no_grad():
            seed = torch.ones(1, dtype=self._loss_dtype(), device=self.layout.device)
            result = self._reverse(seed, None, 1)
        self.prepared = False
        return result[0]

    def prepare(self) -> None:
        """Let each rule compute what all products at these parameters share; the first product does it by itself."""
        with torch.no_grad():
            for step in self.live:
                assert step.rule is not None
                step.rule.prepare(step.g)
        self.prepared = True

    def _loss_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.graph.loss.meta["val"].dtype
        return dtype

    # -- tangent sweeps -----------------------------------------------------------------------------------------

    def hvp(self, block: Tensor) -> Tensor:
        """Multiply the Hessian with k vectors: ``[k, n] -> [k, n]``, after ``forward`` and ``backward``."""
        if not self.prepared:
            self.prepare()
        with torch.no_grad():
            self._tangent(block)
            return self._reverse(None, frozenset(), block.shape[0])

    def ggn(self, block: Tensor) -> Tensor:
        """Multiply the generalised Gauss-Newton matrix J' (d2 loss / d output2) J with k vectors ``[k, n]``.

        The tangent sweep, then the loss's own second derivative, then the linear part of the model's backward sweep
        (Schraudolph 2002).
        """
        if not self.prepared:
            self.prepare()
        with torch.no_grad():
            self._tangent(block)
            return self._reverse(None, frozenset(self.model_steps), block.shape[0])

    def quadratic_form(self, block: Tensor, *, gauss_newton: bool = False) -> Tensor:
        """Return ``v'Hv`` for k vectors ``[k, n]``: the tangent sweep and one contraction per op; ``[k]`` float64.

        The generalised Gauss-Newton matrix leaves out the second order of the model's own ops.
        """
        if not self.prepared:
            self.prepare()
        total = torch.zeros(block.shape[0], dtype=torch.float64, device=self.layout.device)
        with torch.no_grad():
            self._tangent(block, total, frozenset(self.model_steps if gauss_newton else ()))
        return total

    def _tangent(self, block: Tensor, second: Tensor | None = None, linear_steps: frozenset[str] = frozenset()) -> None:
        """Sweep from the parameters to the loss; add the second order of all but ``linear_steps`` to ``second``."""
        tangents: list[Any] = [None] * (self.size + 1)
        for slot, view, tensor in zip(self.param_slots, self.layout.views(block), self.layout.tensors, strict=True):
            if slot != NOTHING:
                tangents[slot] = view.to(tensor.dtype)
        for step in self.live:
            assert step.rule is not None
            dargs = tuple(_pick(tangents, entry) for entry in step.inputs)
            result = step.rule.tangent(*dargs)
            if second is not None and step.name not in linear_steps:
                part = step.rule.second_order(dargs, step.g)
                if part is not None:
                    second += part
            if isinstance(result, tuple | list):
                for slot, value in zip(step.outputs, result, strict=True):
                    tangents[slot] = value
            else:
                tangents[step.outputs[0]] = result
            for slot in step.last_use:
                tangents[slot] = None

    def _reverse(self, seed: Tensor | None, linear_steps: frozenset[str] | None, k: int) -> Tensor:
        """Sweep from the loss to the parameters: primal when ``linear_steps`` is None, else along tangents.

        The steps named in ``linear_steps`` contribute only the part that is linear in the cotangent's tangent.
        """
        primal = linear_steps is None
        device = self.layout.device
        cotangents: list[Any] = [None] * (self.size + 1)
        owned: set[int] = set()
        if primal:
            cotangents[self.loss_slot] = seed
        elif not self._ends_in_final:
            cotangents[self.loss_slot] = torch.zeros(k, dtype=self._loss_dtype(), device=device)
        flat = torch.empty(k, self.layout.n, dtype=self.layout.dtype, device=device)
        parts = list(self.layout.views(flat))
        for index, rule, position in self._direct:
            rule.destination[position] = parts[index]
        for step in reversed(self.live):
            assert step.rule is not None
            rule = step.rule
            outs = step.outputs
            g = cotangents[outs[0]] if len(outs) == 1 else tuple(cotangents[s] for s in outs)
            for slot in outs:
                cotangents[slot] = None
            if linear_steps is None:
                step.g = g
                results = rule.backward(g)
            elif step.name in linear_steps:
                results = rule.backward(g)
            else:
                results = rule.backward_tangent(g, step.g)
            for entry, result in zip(step.inputs, results, strict=True):
                if entry == NOTHING:
                    continue
                if isinstance(entry, list):
                    for slot, part in zip(entry, result, strict=True):
                        _accumulate(cotangents, owned, slot, part)
                else:
                    _accumulate(cotangents, owned, entry, result)
        for _, rule, position in self._direct:
            rule.destination[position] = None
        for slot, part in zip(self.param_slots, parts, strict=True):
            value = cotangents[slot]
            if value is None:
                part.zero_()
            elif value is not part:
                part.copy_(value)
        return flat


def _keep(entry: Any, active: set[int]) -> Any:
    """Replace the slots that do not depend on the parameters by NOTHING."""
    if isinstance(entry, list):
        kept = [s if s in active else NOTHING for s in entry]
        return kept if any(s != NOTHING for s in kept) else NOTHING
    return entry if entry in active else NOTHING


def _needs(entry: Any) -> Any:
    return [s != NOTHING for s in entry] if isinstance(entry, list) else entry != NOTHING


def _pick(values: list[Any], entry: Any) -> Any:
    return [values[s] for s in entry] if isinstance(entry, list) else values[entry]


def _accumulate(values: list[Any], owned: set[int], slot: int, value: Tensor | None) -> None:
    """Add a cotangent into its slot; the first sum makes a tensor of its own, since rules may return aliases."""
    if slot == NOTHING or value is None:
        return
    if values[slot] is None:
        values[slot] = value
    elif slot in owned:
        values[slot] += value
    else:
        values[slot] = values[slot] + value
        owned.add(slot)


def _unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


def _floating_slots(nodes: list[fx.Node], slot_of: Mapping[str, Any]) -> set[int]:
    floating = set()
    for node in nodes:
        value = node.meta.get("val")
        entries = (
            zip(slot_of[node.name], value, strict=True)
            if isinstance(value, tuple | list) and node.op == "call_function"
            else None
        )
        for slot, val in entries or [(slot_of.get(node.name), value)]:
            if isinstance(val, Tensor) and val.dtype.is_floating_point and isinstance(slot, int):
                floating.add(slot)
    return floating
