"""The rule for any op that has none: torch's autograd on that one op, reverse over reverse.

gx = J' g:   dy = d<J' u, dx> / du, since J' u is linear in u        d(gx) = J' dg + d<J' g, dx> / dx
torch's forward mode has wrong second derivatives for a family of ops (det, solve, cumprod at zeros, ...), so none of it
is used. One vector of a block comes after the other: slow, and never recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..rule import Op, Rule


class UnsupportedOpError(RuntimeError):
    """torch has no derivative of this op that a Hessian needs."""


class Fallback(Rule):
    """Derivatives of one op by autograd twice; also right where the op has several outputs or lists of arguments."""

    freed_after_reverse = ("dprimals",)

    def __init__(self, op: Op, needs: tuple[Any, ...], kwarg_names: list[str]) -> None:
        super().__init__(op, needs)
        self.kwarg_names = kwarg_names

    def forward(self, *args: Any) -> Any:
        """Run the op; keep all arguments."""
        if self._draws_random_numbers(args):
            raise UnsupportedOpError(
                f"{self.op} draws random numbers and has no rule: two products would see two different losses."
            )
        self.args = list(args)
        # Position of each differentiable tensor: (argument, None) or (argument, index in a list argument).
        tensor_args = [i for i, a in enumerate(self.op._schema.arguments) if "Tensor" in str(a.type)]
        self.places: list[tuple[int, int | None]] = []
        for i, need in zip(tensor_args, self.needs, strict=True):
            if isinstance(need, list):
                self.places += [(i, j) for j, flag in enumerate(need) if flag]
            elif need:
                self.places.append((i, None))
        self.tensor_args = tensor_args
        result = self._op(*self._primals())
        self.many = isinstance(result, tuple | list)
        parts = result if self.many else (result,)
        self.kinds = [isinstance(t, Tensor) and t.dtype.is_floating_point for t in parts]
        return result

    def _draws_random_numbers(self, args: tuple[Any, ...]) -> bool:
        """Whether the op is random; recurrent layers are only with dropout in training."""
        if torch.Tag.nondeterministic_seeded not in self.op.tags:
            return False
        named = dict(zip((a.name for a in self.op._schema.arguments), args, strict=True))
        return bool(named.get("train", True) and named.get("dropout", 1.0))

    def _primals(self) -> list[Tensor]:
        return [self.args[i] if j is None else self.args[i][j] for i, j in self.places]

    def _op(self, *primals: Tensor) -> Any:
        args = [list(a) if isinstance(a, list) else a for a in self.args]
        for (i, j), value in zip(self.places, primals, strict=True):
            if j is None:
                args[i] = value
            else:
                args[i][j] = value
        split = len(args) - len(self.kwarg_names)
        return self.op(*args[:split], **dict(zip(self.kwarg_names, args[split:], strict=True)))

    @contextmanager
    def _graph(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Build autograd's graph of the op: its leaves and its floating outputs."""
        try:
            # a parameter may be an inference tensor, which no graph can hold: its clone made here is none
            with torch.inference_mode(False), torch.enable_grad():
                leaves = [p.detach().clone().requires_grad_() for p in self._primals()]
                result = self._op(*leaves)
                parts = result if self.many else (result,)
                yield leaves, [t for t in parts if isinstance(t, Tensor) and t.dtype.is_floating_point]
        except (RuntimeError, NotImplementedError) as error:
            raise UnsupportedOpError(
                f"{self.op} has no rule, and torch cannot differentiate it twice: {str(error).splitlines()[0]}"
            ) from error

    def tangent(self, *dargs: Any) -> Any:
        chosen = [dargs[self.tensor_args.index(i)] for i, _ in self.places]
        self.dprimals = [d if j is None else d[j] for d, (_, j) in zip(chosen, self.places, strict=True)]
        with self._graph() as (leaves, outputs):
            # J' u is linear in u, so it may be taken at any u; zero keeps it finite wherever J is
            us = [torch.zeros_like(t).requires_grad_() for t in outputs]
            pulled = _gradients(outputs, leaves, us, create_graph=True)
            columns = [_gradients(pulled, us, ds) for ds in _columns(self.dprimals)]
        stacked = [torch.stack(parts) for parts in zip(*columns, strict=True)]
        return self._spread(stacked) if self.many else stacked[0]

    def _spread(self, floating: list[Tensor]) -> tuple[Tensor | None, ...]:
        """Put the floating outputs back among the others."""
        rest = iter(floating)
        return tuple(next(rest) if kind else None for kind in self.kinds)

    def _cotangents(self, g: Any, outputs: list[Tensor]) -> list[Tensor]:
        """List the cotangents of the floating outputs, zero where nothing uses one."""
        given = [g] if not self.many else [part for part, kind in zip(g, self.kinds, strict=True) if kind]
        k = next(part for part in given if part is not None).shape[0]
        return [t.new_zeros(k, *t.shape) if part is None else part for part, t in zip(given, outputs, strict=True)]

    def backward(self, g: Any) -> tuple[Any, ...]:
        with self._graph() as (leaves, outputs):
            gs = self._cotangents(g, outputs)
            return self._arrange([_gradients(outputs, leaves, column) for column in _columns(gs)])

    def backward_tangent(self, dg: Any, g: Any) -> tuple[Any, ...]:
        with self._graph() as (leaves, outputs):
            (g0,) = _columns(self._cotangents(g, outputs))
            pulled = _gradients(outputs, leaves, g0, create_graph=True)
            columns = []
            for dgc, ds in zip(_columns(self._cotangents(dg, outputs)), _columns(self.dprimals), strict=True):
                linear = _gradients(outputs, leaves, dgc)
                columns.append([a + b for a, b in zip(linear, _gradients(pulled, leaves, ds), strict=True)])
        return self._arrange(columns)

    def _arrange(self, columns: list[list[Tensor]]) -> tuple[Any, ...]:
        """Stack k results and give each to its argument."""
        results: list[Any] = [([None] * len(n) if isinstance(n, list) else None) for n in self.needs]
        for index, (i, j) in enumerate(self.places):
            value = torch.stack([column[index] for column in columns])
            position = self.tensor_args.index(i)
            if j is None:
                results[position] = value
            else:
                results[position][j] = value
        return tuple(results)


def _columns(blocks: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the vectors of a block; as copies, since autograd writes into cotangents, which may be expanded."""
    for c in range(blocks[0].shape[0]):
        yield [d[c].clone(memory_format=torch.contiguous_format) for d in blocks]


def _gradients(
    results: list[Tensor], leaves: list[Tensor], cotangents: list[Tensor], *, create_graph: bool = False
) -> list[Tensor]:
    """Pull cotangents back to the leaves; zeros where nothing depends on one, as where an op is linear."""
    moving = [(y, g) for y, g in zip(results, cotangents, strict=True) if y.requires_grad]
    if not moving:
        return [torch.zeros_like(leaf) for leaf in leaves]
    ys, gs = zip(*moving, strict=True)
    found = torch.autograd.grad(
        ys, leaves, gs, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return list(found)
