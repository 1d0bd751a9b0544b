"""One call of a sharded module, differentiable twice, whose weights are whole only while it runs.

Autograd alone would keep every gathered weight, and every layer's whole second derivative until the last one is
complete. So a call is one node: its backward pass gathers the weights again, runs the module again, and hands the
gradient out in shards; the derivative of that does the same. Between calls only shards and activations are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils import _pytree as pytree

from ...rop.double_backward import twice_differentiable
from ...rop.sandbox import RandomStates, was_written
from .shards import Shard, gathered, scattered

_PLAIN = (int, float, bool, str, complex, type(None), torch.dtype, torch.device, torch.Size)


class Call:
    """One call of a module: its arguments, and all that must be put back to run it again alike.

    Args:
        name: of the module, for messages.
        run: ``(args, kwargs, weights) -> output``: runs the module on whole weights.
        root: the module, whose buffers are put back.
        shards: of its weights.
    """

    def __init__(self, name: str, run: Callable[..., Any], root: nn.Module, shards: Sequence[Shard]) -> None:
        self.name, self.run, self.root, self.shards = name, run, root, list(shards)
        self.device = self.shards[0].part.device
        self.spec: pytree.TreeSpec | None = None  # of the output

    def __call__(self, args: Any, kwargs: Any) -> Any:
        """Run the module as one node of the graph."""
        # Only arguments of ``apply`` are differentiated, so tensors must be taken out of the structures they are in.
        leaves, self.input_spec = pytree.tree_flatten((args, kwargs))
        self.at = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        self.others = [None if isinstance(x, Tensor) else x for x in leaves]
        # Dropout must draw the same masks each time that the module is run again.
        self.random = RandomStates(self.device)
        # Products may be asked for after the block of autocast has been left.
        self.autocast = torch.is_autocast_enabled(self.device.type), torch.get_autocast_dtype(self.device.type)
        outputs = _Run.apply(self, *(leaves[i] for i in self.at), *(s.part for s in self.shards))
        assert self.spec is not None
        rest = iter(outputs)
        filled = [next(rest) if isinstance(x, _Hole) else x for x in self.output_leaves]
        return pytree.tree_unflatten(filled, self.spec)

    def first(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Run for the first time, without a graph; buffers change as they would."""
        before = _Buffers(self.root)
        outputs = self._output(tensors, gathered(self.shards, [s.part for s in self.shards]))
        self.buffers = before.settled()
        # The output may be an attribute that the module keeps, with a graph of its own.
        return [t.detach() for t in outputs]

    def again(self, tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """Run once more with a graph, on the same noise and buffers."""
        with ExitStack() as stack:
            on, dtype = self.autocast
            for context in (
                torch.enable_grad(),
                twice_differentiable(),  # this may run long after the first time, outside of its contexts
                # without a cache: it would keep cast copies of weights that are to be freed
                torch.autocast(self.device.type, dtype=dtype, enabled=on, cache_enabled=False),
                self.random.again(),
                self.buffers.put_back(),
            ):
                stack.enter_context(context)
            return self._output(tensors, weights)

    def _output(self, tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        leaves = list(self.others)  # a new list each time: a module may change the containers it is given
        for i, t in zip(self.at, tensors, strict=True):
            leaves[i] = t
        args, kwargs = pytree.tree_unflatten(leaves, self.input_spec)
        outputs, self.spec = pytree.tree_flatten(self.run(args, kwargs, weights))
        if unknown := [x for x in outputs if not isinstance(x, (Tensor, *_PLAIN))]:
            raise TypeError(
                f"the sharded module {self.name!r} returns a {type(unknown[0]).__name__}, in which tensors cannot be "
                "found: return a tensor, tuple, list or dict, or register the class with torch.utils._pytree."
            )
        self.output_leaves = [_Hole() if isinstance(x, Tensor) else x for x in outputs]
        return [x for x in outputs if isinstance(x, Tensor)]

    def split(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Split arguments of a node into the module's inputs and the shards."""
        return tensors[: len(self.at)], tensors[len(self.at) :]

    def gradients(
        self, g: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor], *, create_graph: bool
    ) -> list[Tensor | None]:
        """Return the gradients by inputs and whole weights, where they require one; None elsewhere.

        Raises:
            ValueError: the module's output depends on a tensor that was not passed to it.
        """
        outputs = self.again(inputs, weights)
        leaves = [*inputs, *weights]
        if not create_graph:  # once for each primal pass is enough
            self._check_captured(outputs, leaves)
        # Integers, and what does not depend on anything that is differentiated by, have no gradient to pass on.
        pairs = [(z, c) for z, c in zip(outputs, g, strict=True) if z.requires_grad]
        wanted = [i for i, t in enumerate(leaves) if t.requires_grad]
        result: list[Tensor | None] = [None] * len(leaves)
        if not wanted:
            return result
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs:
            zs, cs = zip(*pairs, strict=True)
            found = torch.autograd.grad(
                zs, [leaves[i] for i in wanted], cs, create_graph=create_graph, allow_unused=True
            )
        for i, d in zip(wanted, found, strict=True):
            # Zeros for weights that were not used: all processes must hand out the same parts, or they hang.
            result[i] = torch.zeros_like(leaves[i]) if d is None else d
        return result

    def _check_captured(self, outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
        """Look for leaves of the graph that are no arguments: their part of the gradient would be lost."""
        known = {id(t) for t in leaves}
        for variable in _variables(outputs):
            if id(variable) not in known:
                raise ValueError(
                    f"the sharded module {self.name!r} uses a tensor of shape {list(variable.shape)} with a gradient "
                    "that is not passed to it as an argument, such as an attribute or another module's weight: "
                    "pass it as an argument."
                )


class _Hole:
    """Where a tensor stood."""


class _Run(Function):
    """A call. Inputs are the module's tensors and this process's shards."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        # Saved with their place in the graph, so that the backward pass can be differentiated by them.
        ctx.save_for_backward(*tensors)
        inputs, _ = call.split(tensors)
        # Passed through unchanged, an input would be taken for an output of this node.
        outputs = [z.clone() if any(z is x for x in inputs) else z for z in call.first(inputs)]
        ctx.mark_non_differentiable(*(z for z in outputs if not z.dtype.is_floating_point))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor | None, ...]:
        # A node of its own, or autograd would look into it for the second derivative and keep whole weights.
        needed = ctx.needs_input_grad[1:]
        found = _Backward.apply(ctx.call, len(g), needed, *g, *ctx.saved_tensors)
        rest = iter(found)
        return None, *(next(rest) if need else None for need in needed)


class _Backward(Function):
    """The gradients of a call, by inputs and shards; its own derivative is the second one."""

    @staticmethod
    def forward(ctx: Any, call: Call, count: int, needed: Sequence[bool], *args: Tensor) -> tuple[Tensor, ...]:
        ctx.call, ctx.count, ctx.needed = call, count, needed
        ctx.save_for_backward(*args)
        inputs, weights = _leaves(call, args[count:], needed)
        found = call.gradients(args[:count], inputs, weights, create_graph=False)
        del weights  # before the gradients are joined for the sum: else a unit is in memory three times
        return tuple(_in_shards(call, found))

    @staticmethod
    def backward(ctx: Any, *along: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        args = ctx.saved_tensors
        # The gradient is linear in g, and its derivative by g is what goes on along the forward graph.
        g = [t.detach().requires_grad_(t.dtype.is_floating_point) for t in args[: ctx.count]]
        inputs, weights = _leaves(call, args[ctx.count :], ctx.needed)
        # The graph of one unit, built and used within this call, so that it is freed with it.
        found = [d for d in call.gradients(g, inputs, weights, create_graph=True) if d is not None]
        whole = _whole(call, along, ctx.needed)
        pairs = [(d, v) for d, v in zip(found, whole, strict=True) if d.requires_grad]
        sources = [*g, *inputs, *weights]
        wanted = [i for i, t in enumerate(sources) if t.requires_grad]
        second: list[Tensor | None] = [None] * len(sources)
        parts: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs:
            ds, vs = zip(*pairs, strict=True)
            parts = torch.autograd.grad(ds, [sources[i] for i in wanted], vs, allow_unused=True)
        for i, d in zip(wanted, parts, strict=True):
            # zeros too, for every process must hand out the same parts
            second[i] = torch.zeros_like(sources[i]) if d is None else d
        of_g, rest = second[: ctx.count], second[ctx.count :]
        rows = iter(_in_shards(call, rest))
        return None, None, None, *of_g, *(None if d is None else next(rows) for d in rest)


def _leaves(call: Call, tensors: Sequence[Tensor], needed: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
    """Return inputs and gathered weights as leaves of a graph of their own."""
    inputs, parts = call.split(tensors)
    own = [x.detach() for x in inputs]
    whole = gathered(call.shards, parts)
    for t, need in zip([*own, *whole], needed, strict=True):
        t.requires_grad_(need)
    return own, whole


def _whole(call: Call, along: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    """Gather the shards among the tangents of a call's gradients."""
    first = len(call.at)
    places = [i for i, need in enumerate(needed) if need]
    own = [v for i, v in zip(places, along, strict=True) if i < first]
    shards = [call.shards[i - first] for i in places if i >= first]
    return [*own, *gathered(shards, along[len(own) :])]


def _in_shards(call: Call, found: Sequence[Tensor | None]) -> list[Tensor]:
    """Hand out the whole gradients of weights, those of inputs as they are; without those that are None."""
    first = len(call.at)
    own = [d.detach() for d in found[:first] if d is not None]
    pairs = [(s, d) for s, d in zip(call.shards, found[first:], strict=True) if d is not None]
    return [*own, *scattered([s for s, _ in pairs], [d for _, d in pairs])]


def _variables(outputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """Find the leaves of a graph."""
    seen: set[Any] = set()
    stack = [z.grad_fn for z in outputs]
    yield from (z for z in outputs if z.grad_fn is None and z.requires_grad)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        stack += [following for following, _ in node.next_functions]


class _Buffers:
    """The values of a module's buffers before a call, to be put back when it is run again."""

    def __init__(self, root: nn.Module) -> None:
        self._live = [(m, dict(m._buffers)) for m in root.modules() if m._buffers]
        tensors = {id(b): b for _, row in self._live for b in row.values() if b is not None}
        # In eval mode nothing writes to them, and masks may be large.
        self._copies = {i: b.clone() for i, b in tensors.items()} if root.training else {}

    def settled(self) -> _Buffers:
        """Forget the copies of buffers that the call has left alone."""
        live = {id(b): b for _, row in self._live for b in row.values() if b is not None}
        self._copies = {i: c for i, c in self._copies.items() if was_written(live[i], c)}
        return self

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Within the block, the modules have the old values, on copies that may be written to."""
        present = [(m, dict(m._buffers)) for m, _ in self._live]
        copies = {i: c.clone() for i, c in self._copies.items()}
        for m, row in self._live:
            m._buffers.update({name: copies.get(id(b), b) for name, b in row.items()})
        try:
            yield
        finally:
            for m, row in present:
                m._buffers.clear()
                m._buffers.update(row)
