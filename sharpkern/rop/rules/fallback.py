"""The rule for any op that has none: that one op by torch's own derivatives, reverse over reverse. Never fast.

With y = f(x), pullbacks J'u, and the scalar <g, f>:
    dy = J d          the derivative of J'u along d, by u: J'u is linear in u
    d(gx) = J'dg + grad <grad <g, f>, d>: the Hessian of <g, f> is symmetric, so a second reverse pass gives it
Torch's forward mode of a backward is silently wrong for a family of ops (det, solve, cumprod at a zero, ...), and its
forward mode is missing for others; reverse over reverse is what the whole-model engine uses, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..rule import Op, Rule

T = TypeVar("T")


class UnsupportedOpError(RuntimeError):
    """torch has no derivative of this op that a Hessian needs."""


class Fallback(Rule):
    """Reverse passes over one op; one vector of the block after the other."""

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
        # Position of each differentiable tensor: (argument, None) or (argument, index in a list argument).
        tensor_args = [i for i, a in enumerate(self.op._schema.arguments) if "Tensor" in str(a.type)]
        self.places: list[tuple[int, int | None]] = []
        for i, need in zip(tensor_args, self.needs, strict=True):
            if isinstance(need, list):
                self.places += [(i, j) for j, flag in enumerate(need) if flag]
            elif need:
                self.places.append((i, None))
        self.tensor_args = tensor_args
        self._build(list(args))
        return self.values

    def _draws_random_numbers(self, args: tuple[Any, ...]) -> bool:
        """Whether the op is random; recurrent layers are only with dropout in training."""
        if torch.Tag.nondeterministic_seeded not in self.op.tags:
            return False
        named = dict(zip((a.name for a in self.op._schema.arguments), args, strict=True))
        return bool(named.get("train", True) and named.get("dropout", 1.0))

    def _build(self, args: list[Any]) -> None:
        """Run the op with a graph of its own, from leaves on the arguments' memory."""
        args = [list(a) if isinstance(a, list) else a for a in args]
        self.leaves: list[Tensor] = []
        for i, j in self.places:
            value = args[i] if j is None else args[i][j]
            # A new tensor on the same memory: nothing that the user holds gets a graph.
            leaf = value.detach().requires_grad_()
            self.leaves.append(leaf)
            if j is None:
                args[i] = leaf
            else:
                args[i][j] = leaf
        split = len(args) - len(self.kwarg_names)
        # Programs run under ``no_grad``.
        with torch.enable_grad():
            result: Any = self._guard(
                lambda: self.op(*args[:split], **dict(zip(self.kwarg_names, args[split:], strict=True)))
            )
        self.many = isinstance(result, tuple | list)
        parts = list(result) if self.many else [result]
        # What has no graph is constant in the leaves, whatever its dtype.
        self.ys = [y for y in parts if isinstance(y, Tensor) and y.requires_grad]
        if any(y.layout is not torch.strided for y in self.ys):
            raise UnsupportedOpError(f"{self.op} gives a sparse tensor that depends on the parameters.")
        self.kinds = [isinstance(y, Tensor) and y.requires_grad for y in parts]
        self.floating = [isinstance(y, Tensor) and y.dtype.is_floating_point for y in parts]
        detached = [y.detach() if isinstance(y, Tensor) else y for y in parts]
        self.shapes = [y.shape if isinstance(y, Tensor) else None for y in detached]
        self.values = (tuple(detached) if isinstance(result, tuple) else detached) if self.many else detached[0]
        self.pulled: list[Tensor | None] | None = None  # J'u, of the first tangent sweep
        self.slope: tuple[Any, list[Tensor | None]] | None = None  # g, and the gradient of <g, f>

    def tangent(self, *dargs: Any) -> Any:
        """Return ``J d``, for each of the k tangents."""
        chosen = [dargs[self.tensor_args.index(i)] for i, _ in self.places]
        picked = [d if j is None else d[j] for d, (_, j) in zip(chosen, self.places, strict=True)]
        # One tensor for each vector, on memory of its own: as_strided and its like read a gradient by storage offset.
        self.dprimals = [[column.clone() for column in d] for d in picked]
        if self.pulled is None:
            with torch.enable_grad():
                self.dummies = [torch.ones_like(y, requires_grad=True) for y in self.ys]  # 0 is a kink of log|u|
                self.pulled = self._guard(lambda: self._gradient(self.ys, self.leaves, self.dummies, create=True))
        columns = [self._guard(partial(self._along, c)) for c in range(len(self.dprimals[0]))]
        moved = iter([torch.stack([column[i] for column in columns]) for i in range(len(self.ys))])
        k = len(columns)
        results = [
            next(moved) if kind else self.leaves[0].new_zeros(k, *shape) if floats and shape is not None else None
            for kind, floats, shape in zip(self.kinds, self.floating, self.shapes, strict=True)
        ]
        return tuple(results) if self.many else results[0]

    def _along(self, c: int) -> list[Tensor]:
        assert self.pulled is not None
        pairs = [
            (p, d[c]) for p, d in zip(self.pulled, self.dprimals, strict=True) if p is not None and p.requires_grad
        ]
        # J'u without a graph does not depend on u: J is zero.
        if not pairs:
            return [torch.zeros_like(y) for y in self.ys]
        pulled, ds = zip(*pairs, strict=True)
        return [
            torch.zeros_like(y) if t is None else t
            for y, t in zip(self.ys, self._gradient(pulled, self.dummies, ds), strict=True)
        ]

    def _cotangents(self, g: Any, c: int) -> list[Tensor]:
        """Return column c of the cotangents of the outputs that have a graph; zero where there is none."""
        parts = g if self.many else (g,)
        chosen = [part for part, kind in zip(parts, self.kinds, strict=True) if kind]
        return [torch.zeros_like(y) if p is None else p[c].clone() for y, p in zip(self.ys, chosen, strict=True)]

    def backward(self, g: Any) -> tuple[Any, ...]:
        """Return ``J'g``, for each of the k cotangents."""
        k = next(t for t in (g if self.many else (g,)) if t is not None).shape[0]
        return self._arrange([self._pull(self._cotangents(g, c)) for c in range(k)])

    def _pull(self, cotangents: list[Tensor]) -> list[Tensor]:
        return self._filled(self._guard(lambda: self._gradient(self.ys, self.leaves, cotangents)))

    def backward_tangent(self, dg: Any, g: Any) -> tuple[Any, ...]:
        """Return ``J'dg`` and the second derivative of ``<g, f>`` along the tangents."""
        # By identity: one backward sweep gives all products the same g, and the gradient of <g, f> is kept for them.
        if self.slope is None or self.slope[0] is not g:
            with torch.enable_grad():
                at = self._cotangents(g, 0)
                self.slope = g, self._guard(lambda: self._gradient(self.ys, self.leaves, at, create=True))
        slope = self.slope[1]
        columns = []
        for c in range(len(self.dprimals[0])):
            pairs = [(s, d[c]) for s, d in zip(slope, self.dprimals, strict=True) if s is not None and s.requires_grad]
            # Where <g, f> has no second derivative, as for a linear op.
            second = [torch.zeros_like(leaf) for leaf in self.leaves]
            if pairs:
                slopes, ds = zip(*pairs, strict=True)
                second = self._filled(self._guard(partial(self._gradient, slopes, self.leaves, ds)))
            # Both parts apart: <dg, f> is only differentiated once.
            first = self._pull(self._cotangents(dg, c))
            columns.append([a + b for a, b in zip(first, second, strict=True)])
        return self._arrange(columns)

    def _gradient(
        self, ys: Sequence[Tensor], xs: Sequence[Tensor], gs: Sequence[Tensor], *, create: bool = False
    ) -> list[Tensor | None]:
        # The graph is kept for the next vector, and for the next product.
        return list(torch.autograd.grad(ys, xs, gs, create_graph=create, retain_graph=True, allow_unused=True))

    def _filled(self, parts: list[Tensor | None]) -> list[Tensor]:
        return [torch.zeros_like(x) if p is None else p for p, x in zip(parts, self.leaves, strict=True)]

    def _arrange(self, columns: list[list[Tensor]]) -> tuple[Any, ...]:
        """Stack k results and give each to its argument."""
        results: list[Any] = [([None] * len(n) if isinstance(n, list) else None) for n in self.needs]
        for index, (i, j) in enumerate(self.places):
            value = torch.stack([column[index].detach() for column in columns])
            position = self.tensor_args.index(i)
            if j is None:
                results[position] = value
            else:
                results[position][j] = value
        return tuple(results)

    def _guard(self, call: Callable[[], T]) -> T:
        try:
            return call()
        # What torch raises where an op has no second derivative differs from op to op.
        except (RuntimeError, NotImplementedError) as error:
            raise UnsupportedOpError(
                f"{self.op} has no rule, and torch cannot differentiate it twice: {str(error).splitlines()[0]}"
            ) from error
