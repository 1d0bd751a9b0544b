"""Ops that only move numbers: views, concatenation, slices and their scatters. Linear, so ``backward`` is all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rule import LinearInArgs, Op, reduce_to, rule

aten = torch.ops.aten


@rule(
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
)  # fmt: skip
class Reshape(LinearInArgs):
    """The same numbers in another shape."""

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """Save both shapes."""
        # reshape, not view: a rule's result may have other strides than the op that the view was recorded after
        is_view = self.op._schema.name in ("aten::view", "aten::_unsafe_view")
        y: Tensor = x.reshape(args[0]) if is_view else self.op(x, *args)
        self.before, self.after = x.shape, y.shape
        return y

    def tangent(self, dx: Tensor) -> Tensor:
        """Return dx in the shape of the result, behind k."""
        # By the shapes, not by the op's own arguments, which do not know of k.
        return dx.reshape(dx.shape[0], *self.after)

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Return g in the shape of x, behind k."""
        return (g.reshape(g.shape[0], *self.before),)


@rule(aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.mT.default)
class Permute(LinearInArgs):
    """Dimensions in another order."""

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """Save the order."""
        y: Tensor = self.op(x, *args)
        order = list(range(x.ndim))
        if self.op is aten.permute.default:
            order = [d % max(1, x.ndim) for d in args[0]]
        elif self.op is aten.transpose.int:
            a, b = (d % max(1, x.ndim) for d in args)
            if order:
                order[a], order[b] = order[b], order[a]
        elif self.op is aten.mT.default:
            order[-1], order[-2] = order[-2], order[-1]
        else:
            order.reverse()
        self.order = [0, *(d + 1 for d in order)]
        self.inverse = [self.order.index(d) for d in range(len(self.order))]
        return y

    def tangent(self, dx: Tensor) -> Tensor:
        """Return dx in the new order, behind k."""
        return dx.permute(self.order)

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Return g in the old order, behind k."""
        return (g.permute(self.inverse),)


@rule(aten.expand.default, aten.broadcast_to.default)
class Expand(LinearInArgs):
    """Broadcast to a shape."""

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """Save both shapes."""
        y: Tensor = self.op(x, args[0])
        self.before, self.after = x.shape, y.shape
        return y

    def tangent(self, dx: Tensor) -> Tensor:
        """Expand, after k."""
        missing = len(self.after) - len(self.before)
        # The new dimensions come between k and those of x.
        return dx.reshape(dx.shape[0], *([1] * missing), *self.before).expand(dx.shape[0], *self.after)

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Sum what was broadcast."""
        return (reduce_to(g, self.before),)


@rule(aten.select.int, aten.slice.Tensor, aten.diagonal.default)
class Part(LinearInArgs):
    """A part of x; the rest of its cotangent is zero."""

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """Save how to take the part, one dimension further."""
        y: Tensor = self.op(x, *args)
        self.shape = x.shape
        if self.op is aten.diagonal.default:
            offset, first, second = args
            self.args: tuple[Any, ...] = (offset, first % x.ndim + 1, second % x.ndim + 1)
        else:
            self.args = (args[0] % x.ndim + 1, *args[1:])
        return y

    def tangent(self, dx: Tensor) -> Tensor:
        """Return the same part of dx."""
        part: Tensor = self.op(dx, *self.args)
        return part

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Put the part into zeros."""
        gx = g.new_zeros(g.shape[0], *self.shape)
        # The op gives a view of the zeros: to write there is its adjoint.
        self.op(gx, *self.args).copy_(g)
        return (gx,)


@rule(aten.select_scatter.default, aten.slice_scatter.default, aten.diagonal_scatter.default)
class Scatter(LinearInArgs):
    """x with a part replaced by src: what an assignment to a view becomes."""

    def __init__(self, op: Op, needs: tuple[Any, ...]) -> None:
        super().__init__(op, needs)
        self.part = {
            aten.select_scatter.default: aten.select.int,
            aten.slice_scatter.default: aten.slice.Tensor,
            aten.diagonal_scatter.default: aten.diagonal.default,
        }[op]

    def forward(self, x: Tensor, src: Tensor, *args: Any) -> Tensor:
        """Save how to take the part, one dimension further."""
        y: Tensor = self.op(x, src, *args)
        self.x_shape, self.src_shape = x.shape, src.shape
        if self.part is aten.diagonal.default:
            offset, first, second = args
            self.args: tuple[Any, ...] = (offset, first % x.ndim + 1, second % x.ndim + 1)
        else:
            self.args = (args[0] % x.ndim + 1, *args[1:])
        return y

    def tangent(self, dx: Tensor | None, dsrc: Tensor | None) -> Tensor:
        """Replace the part of dx by dsrc."""
        if dx is None:
            assert dsrc is not None
            dx = dsrc.new_zeros(dsrc.shape[0], *self.x_shape)
        else:
            # A copy: dx may be another step's tangent, and a part of it is overwritten.
            dx = dx.clone()
        part = self.part(dx, *self.args)
        if dsrc is None:
            # What was assigned does not move, and what it replaced no longer counts.
            part.zero_()
        else:
            part.copy_(dsrc)
        return dx

    def backward(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """Give the part to src and the rest to x."""
        gx = gsrc = None
        if self.needs[1]:
            gsrc = self.part(g, *self.args).clone()
        if self.needs[0]:
            gx = g.clone()
            self.part(gx, *self.args).zero_()
        return gx, gsrc


@rule(aten.cat.default)
class Cat(LinearInArgs):
    """Concatenation along a dimension."""

    def forward(self, tensors: list[Tensor], dim: int = 0) -> Tensor:
        """Save the sizes."""
        self.shapes, self.dtypes = [t.shape for t in tensors], [t.dtype for t in tensors]
        y = torch.cat(tensors, dim)
        self.dim, self.rank, self.dtype = dim % y.ndim, y.ndim, y.dtype
        return y

    def tangent(self, dtensors: list[Tensor | None]) -> Tensor:
        """Concatenate, with zeros for what does not depend on the parameters."""
        first = next(d for d in dtensors if d is not None)
        k = first.shape[0]
        # A list of parameters and constants has tangents for some only, and torch promotes mixed dtypes.
        parts = [
            first.new_zeros(k, *shape, dtype=self.dtype) if d is None else d.to(self.dtype)
            for d, shape in zip(dtensors, self.shapes, strict=True)
            if len(shape) == self.rank  # torch lets empty vectors take part in any concatenation
        ]
        return torch.cat(parts, self.dim + 1)

    def backward(self, g: Tensor) -> tuple[list[Tensor]]:
        """Cut g where the tensors meet."""
        sizes = [shape[self.dim] if len(shape) == self.rank else 0 for shape in self.shapes]
        parts = zip(g.split(sizes, self.dim + 1), self.shapes, self.dtypes, strict=True)
        return (
            [p.to(dtype) if len(s) == self.rank else g.new_zeros(g.shape[0], 0, dtype=dtype) for p, s, dtype in parts],
        )


@rule(aten.stack.default)
class Stack(LinearInArgs):
    """Concatenation along a new dimension."""

    def forward(self, tensors: list[Tensor], dim: int = 0) -> Tensor:
        """Save the dimension."""
        self.dim = dim % (tensors[0].ndim + 1)
        self.dtypes = [t.dtype for t in tensors]
        y = torch.stack(tensors, dim)
        self.dtype = y.dtype
        return y

    def tangent(self, dtensors: list[Tensor | None]) -> Tensor:
        """Stack, with zeros for what does not depend on the parameters."""
        first = next(d for d in dtensors if d is not None).to(self.dtype)
        parts = [torch.zeros_like(first) if d is None else d.to(self.dtype) for d in dtensors]
        return torch.stack(parts, self.dim + 1)

    def backward(self, g: Tensor) -> tuple[list[Tensor]]:
        """Return the slices of g along the new dimension."""
        return ([p.to(dtype) for p, dtype in zip(g.unbind(self.dim + 1), self.dtypes, strict=True)],)


@rule(
    aten.split.Tensor, aten.split_with_sizes.default, aten.split_with_sizes_copy.default, aten.unbind.int,
    aten.chunk.default,
)  # fmt: skip
class Split(LinearInArgs):
    """Several parts along a dimension."""

    def forward(self, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """Save the sizes."""
        dim = args[-1] if len(args) > (0 if self.op is aten.unbind.int else 1) else 0
        self.dim = dim % x.ndim
        parts: tuple[Tensor, ...] = tuple(self.op(x, *args))
        self.unbinds = self.op is aten.unbind.int
        self.shapes = [p.shape for p in parts]
        self.sizes = [1 if self.unbinds else p.shape[self.dim] for p in parts]
        return parts

    def tangent(self, dx: Tensor) -> tuple[Tensor, ...]:
        """Return the same parts of dx."""
        d = self.dim + 1
        return tuple(dx.unbind(d)) if self.unbinds else tuple(dx.split(self.sizes, d))

    def backward(self, g: tuple[Tensor | None, ...]) -> tuple[Tensor]:
        """Concatenate, with zeros for unused parts."""
        first = next(p for p in g if p is not None)
        parts = [first.new_zeros(first.shape[0], *s) if p is None else p for p, s in zip(g, self.shapes, strict=True)]
        d = self.dim + 1
        return (torch.stack(parts, d) if self.unbinds else torch.cat(parts, d),)


@rule(aten.flip.default, aten.roll.default)
class Reorder(LinearInArgs):
    """Entries in reverse, or rolled."""

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """Save the arguments, one dimension further."""
        y: Tensor = self.op(x, *args)
        self.shape = x.shape
        if self.op is aten.flip.default:
            dims = [d % x.ndim + 1 for d in args[0]]
            self.there: tuple[Any, ...] = (dims,)
            self.back: tuple[Any, ...] = (dims,)
        else:
            shifts, dims = args[0], [d % x.ndim + 1 for d in args[1]]
            self.there, self.back = (shifts, dims), ([-s for s in shifts], dims)
            # Without dimensions torch rolls the flat numbers, of which k must not be a part.
            self.flat = not dims
        return y

    def _move(self, d: Tensor, args: tuple[Any, ...]) -> Tensor:
        if self.op is aten.roll.default and self.flat:
            return torch.roll(d.reshape(d.shape[0], -1), args[0], [1]).view(d.shape)
        moved: Tensor = self.op(d, *args)
        return moved

    def tangent(self, dx: Tensor) -> Tensor:
        """Move the entries of dx as those of x."""
        return self._move(dx, self.there)

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Move the entries of g back: the adjoint of a permutation is its inverse."""
        return (self._move(g, self.back),)


@rule(aten.tril.default, aten.triu.default)
class Triangle(LinearInArgs):
    """One triangle of the last two dimensions."""

    def forward(self, x: Tensor, diagonal: int = 0) -> Tensor:
        """Save the diagonal."""
        self.diagonal = diagonal
        y: Tensor = self.op(x, diagonal)
        return y

    def tangent(self, dx: Tensor) -> Tensor:
        """Return the triangle of dx."""
        y: Tensor = self.op(dx, self.diagonal)
        return y

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Return the triangle of g: a projection is its own adjoint."""
        return (self.tangent(g),)


@rule(aten.constant_pad_nd.default)
class Pad(LinearInArgs):
    """Constant padding; negative sizes crop."""

    def forward(self, x: Tensor, pad: list[int], value: Any = 0) -> Tensor:
        """Save the padding."""
        self.pad = pad
        y: Tensor = self.op(x, pad, value)
        return y

    def tangent(self, dx: Tensor) -> Tensor:
        """Pad dx with zeros, whatever the constant."""
        # What is padded is constant. Sizes count from the last dimension, so that k in front changes nothing.
        y: Tensor = self.op(dx, self.pad, 0)
        return y

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Crop g to x; where x was cropped, pad with zeros."""
        gx: Tensor = self.op(g, [-p for p in self.pad], 0)
        return (gx,)


@rule(aten.repeat.default)
class Repeat(LinearInArgs):
    """x, repeated as tiles along each dimension."""

    def forward(self, x: Tensor, repeats: list[int]) -> Tensor:
        """Save the tiling."""
        self.shape, self.repeats = x.shape, repeats
        return x.repeat(repeats)

    def tangent(self, dx: Tensor) -> Tensor:
        """Return dx, repeated likewise."""
        missing = len(self.repeats) - len(self.shape)
        return dx.reshape(dx.shape[0], *([1] * missing), *self.shape).repeat(1, *self.repeats)

    def backward(self, g: Tensor) -> tuple[Tensor]:
        """Sum g over the tiles."""
        if not self.repeats:  # of a scalar; torch sums over everything where no dimension is named
            return (g,)
        missing = len(self.repeats) - len(self.shape)
        shape = [1] * missing + list(self.shape)
        # Each dimension is split into its tiles and the place within one; then the tiles are added up.
        tiled = g.reshape(g.shape[0], *(n for r, s in zip(self.repeats, shape, strict=True) for n in (r, s)))
        return (tiled.sum([1 + 2 * i for i in range(len(shape))]).reshape(g.shape[0], *self.shape),)
