"""The rule for any op that has none: ``torch.func`` on that one op. Always right, never fast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp

from ..rule import Op, Rule


class UnsupportedOpError(RuntimeError):
    """torch has no derivative of this op that a Hessian needs."""


class Fallback(Rule):
    """vjp, jvp, and the jvp of the vjp, of one op; one vector of the block after the other."""

    tangents = ("dprimals",)

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

    def _floating(self, *primals: Tensor) -> tuple[Tensor, ...]:
        result = self._op(*primals)
        parts = result if self.many else (result,)
        return tuple(t for t in parts if isinstance(t, Tensor) and t.dtype.is_floating_point)

    def tangent(self, *dargs: Any) -> Any:
        """Take the jvp of the op, for each of the k tangents."""
        chosen = [dargs[self.tensor_args.index(i)] for i, _ in self.places]
        self.dprimals = [d if j is None else d[j] for d, (_, j) in zip(chosen, self.places, strict=True)]
        primals = tuple(self._primals())
        k = self.dprimals[0].shape[0]
        columns = []
        for c in range(k):
            columns.append(self._guard(lambda c=c: jvp(self._floating, primals, tuple(d[c] for d in self.dprimals))[1]))
        stacked = [torch.stack([column[i] for column in columns]) for i in range(len(columns[0]))]
        return self._spread(stacked) if self.many else stacked[0]

    def _spread(self, floating: list[Tensor]) -> tuple[Tensor | None, ...]:
        """Put the floating outputs back among the others."""
        kinds = [isinstance(t, Tensor) and t.dtype.is_floating_point for t in self._op(*self._primals())]
        rest = iter(floating)
        return tuple(next(rest) if kind else None for kind in kinds)

    def _cotangent(self, g: Any, c: int) -> tuple[Tensor, ...]:
        if not self.many:
            return (g[c],)
        outputs = self._op(*self._primals())
        return tuple(
            torch.zeros_like(t) if gi is None else gi[c]
            for t, gi in zip(outputs, g, strict=True)
            if isinstance(t, Tensor) and t.dtype.is_floating_point
        )

    def backward(self, g: Any) -> tuple[Any, ...]:
        """Vjp of the op, for each of the k cotangents."""
        k = next(t for t in (g if self.many else (g,)) if t is not None).shape[0]
        pull = self._guard(lambda: vjp(self._floating, *self._primals()))[1]
        return self._arrange([self._guard(lambda c=c: pull(self._cotangent(g, c))) for c in range(k)])

    def backward_tangent(self, dg: Any, g: Any) -> tuple[Any, ...]:
        """Jvp of the vjp, in cotangent and arguments together."""
        g0 = self._cotangent(g, 0)
        k = self.dprimals[0].shape[0]
        columns = []
        for c in range(k):
            dgc = self._cotangent(dg, c)
            tangents = (dgc, tuple(d[c] for d in self.dprimals))
            columns.append(self._guard(lambda t=tangents: jvp(self._pull, (g0, tuple(self._primals())), t)[1]))
        return self._arrange(columns)

    def _pull(self, g: tuple[Tensor, ...], primals: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = vjp(self._floating, *primals)[1](g)
        return result

    def _arrange(self, columns: list[tuple[Tensor, ...]]) -> tuple[Any, ...]:
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

    def _guard(self, call: Any) -> Any:
        try:
            return call()
        except (RuntimeError, NotImplementedError) as error:
            raise UnsupportedOpError(
                f"{self.op} has no rule, and torch cannot differentiate it twice: {str(error).splitlines()[0]}"
            ) from error
