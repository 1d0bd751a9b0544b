"""A program that keeps little: what rules save is computed again, one segment of the loss after the other.

The steps are cut into segments. Between sweeps only the values that cross the cuts are kept, and during a product their
tangents. A sweep that comes to a segment runs its forward pass again, and drops what its rules save when it moves on
(Griewank and Walther, Evaluating Derivatives (2008), chapter 12). A product takes two rounds:

    first to last    forward, tangent                               for the tangents at the cuts
    last to first    forward, backward, tangent, backward tangent   the cotangents are handed on from cut to cut
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .export import Graph
from .program import Program
from .rule import Rule
from .sandbox import RandomState, random_state, set_random_state
from .step import Step, is_slot
from .sweeps import run_backward, run_forward, run_gradient, run_reverse, run_tangent

_MOST_SEGMENTS = 64
_CROSSING = 2.0  # what crosses a cut is kept as a value and a tangent
_WITHIN = 3.0  # and what lies within a segment as these, and as what rules make of them


@dataclass
class Segment:
    """A run of steps, and what the sweeps over it start from.

    Attributes:
        steps: all of them, those without a derivative included.
        live: those with a rule.
        reads: slots of earlier segments' results.
        inputs, tangents: slot -> what the steps read.
        state: of the random numbers when its forward pass began.
    """

    steps: list[Step]
    live: list[Step]
    reads: list[int]
    inputs: dict[int, Any] = field(default_factory=dict)
    tangents: dict[int, Any] = field(default_factory=dict)
    state: RandomState | None = None


class RecomputedProgram(Program):
    """``Program`` in the memory of a segment and of what crosses the cuts; every result is the same, to the bit.

    The result of an op that is not deterministic (some sums on a GPU) is the same up to rounding. Noise is drawn again
    from the random state in which it was drawn first, so masks are the same; buffers are read from copies.

    Cost: besides a product's own two sweeps two forward passes, a backward pass and a tangent sweep.
    """

    replayable = False  # its sweeps are long enough not to need it, and their noise depends on a state kept outside

    def __init__(self, graph: Graph, params: Mapping[str, Tensor], *, keep_outputs: bool = True) -> None:
        super().__init__(graph, params, keep_outputs=keep_outputs)
        self.segments = _segments(self.steps, cuts(self.steps, self.live, self.slot_bytes()))
        # What a rule holds before anything has run; nested rules have theirs.
        self._blank = {id(step): [(r, dict(vars(r))) for r in _with_parts(step.rule)] for step in self.live}

    def forward(self, module: torch.nn.Module, batch_leaves: Iterable[Any], *, update_buffers: bool = False) -> Tensor:
        """Run the loss; see ``Program.forward``."""
        with torch.no_grad():
            self._base = self._start_values(module, batch_leaves)
            for slot, _ in self._buffers:
                # The pass itself may be about to change them, and so may anybody before the next product.
                self._base[slot] = self._base[slot].clone()
            values = self._base.copy()
            for segment in self.segments:
                segment.inputs = {}  # the last refresh's, all of which would live beside the new ones
            for segment in self.segments:
                segment.inputs = {slot: values[slot] for slot in segment.reads}
                segment.state = random_state()
                with self._holding(segment):
                    run_forward(segment.steps, values)
            self._new_buffers = [(target, values[slot]) for target, slot in self._mutations]
            if update_buffers:
                self.update_buffers(module)
            loss: Tensor = values[self.loss_slot].clone()
        return loss

    def backward(self) -> None:
        """Nothing: this sweep is part of each of the others."""

    def gradient(self, out: Tensor) -> None:
        """Write the gradient ``[1, n]``."""
        with torch.no_grad():
            parts, found, owned = self._direct_to(out), self._empty_slots(), set[int]()
            for segment in self._backwards():
                run_gradient(segment.live, found, owned)
            self._collect(found, parts)

    def hvp(self, block: Tensor, out: Tensor) -> None:
        """See ``Program.hvp``."""
        self._product(block, out, frozenset())

    def ggn(self, block: Tensor, out: Tensor) -> None:
        """See ``Program.ggn``."""
        self._product(block, out, frozenset(self.model_steps))

    def _product(self, block: Tensor, out: Tensor, linear_steps: frozenset[str]) -> None:
        with torch.no_grad():
            self._first_round(block)
            cotangents, owned, parts = self._seeded(len(out)), set[int](), list[Tensor]()
            for segment in self._backwards():
                self._direct_to(out, linear_steps)
                self._along(segment, block, linear_steps)
                parts = self._direct_to(out)
                run_reverse(segment.live, cotangents, owned, linear_steps)
            self._collect(cotangents, parts)

    def quadratic_form(self, block: Tensor, out: Tensor, *, gauss_newton: bool = False) -> None:
        """See ``Program.quadratic_form``."""
        linear_steps = frozenset(self.model_steps if gauss_newton else ())
        with torch.no_grad():
            self._first_round(block)
            out.zero_()
            for segment in self._backwards():
                self._along(segment, block, linear_steps, out)

    def _first_round(self, block: Tensor) -> None:
        """Find the tangents at the cuts."""
        self._direct_to(None)
        tangents = self._tangents_of(block)
        for segment in self.segments:
            segment.tangents = {slot: tangents[slot] for slot in segment.reads}
            # Behind the last cut there is nothing to find.
            if segment is not self.segments[-1]:
                with self._holding(segment):
                    self._forward_again(segment)
                    run_tangent(segment.live, tangents, prepared=False)

    def _along(
        self, segment: Segment, block: Tensor, linear_steps: frozenset[str], second: Tensor | None = None
    ) -> None:
        tangents = _filled(self._tangents_of(block), segment.tangents)
        segment.tangents = {}
        run_tangent(segment.live, tangents, linear_steps, second)

    def _backwards(self) -> Iterator[Segment]:
        """Yield the segments, last first, each while its rules hold what the primal sweeps save."""
        cotangents = self._empty_slots()
        cotangents[self.loss_slot] = self.empty_loss()[None].fill_(1)
        for segment in reversed(self.segments):
            with self._holding(segment):
                self._forward_again(segment)
                run_backward(segment.live, cotangents)
                yield segment

    def _forward_again(self, segment: Segment) -> None:
        """Run a segment's forward pass with the noise that it had."""
        present = random_state()
        assert segment.state is not None
        set_random_state(segment.state)
        try:
            run_forward(segment.steps, _filled(self._base.copy(), segment.inputs))
        finally:
            set_random_state(present)

    @contextmanager
    def _holding(self, segment: Segment) -> Iterator[None]:
        """Drop what the segment's rules hold when they have been used."""
        try:
            yield
        finally:
            for step in segment.live:
                step.g = None
                for rule, blank in self._blank[id(step)]:
                    vars(rule).clear()
                    vars(rule).update(blank)


def cuts(steps: list[Step], live: list[Step], slot_bytes: Mapping[int, int]) -> list[int]:
    """Choose where to cut a program, so that a product's memory is least.

    That is twice what crosses the cuts, and three times the results within the largest segment.

    Args:
        steps: of the program, in order.
        live: those with a rule.
        slot_bytes: slot -> size of what lies in it.

    Returns:
        Indices of steps at which a segment begins, without the first.
    """
    weights = _weights(steps, live, slot_bytes)
    crossing = _crossing(steps, live, slot_bytes)
    total = sum(weights)
    # Only where no neighbour would be better: a block of a transformer is cut between blocks.
    places = [0, *(i for i in range(1, len(steps)) if crossing[i] <= min(crossing[i - 1], crossing[i + 1])), len(steps)]
    sums = [sum(weights[:place]) for place in places]
    best, found = _WITHIN * total, list[int]()
    for count in range(2, _MOST_SEGMENTS + 1):
        cost, chosen = _cheapest(places, sums, crossing, total / count)
        if cost < best:
            best, found = cost, chosen
    return found


def _cheapest(places: list[int], sums: list[float], crossing: list[float], limit: float) -> tuple[float, list[int]]:
    """Cut so that least crosses, with segments up to a limit where the places allow it; return cost and cuts."""
    cost = [math.inf] * len(places)
    cost[0], before = 0.0, [0] * len(places)
    for j in range(1, len(places)):
        for i in range(j - 1, -1, -1):
            # One stretch between two places may be over the limit by itself.
            if sums[j] - sums[i] > limit and i < j - 1:
                break
            if cost[i] + crossing[places[j]] < cost[j]:
                cost[j], before[j] = cost[i] + crossing[places[j]], i
    chosen, j, largest = list[int](), len(places) - 1, 0.0
    while j:
        largest = max(largest, sums[j] - sums[before[j]])
        j = before[j]
        if j:
            chosen.insert(0, places[j])
    return _CROSSING * cost[-1] + _WITHIN * largest, chosen


def _weights(steps: list[Step], live: list[Step], slot_bytes: Mapping[int, int]) -> list[float]:
    """Return the bytes of each step's results, if it has a derivative and they are no view."""
    counts = {id(step) for step in live if not _is_view(step.op)}
    sizes = (sum(slot_bytes.get(slot, 0) for slot in step.outputs) for step in steps)
    return [float(size) if id(step) in counts else 0.0 for step, size in zip(steps, sizes, strict=True)]


def _crossing(steps: list[Step], live: list[Step], slot_bytes: Mapping[int, int]) -> list[float]:
    """Return the bytes that a cut before each step would have to keep, and zero for one behind the last."""
    moving = {slot for step in live for slot in step.outputs}
    made = {slot: i for i, step in enumerate(steps) for slot in step.outputs}
    last = {slot: i for i, step in enumerate(steps) for slot in _read(step) if slot in made}
    change = [0.0] * (len(steps) + 2)
    for slot, i in last.items():
        size = slot_bytes.get(slot, 0) * (1.0 if slot in moving else 1 / _CROSSING)
        change[made[slot] + 1] += size
        change[i + 1] -= size
    for i in range(1, len(change)):
        change[i] += change[i - 1]
    return change[:-1]


def _segments(steps: list[Step], places: list[int]) -> list[Segment]:
    segments, made = [], set[int]()
    for start, stop in zip([0, *places], [*places, len(steps)], strict=True):
        part = steps[start:stop]
        reads = sorted({slot for step in part for slot in _read(step)} & made)
        segments.append(Segment(part, [s for s in part if s.rule is not None], reads))
        made |= {slot for step in part for slot in step.outputs}
    return segments


def _read(step: Step) -> Iterator[int]:
    yield from (slot for _, slot in step.refs)
    yield from (slot for _, slots in step.list_refs for slot in slots if is_slot(slot))


def _is_view(op: Any) -> bool:
    return any(r.alias_info is not None for r in op._schema.returns) if hasattr(op, "_schema") else False


def _with_parts(rule: Rule | None) -> list[Rule]:
    """Return a rule and the rules that it holds."""
    assert rule is not None
    return [rule, *(part for value in vars(rule).values() if isinstance(value, Rule) for part in _with_parts(value))]


def _filled(values: list[Any], some: Mapping[int, Any]) -> list[Any]:
    for slot, value in some.items():
        values[slot] = value
    return values
