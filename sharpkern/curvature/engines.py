"""Which engine gives a loss and its products: the exported program, or double backward; and when to ask again.

An engine belongs to what it was made from: shapes of the batch, structure of the modules, Python values that their
code reads (``watch``). A program is used after the gate has let it pass, and is compared again every ``CHECK_EVERY``
refreshes.
"""

from __future__ import annotations

import math
import os
import sys
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..rop import Program, RecomputedProgram, ReplayedProgram, UnsupportedModelError, UnsupportedOpError, export
from ..rop.double_backward import DoubleBackward
from ..rop.export import Graph
from ..rop.sandbox import restored_buffers, user_code, without_trace
from .eager import EagerPass, run_eagerly, run_forward
from .exports import keep_graph, kept_graph
from .gate import Verdict, compare
from .losses import FunctionalLoss, LossModule, NonFiniteLossError
from .watch import Kept, Snapshot, changes

CHECK_EVERY = 500  # refreshes between comparisons with the eager model, which then cost less than 1% of the refreshes
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_MOST_ENGINES = 8  # kept, least recently used first to go
_MOST_EXPORTS = 3  # for changed Python values, within _RECENT refreshes; what changes more often is not for an export
_RECENT = 100
_SAME = 16.0  # units of rounding within which a value that changed is taken to play no part
_NOISE = 4.0  # or so many times the difference that the program had when it was new

Engine = ReplayedProgram | DoubleBackward


class Engines:
    """Makes, checks and keeps the engines of one loss.

    Args:
        module: a ``LossModule`` or ``FunctionalLoss``.
        params: name -> parameter.
        keep_outputs: for products with the generalised Gauss-Newton matrix.
        verify: compare programs with the eager model; False trusts every export.
        recompute: keep little between a program's sweeps, and compute it again.
    """

    def __init__(
        self,
        module: LossModule | FunctionalLoss,
        params: Mapping[str, Tensor],
        *,
        keep_outputs: bool,
        verify: bool,
        recompute: bool = False,
    ) -> None:
        self.module, self.params, self.keep_outputs, self.verify = module, params, keep_outputs, verify
        self._kind = RecomputedProgram if recompute else Program
        self._kept: OrderedDict[Any, Engine] = OrderedDict()
        self._snapshot: Snapshot | None = None
        self._holds = False  # what the last look at the snapshot has shown
        self._last: tuple[pytree.TreeSpec, list[Any], Engine] | None = None  # of the refresh before
        self._exports = 0  # for changed values alone, of late
        self._refreshes = self._last_export = 0
        self._noise: dict[int, float] = {}  # id of a program -> its difference from the eager model when it was new
        self._values: dict[Any, dict[str, Any]] = {}  # structure -> values that the last engine was made with
        self._latest: dict[Any, Engine] = {}
        self._eager_only = ""  # why no program is made any more
        self._moves = False  # the forward pass changes Python values
        self._uses: dict[int, int] = {}  # id of a program -> refreshes since it was compared
        self._warned: set[str] = set()
        self._compared: tuple[Engine, Tensor] | None = None  # in this call, on the batch as it is; and its loss

    @property
    def others(self) -> list[nn.Module]:
        """Modules that the loss function reaches without containing them."""
        return [] if self._snapshot is None else self._snapshot.others

    @property
    def iterators(self) -> list[str]:
        """Where the forward pass can reach an iterator, as the names of attributes."""
        return [] if self._snapshot is None else self._snapshot.iterators

    def unchanged(self) -> bool:
        """Look whether modules, parameters and the Python values that their code reads are as at the last refresh."""
        self._holds = self._snapshot is not None and self._snapshot.holds()
        return self._holds

    def __iter__(self) -> Iterator[Engine]:
        return iter({id(engine): engine for engine in self._kept.values()}.values())

    def __len__(self) -> int:
        return len(list(iter(self)))

    def for_batch(self, leaves: list[Any], spec: pytree.TreeSpec) -> Engine:
        """Return the engine for a batch, checked if it is time; ``unchanged`` must have been called just before.

        Raises:
            ValueError: the loss is no floating scalar or does not depend on the parameters.
            NonFiniteLossError: the eager loss is NaN or infinite.
            Exception: whatever the user's own code raises.
        """
        with user_code:
            return self._for_batch(leaves, spec)

    def _for_batch(self, leaves: list[Any], spec: pytree.TreeSpec) -> Engine:
        self._refreshes += 1
        self._compared = None
        signature = [(x.shape, x.dtype) if isinstance(x, Tensor) else _comparable(x) for x in leaves]
        if self._snapshot is None or not self._holds:
            self._snapshot = Snapshot(self.module)
        elif self._last is not None and self._last[:2] == (spec, signature) and not self._due(self._last[2]):
            return self._last[2]  # as at the refresh before: most are
        structure, values = self._state(leaves, spec)
        engine = self._kept.get((structure, _hashable(values)))
        if self._snapshot.iterators:
            # Before any eager pass: what that took from the iterator, the step itself would miss.
            self._eager_only = self._eager_only or f"it reads an iterator ({self._snapshot.iterators[0]})"
        if engine is None:
            engine = self._made(leaves, spec, structure, values)
        elif isinstance(engine, ReplayedProgram) and self._due(engine):
            engine = self._checked(engine, leaves, spec)
        # An eager pass may have left values behind, such as a counter: programs leave them as they are now.
        structure, values = self._state(leaves, spec)
        self._keep((structure, _hashable(values)), structure, values, engine)
        self._last = spec, signature, engine
        return engine

    def loss_of(self, engine: Engine) -> Tensor | None:
        """Return the loss if the comparison has just run the engine's primal sweeps, which need not run again then.

        None where they must: nothing was compared, or the forward pass draws noise or leaves something behind.
        """
        return self._compared[1] if self._compared is not None and self._compared[0] is engine else None

    def _due(self, engine: Engine) -> bool:
        """Count a use, and say whether it is time to compare: each program by itself, for batches may alternate."""
        self._uses[id(engine)] = self._uses.get(id(engine), 0) + 1
        return self.verify and self._uses[id(engine)] >= CHECK_EVERY and isinstance(engine, ReplayedProgram)

    def _state(self, leaves: list[Any], spec: pytree.TreeSpec) -> tuple[Any, dict[str, Any]]:
        """Return what an engine belongs to: the structure, which needs another one, and values, which may."""
        assert self._snapshot is not None
        tensors = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else None for x in leaves)
        plain = {f"batch leaf {i}": _comparable(x) for i, x in enumerate(leaves) if not isinstance(x, Tensor)}
        return (spec, tensors, self._snapshot.structure), self._snapshot.values | plain

    def _keep(self, key: Any, structure: Any, values: dict[str, Any], engine: Engine) -> None:
        self._kept[key] = engine
        self._kept.move_to_end(key)
        self._values[structure], self._latest[structure] = values, engine
        while len(self._kept) > _MOST_ENGINES:
            (old, *_), _ = self._kept.popitem(last=False)
            if not any(structure == old for structure, _ in self._kept):
                self._values.pop(old, None)
                self._latest.pop(old, None)
        present = {id(kept) for kept in self._kept.values()}
        for of_engines in (self._uses, self._noise):
            # A new engine may get the identity of one that is gone, and must not take over its numbers.
            for gone in of_engines.keys() - present:
                del of_engines[gone]

    def _made(self, leaves: list[Any], spec: pytree.TreeSpec, structure: Any, values: dict[str, Any]) -> Engine:
        """Make an engine; where only Python values have changed, first ask whether they play a part."""
        before, latest = self._values.get(structure), self._latest.get(structure)
        if isinstance(latest, DoubleBackward):
            return latest
        if self._eager_only:
            return self._second_engine(spec, self._eager_only)
        eager = self._eager(leaves, spec)
        if eager.moves:
            self._moves, self._eager_only = True, "; ".join(f"it uses {what}" for what in eager.unseen)
        if before is None or latest is None:
            return self._built(leaves, spec, eager)
        if not eager.unseen:
            verdict = self._compare(latest, leaves, spec, eager)
            usual = max(_SAME * latest.program.graph.rounding, _NOISE * self._noise.get(id(latest), 0.0))
            if verdict.agrees and verdict.difference <= usual:
                return latest
        self._exports = 1 + (self._exports if self._refreshes - self._last_export <= _RECENT else 0)
        self._last_export = self._refreshes
        if self._exports > _MOST_EXPORTS:
            names = list(changes(before, values))
            self._eager_only = (
                f"a Python value that it reads changes from step to step ({', '.join(names[:3])}): make it a 0-d "
                "tensor that is changed in place, or pass it in the batch as a tensor"
            )
        return self._built(leaves, spec, eager)

    def _built(self, leaves: list[Any], spec: pytree.TreeSpec, eager: EagerPass) -> Engine:
        """Export and check, or say why not and take double backward."""
        if self.keep_outputs and isinstance(self.module, LossModule):
            kept = Kept(self.module)
            with torch.enable_grad(), without_trace([self.module], {t.device for t in self.params.values()}):
                self.module.check_outputs(pytree.tree_unflatten(leaves, spec))
            kept.put_back()
        reason = self._eager_only or "; ".join(f"it uses {what}" for what in eager.unseen)
        if not reason:
            try:
                return self._program(leaves, spec, eager)
            except (UnsupportedModelError, UnsupportedOpError) as error:
                reason = str(error)
        return self._second_engine(spec, reason)

    def _program(self, leaves: list[Any], spec: pytree.TreeSpec, eager: EagerPass) -> ReplayedProgram:
        """Make a program of what an operator before this one has exported, or export."""
        assert self._snapshot is not None
        (_, tensors, structure), values = self._state(leaves, spec)
        key = spec, tensors, structure[1:], _hashable(values)
        if (graph := kept_graph(self.module, key)) is not None:
            try:
                return self._gated(graph, leaves, spec, eager)
            except UnsupportedModelError:
                pass  # something has changed that nobody looks at: a new export may see it
        snapshot = self._snapshot
        # With gradients, as in training, whatever the caller's mode: a forward pass may ask for it.
        with torch.random.fork_rng([]), restored_buffers(snapshot.others), torch.enable_grad():
            try:
                graph = export(self.module, pytree.tree_unflatten(leaves, spec))
            finally:
                snapshot.put_back()  # what the trace has left behind are tensors without numbers
        self._clear_up(leaves, spec)
        engine = self._gated(graph, leaves, spec, eager)
        keep_graph(self.module, key, snapshot, graph)
        return engine

    def _gated(self, graph: Graph, leaves: list[Any], spec: pytree.TreeSpec, eager: EagerPass) -> ReplayedProgram:
        """Make a program of a graph, and compare it with the eager model."""
        engine = ReplayedProgram(self._kind(graph, self.params, keep_outputs=self.keep_outputs))
        self._uses[id(engine)] = 0
        if self.verify:
            verdict = self._compare(engine, leaves, spec, eager)
            if not verdict.agrees:
                raise UnsupportedModelError(f"the exported program differs from the eager model in {verdict.what}")
            self._noise[id(engine)] = verdict.difference
            if engine.fallback_ops:
                self._try_products(engine)
        return engine

    def _try_products(self, engine: ReplayedProgram) -> None:
        """Run a block and a form once: what torch cannot differentiate twice must show before anyone relies on it."""
        block = engine.program.layout.empty(2).normal_(generator=torch.Generator(engine.program.layout.device))
        if self.keep_outputs:
            engine.ggn(block)
        else:
            engine.hvp(block)
        engine.quadratic_form(block, gauss_newton=self.keep_outputs)

    def _checked(self, engine: ReplayedProgram, leaves: list[Any], spec: pytree.TreeSpec) -> Engine:
        """Compare an engine in use again; make a new one if it no longer agrees."""
        self._uses[id(engine)] = 0
        eager = self._eager(leaves, spec)
        self._moves = self._moves or eager.moves
        if not eager.unseen and self._compare(engine, leaves, spec, eager).agrees:
            return engine
        return self._built(leaves, spec, eager)

    def _compare(self, engine: ReplayedProgram, leaves: list[Any], spec: pytree.TreeSpec, eager: EagerPass) -> Verdict:
        verdict = compare(engine, self.module, leaves, spec, self.params, eager)
        if verdict.loss is not None and not (eager.draws or eager.moves or engine.program.new_buffers()):
            self._compared = engine, verdict.loss
        return verdict

    def _second_engine(self, spec: pytree.TreeSpec, reason: str) -> DoubleBackward:
        if reason not in self._warned:
            self._warned.add(reason)
            _warn(
                f"sharpkern: this model does not export to a program, products go through autograd (slower, and with "
                f"the memory of its graph): {reason}."
            )
        assert self._snapshot is not None
        return DoubleBackward(
            self.module,
            spec,
            self.params,
            self._snapshot.others,
            keep_outputs=self.keep_outputs,
            kept=self._values_kept,
        )

    @contextmanager
    def _values_kept(self) -> Iterator[None]:
        """Put back what the forward pass changes of Python's values within the block, if it changes any."""
        if not self._moves:
            yield
            return
        kept = Kept(self.module)
        try:
            with kept.for_graph():
                yield
        finally:
            kept.put_back()

    def _eager(self, leaves: list[Any], spec: pytree.TreeSpec) -> EagerPass:
        assert self._snapshot is not None
        batch = pytree.tree_unflatten(leaves, spec)
        eager = run_eagerly(self.module, batch, self.params, self._snapshot.others)
        self._snapshot = Snapshot(self.module)  # a forward pass may have left new values behind
        if not math.isfinite(float(eager.loss)):
            raise NonFiniteLossError(float(eager.loss))
        return eager

    def _clear_up(self, leaves: list[Any], spec: pytree.TreeSpec) -> None:
        """Run forward hooks on real tensors again: what they keep would otherwise be the export's fake ones."""
        if any(m._forward_hooks or m._forward_pre_hooks for m in self.module.modules()):
            assert self._snapshot is not None
            batch = pytree.tree_unflatten(leaves, spec)
            run_forward(self.module, batch, self.params, self._snapshot.others)
            self._snapshot = Snapshot(self.module)  # a hook may have left new values behind


def _comparable(leaf: Any) -> Any:
    """Return what two leaves of batches are compared by: an array has no truth value of its own."""
    if isinstance(leaf, np.ndarray):
        return leaf.shape, str(leaf.dtype), leaf.tobytes()
    return leaf if leaf.__hash__ is not None else repr(leaf)


def _hashable(values: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple((name, value if value.__hash__ is not None else repr(value)) for name, value in values.items())


def _warn(message: str) -> None:
    """Warn at the line outside of this package that led here."""
    if sys.version_info >= (3, 12):
        warnings.warn(message, skip_file_prefixes=(_PACKAGE,))
    else:
        frames = enumerate(traceback.walk_stack(sys._getframe()), 1)
        level = next((i for i, (f, _) in frames if not f.f_code.co_filename.startswith(_PACKAGE)), 1)
        warnings.warn(message, stacklevel=level)
