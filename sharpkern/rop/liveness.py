"""Which steps of a program a derivative passes, and how long each value is used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .rule import RULES
from .rules.fallback import Fallback
from .step import NOTHING, Step, flat_slots, is_slot

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


def live_steps(steps: list[Step], param_slots: Iterable[int], loss_slot: int, floating: set[int]) -> list[Step]:
    """Find the steps on a path from a parameter to the loss, and give each its rule.

    Args:
        steps: of the program, in order.
        param_slots: of the parameters; NOTHING for one that the program does not use.
        loss_slot: of the loss.
        floating: the slots of floating-point tensors; no derivative passes the others.

    Returns:
        The live steps in order. Their inputs that do not depend on a parameter have become NOTHING.
    """
    own = {slot for slot in param_slots if slot != NOTHING}
    # Two passes, forward for what depends on a parameter and backward for what the loss depends on. One alone would
    # keep constants (a mask that is computed) or what is computed beside the loss (buffers, outputs).
    candidates, active = _depending_on(own, steps, floating)
    wanted = {loss_slot}
    live = []
    for step in reversed(candidates):
        if any(slot in wanted and slot in active for slot in step.outputs):
            wanted.update(flat_slots(step.inputs))
            # Last first, for a step is known to be wanted only after all that use it.
            live.append(step)
    for step in live:
        _give_rule(step, active, own)
    return live[::-1]


def _depending_on(own: set[int], steps: list[Step], floating: set[int]) -> tuple[list[Step], set[int]]:
    """Find the steps whose results depend on the parameters, and the slots of these results and parameters."""
    active = set(own)
    candidates = []
    for step in steps:
        # Running statistics of batch norm, say, are floating and depend on the parameters, but torch gives them no
        # derivative.
        differentiable = RULES[step.op].differentiable if step.op in RULES else None
        outs = [s for i, s in enumerate(step.outputs) if differentiable is None or i in differentiable]
        if step.op not in _STOPS and any(s in active for s in flat_slots(step.inputs)):
            outs = [s for s in outs if s in floating]
            active.update(outs)
            if outs:
                candidates.append(step)
    return candidates, active


def _give_rule(step: Step, active: set[int], own: set[int]) -> None:
    # From here on the rule sees None for what is constant, as if it were no tensor at all.
    step.inputs = [_keep(entry, active) for entry in step.inputs]
    needs = tuple(_needs(entry) for entry in step.inputs)
    # An op may have a closed form for some of its constant arguments only (orders of a norm).
    cls = RULES[step.op].for_(step.template) if step.op in RULES else None
    step.rule = cls(step.op, needs) if cls else Fallback(step.op, needs, step.kwarg_names)
    # The two halves of ``needs``: one is for ``gradient``, the other is what ``backward`` must pass on.
    step.to_parameters = tuple(_needs(_keep(entry, own)) for entry in step.inputs)
    step.through = tuple(_needs(_keep(entry, active - own)) for entry in step.inputs)


def mark_last_uses(steps: list[Step], kept: set[int]) -> None:
    """Note on each step which values nobody uses after it, but for those in the slots kept."""
    seen = set(kept)
    for step in reversed(steps):
        # From ``refs`` and not from ``inputs``: constants are read, too, and inputs have forgotten them.
        used = [slot for _, slot in step.refs] + [s for _, slots in step.list_refs for s in slots if is_slot(s)]
        # A result that nobody uses (a mask of dropout, saved statistics) dies with its own step.
        for slot in [*used, *step.outputs]:
            if slot not in seen:
                seen.add(slot)
                step.last_use.append(slot)


def used_once(live: list[Step], param_slots: list[int]) -> list[tuple[int, Step, int]]:
    """Find the parameters that one argument alone uses: its rule may write the result into the flat vector itself.

    Returns:
        Index of the parameter, the step that uses it, the position of the argument among the step's inputs.
    """
    uses: dict[int, list[tuple[Step, int]]] = {}
    for step in live:
        for position, entry in enumerate(step.inputs):
            for slot in entry if isinstance(entry, list) else [entry]:
                # A list argument has no place: a concatenation gives all its cotangents as parts of one tensor.
                place = (step, -1 if isinstance(entry, list) else position)
                uses.setdefault(slot, []).append(place)
    found: list[tuple[int, Step, int]] = []
    for index, slot in enumerate(param_slots):
        places = uses.get(slot, [])
        # With a second use (tied weights) the second result would overwrite the first instead of being added.
        if slot != NOTHING and len(places) == 1 and places[0][1] >= 0:
            found.append((index, *places[0]))
    return found


def steps_before(live: list[Step], output_slots: list[int]) -> list[str]:
    """Name the live steps that the model's outputs depend on, last first: the model's own part of the loss."""
    part = set(output_slots)
    names = []
    for step in reversed(live):
        if part.intersection(step.outputs):
            part.update(flat_slots(step.inputs))
            names.append(step.name)
    return names


def _keep(entry: Any, active: set[int]) -> Any:
    """Replace the slots that do not depend on the parameters by NOTHING."""
    if isinstance(entry, list):
        kept = [s if s in active else NOTHING for s in entry]
        return kept if any(s != NOTHING for s in kept) else NOTHING
    return entry if entry in active else NOTHING


def _needs(entry: Any) -> Any:
    return [s != NOTHING for s in entry] if isinstance(entry, list) else entry != NOTHING
