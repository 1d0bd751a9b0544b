"""The loops of the four sweeps over a run of steps: a whole program, or a part of one.

Values, tangents and cotangents lie in lists by slot; those of derivatives have one entry more, of NOTHING.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .rule import any_of
from .step import NOTHING, Step, call, is_slot


def run_forward(steps: list[Step], values: list[Any]) -> None:
    """Run the steps; rules save what the other sweeps need."""
    for step in steps:
        args = step.template.copy()
        for position, slot in step.refs:
            args[position] = values[slot]
        for position, slots in step.list_refs:
            args[position] = [values[s] if is_slot(s) else s for s in slots]
        result = step.rule.forward(*args) if step.rule is not None else call(step, args)
        _store(values, step, result)
        # What a rule needs later it has saved; everything else is freed as early as in eager torch.
        for slot in step.last_use:
            values[slot] = None


def run_backward(live: list[Step], cotangents: list[Any]) -> None:
    """Sweep back along the steps; save what products and ``run_gradient`` need."""
    owned: set[int] = set()
    for step in reversed(live):
        assert step.rule is not None
        # Complete by now: every step that uses these results comes later, and has been passed.
        g = _take(cotangents, step)
        # Only what leads on to other steps. The parameters' own cotangents, half of a backward sweep's matrix
        # products, wait until somebody asks for the gradient; products never need them.
        results = step.rule.pull_back(g, step.through)
        step.rule.prepare(g)
        # The others' cotangents are freed here: an activation's has become part of its curvature.
        step.g = g if step.rule.keeps_cotangent or any_of(step.to_parameters) else None
        _distribute(cotangents, owned, step.inputs, results)


def run_gradient(live: list[Step], cotangents: list[Any], owned: set[int]) -> None:
    """Find the parameters' cotangents, after ``run_backward``.

    Args:
        live: steps.
        cotangents: to add them to.
        owned: slots whose tensor was made by a sum here, so that it may be added to.
    """
    # In any order: parameters have no producer, so that nothing here depends on another step's result.
    for step in live:
        assert step.rule is not None
        if any_of(step.to_parameters):
            results = step.rule.pull_back(step.g, step.to_parameters)
            _distribute(cotangents, owned, step.inputs, results)


def run_tangent(
    live: list[Step],
    tangents: list[Any],
    linear_steps: frozenset[str] = frozenset(),
    second: Tensor | None = None,
    *,
    prepared: bool = True,
) -> None:
    """Sweep forward along tangents.

    Args:
        live: steps.
        tangents: of what the steps read.
        linear_steps: those whose second order is left out.
        second: ``[k]``, where to add the second order of all others; None for a reverse sweep to come.
        prepared: ``run_backward`` has passed. If not, only the tangents are of use, and no result has a place.
    """
    for step in live:
        assert step.rule is not None
        dargs = tuple(_pick(tangents, entry) for entry in step.inputs)
        # Here and not at the end of ``backward``: a captured graph runs ``prepare`` twice.
        if prepared:
            step.rule.forget_primals()
        result = step.rule.tangent(*dargs)
        if second is not None and step.name not in linear_steps:
            part = step.rule.second_order(dargs, step.g)
            if part is not None:
                second += part
        if second is not None:
            # No reverse sweep will come and read them.
            step.rule.forget_tangents()
        _store(tangents, step, result)
        for slot in step.last_use:
            tangents[slot] = None


def run_reverse(live: list[Step], cotangents: list[Any], owned: set[int], linear_steps: frozenset[str]) -> None:
    """Sweep back along the last tangents; the steps named contribute only what is linear in the cotangent's tangent."""
    for step in reversed(live):
        assert step.rule is not None
        # None where the loss itself ends the program.
        dg = _take(cotangents, step)
        linear = step.name in linear_steps
        # Of a linear step, without the term of g and dx, ``backward`` is the derivative (docs/explain/design.md).
        results = step.rule.backward(dg) if linear else step.rule.backward_tangent(dg, step.g)
        step.rule.forget_tangents()
        _distribute(cotangents, owned, step.inputs, results)


def _store(values: list[Any], step: Step, result: Any) -> None:
    if isinstance(result, tuple | list):
        for slot, value in zip(step.outputs, result, strict=True):
            values[slot] = value
    else:
        values[step.outputs[0]] = result


def _pick(values: list[Any], entry: Any) -> Any:
    return [values[s] for s in entry] if isinstance(entry, list) else values[entry]


def _take(cotangents: list[Any], step: Step) -> Any:
    """Take a step's cotangents out of their slots."""
    taken = tuple(cotangents[slot] for slot in step.outputs)
    # Gone from the table, so that each cotangent is freed as soon as its rule has used it.
    for slot in step.outputs:
        cotangents[slot] = None
    return taken if step.many else taken[0]


def _distribute(cotangents: list[Any], owned: set[int], inputs: list[Any], results: tuple[Any, ...]) -> None:
    """Add a step's results to the slots of its arguments."""
    for entry, result in zip(inputs, results, strict=True):
        if entry == NOTHING:
            continue
        if isinstance(entry, list):
            for slot, part in zip(entry, result or [None] * len(entry), strict=True):
                _accumulate(cotangents, owned, slot, part)
        else:
            _accumulate(cotangents, owned, entry, result)


def _accumulate(values: list[Any], owned: set[int], slot: int, value: Tensor | None) -> None:
    """Add a cotangent into its slot; the first sum makes a tensor of its own, since rules may return aliases."""
    if slot == NOTHING or value is None:
        return
    # As it is, without a copy: most values have one user.
    if values[slot] is None:
        values[slot] = value
    elif slot in owned:
        # In place, because the sum was made here and nobody else holds it.
        values[slot] += value
    else:
        values[slot] = values[slot] + value
        owned.add(slot)
