"""One call of an exported program: where its arguments come from, and where its results go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from .rule import Rule

_TENSOR_TYPES = {"Tensor", "Optional[Tensor]", "List[Tensor]", "List[Optional[Tensor]]"}
NOTHING = -1  # the slot that always holds None


@dataclass
class Step:
    """One call: where its arguments come from and where its results go (slots are indices into lists of values)."""

    name: str
    op: Any
    template: list[Any]  # schema arguments in order; tensors filled in at run time
    refs: list[tuple[int, int]]  # (argument position, slot)
    list_refs: list[tuple[int, list[Any]]]  # (argument position, slots of a list argument)
    inputs: list[Any]  # per tensor argument of the schema: slot, NOTHING, or a list of those
    outputs: list[int]  # slots
    many: bool = False  # the op returns a tuple or list, of which there may be one entry only
    rule: Rule | None = None
    to_parameters: tuple[Any, ...] = ()  # per tensor argument like ``Rule.needs``: is it a parameter?
    through: tuple[Any, ...] = ()  # does it depend on parameters without being one?
    g: Any = None  # the primal cotangent of the result, kept for backward_tangent
    last_use: list[int] = field(default_factory=list)
    kwarg_names: list[str] = field(default_factory=list)  # keyword-only schema arguments, the last of template


def step_of(node: fx.Node, slot_of: Mapping[str, Any], outputs: list[int]) -> Step:
    """Translate a node of the graph; ``slot_of`` maps the names of earlier nodes to slots."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    step = Step(node.name, node.target, [], [], [], [], outputs)
    for position, argument in enumerate(schema):
        if position < len(node.args):
            value: Any = node.args[position]
        # Filled in from the schema, so that a rule's ``forward`` gets every argument, at the same place for every
        # model.
        elif argument.name in node.kwargs:
            value = node.kwargs[argument.name]
        else:
            value = argument.default_value
        if argument.kwarg_only:
            step.kwarg_names.append(argument.name)
        entry: Any = NOTHING
        if isinstance(value, fx.Node):
            entry = slot_of[value.name]
            step.refs.append((position, entry))
            # A hole in the template, filled at run time. The slot alone says where from.
            value = None
        elif isinstance(value, list | tuple) and any(isinstance(v, fx.Node) for v in value):
            entry = [slot_of[v.name] if isinstance(v, fx.Node) else NOTHING for v in value]
            slots = [_Slot(slot_of[v.name]) if isinstance(v, fx.Node) else v for v in value]
            step.list_refs.append((position, slots))
            value = None
        step.template.append(value)
        if str(argument.type) in _TENSOR_TYPES:
            step.inputs.append(entry)
    return step


class _Slot(int):
    """A slot inside a list argument, told apart from a plain integer of that list."""


def is_slot(value: Any) -> bool:
    """Tell a slot inside a list argument from a plain integer."""
    return type(value) is _Slot


def call(step: Step, args: list[Any]) -> Any:
    """Run the op itself on all its schema arguments in order."""
    split = len(args) - len(step.kwarg_names)
    return step.op(*args[:split], **dict(zip(step.kwarg_names, args[split:], strict=True)))


def flat_slots(inputs: list[Any]) -> Iterable[int]:
    """Yield the slots of all arguments, lists included."""
    for entry in inputs:
        if isinstance(entry, list):
            yield from entry
        else:
            yield entry
