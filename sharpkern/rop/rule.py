"""The four methods of a rule, and the table from ATen op to rule.

Names, throughout ``rop/``: a ``d`` prefix is a tangent (directional derivative along v), a ``g`` prefix is a cotangent
(derivative of the loss). So ``dg`` is the tangent of a cotangent. Tangents and cotangents carry a leading dimension k,
one slice for each vector of the block; the primal sweep's own cotangents have k = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..kernels.precision import wide

# An OpOverload, which torch keeps private, or a function of this package (``rules/head.py``).
Op = Any  # torch._ops.OpOverload
RULES: dict[Op, type[Rule]] = {}


class Rule:
    """One op of the program: what its forward pass saved, and the sweeps over it.

    ``tangent``, ``backward`` and ``backward_tangent`` see the *tensor* arguments of the op's schema, in order: one
    entry each (a list for ``Tensor[]``). An entry is None where the argument is no tensor or does not depend on the
    parameters. Results follow the same order. An op with several outputs gives and takes tuples, in which an entry is
    None where the output has no derivative or nobody uses it.

    The contract of a rule, which ``conformance.check_rule`` tests:

    - ``needs`` has an entry per tensor argument (a list for ``Tensor[]``): does the argument depend on the parameters?
      It is fixed for the life of the rule. Cotangents of other arguments are ignored; None is best.
    - No method writes into its arguments, nor into what it saved of them.
    - A result may be an argument, a view of one, or expanded: the program copies before it adds. Its shape and dtype
      are those of the output (``tangent``) or of the argument (``backward``), after the leading k.
    - ``backward`` is linear in g for any k, saves nothing of g, and gives the same before and after ``tangent``.
    - ``prepare`` runs after ``backward`` and before the first ``tangent``, perhaps twice: the capture of a CUDA graph
      warms up first.
    - ``tangent`` gives the same without ``prepare``, of which it reads something only to begin a result in its place.
    - ``backward_tangent`` or ``second_order`` follows the ``tangent`` whose saved values it reads.
    - What ``tangent`` saves is named in ``freed_after_reverse``: it is set to None once the reverse sweep has passed.
      What only ``forward`` and ``prepare`` read may be named in ``freed_before_tangent``; a new ``forward`` sets it.
    - No method reads values into Python (``.item()``, ``nonzero``): the sweeps could no longer be recorded, and the
      whole model would run without its recordings.
    - All work goes through torch's dispatcher or the package's kernels, for only these are recorded. What NumPy, say,
      computes would be frozen; the recorder refuses it.
    - A rule holds no ``Fallback``. Where constant arguments decide that there is no closed form, ``for_`` returns
      None, and the program names the op in ``fallback_ops``.
    """

    differentiable: tuple[int, ...] | None = None  # indices of the differentiable outputs; None: every floating one
    can_end_program = False  # a loss: as the last op its tangent may be None, and its dg, which is zero, is None
    ends_program = False
    keeps_cotangent = True  # products need the primal's cotangent of the result, after ``prepare``
    freed_after_reverse: tuple[str, ...] = ()  # attributes that ``tangent`` sets for ``backward_tangent``
    freed_before_tangent: tuple[str, ...] = ()  # attributes that ``forward`` sets for ``prepare`` alone

    def __init__(self, op: Op, needs: tuple[Any, ...]) -> None:
        self.op = op
        self.needs = needs
        # By argument. Empty between two products, so that a rule never keeps a caller's result alive.
        self._places: dict[int, Tensor] = {}

    @classmethod
    def for_(cls, template: list[Any]) -> type[Rule] | None:  # noqa: ARG003
        """Choose the class for the op's constant arguments (schema order, None for tensors); None: the fallback."""
        return cls

    def forward(self, *args: Any) -> Any:
        """Run the op on all its schema arguments (positional, in order); save what the other sweeps need."""
        raise NotImplementedError

    def tangent(self, *dargs: Any) -> Any:
        """Map tangents ``[k, *shape]`` of the arguments to the tangent ``[k, *shape]`` of the result."""
        raise NotImplementedError

    def backward(self, g: Any) -> tuple[Any, ...]:
        """Map a cotangent ``[k, *shape]`` of the result to those of the arguments: linear in g."""
        raise NotImplementedError

    def pull_back(self, g: Any, wanted: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return ``backward(g)`` for some arguments, given like ``needs``; None for the others."""
        return _only(self.backward(g), wanted) if any_of(wanted) else (None,) * len(wanted)

    def prepare(self, g: Any) -> None:
        """Compute what all products at these parameters share, from the primal's cotangent g ``[1, *shape]``."""

    def backward_tangent(self, dg: Any, g: Any) -> tuple[Any, ...]:
        """Return the tangent of ``backward(g)`` along the last ``tangent``: dg ``[k, *shape]``, g ``[1, *shape]``."""
        raise NotImplementedError

    def second_order(self, dargs: tuple[Any, ...], g: Any) -> Tensor | None:
        """Return ``<g, f''[d, d]>`` ``[k]`` along the last ``tangent``, whose arguments come again; None where zero.

        The sum over all ops is v'Hv. ``backward_tangent`` of a zero dg is ``g f''[d, .]``: one more contraction with
        the tangents makes any rule's second order; rules with expensive products have a cheaper way.
        """
        # From a tangent: g belongs to the primal and has k = 1.
        k = next(d for d in _flat(dargs) if d is not None).shape[0]
        # g is fixed, so its tangent is zero. A tensor of zeros and not None: only a rule that ends the program has to
        # understand None. Its own cotangent is the constant 1.
        dg = None if self.ends_program else pytree.tree_map_only(Tensor, lambda t: t.new_zeros(k, *t.shape[1:]), g)
        results = self.backward_tangent(dg, g)
        total = None
        for d, part in zip(_flat(dargs), _flat(results), strict=True):
            if d is not None and part is not None:
                total = inner(part, d) if total is None else total + inner(part, d)
        return total

    def forget_primals(self) -> None:
        """Free what only ``forward`` and ``prepare`` read: products begin."""
        for name in self.freed_before_tangent:
            setattr(self, name, None)

    def forget_tangents(self) -> None:
        """Free what ``tangent`` saved: the sweep has passed."""
        for name in self.freed_after_reverse:
            setattr(self, name, None)

    def write_to(self, position: int, place: Tensor | None) -> None:
        """Let the result for an argument go to a part ``[k, *shape]`` of the flat result; None: no longer."""
        if place is None:
            self._places.pop(position, None)
        else:
            self._places[position] = place

    def place(self, position: int, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
        """Return the argument's part of the flat result; None where the result cannot go there directly."""
        place = self._places.get(position)
        return place if place is not None and place.dtype == like.dtype and place.shape == shape else None

    def result(self, position: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return memory for the result for an argument: its part of the flat result, or a new tensor."""
        place = self.place(position, shape, like)
        return like.new_empty(shape) if place is None else place


class Selective(Rule):
    """A rule whose ``backward`` can omit the work for some arguments."""

    def backward(self, g: Any, wanted: tuple[Any, ...] | None = None) -> tuple[Any, ...]:
        """Map g to the cotangents of the wanted arguments, given like ``needs``; None: of all that ``needs`` names."""
        raise NotImplementedError

    def pull_back(self, g: Any, wanted: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return ``backward(g, wanted)``, so that nothing else is computed."""
        return _only(self.backward(g, wanted), wanted) if any_of(wanted) else (None,) * len(wanted)


class LinearInArgs(Rule):
    """An op that is linear in all its differentiable arguments together: second derivatives vanish."""

    keeps_cotangent = False

    def backward_tangent(self, dg: Any, g: Any) -> tuple[Any, ...]:  # noqa: ARG002
        """Return ``backward(dg)``."""
        return self.backward(dg)

    def second_order(self, dargs: tuple[Any, ...], g: Any) -> None:  # noqa: ARG002
        """Return None: there is no second derivative."""


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products ``[k]``, float64, of ``[k or 1, *shape]`` with ``[k, *shape]``."""
    # A product of 16-bit numbers summed in 16 bits would keep two digits. The sum within an op is in the model's
    # precision, as its other sums are; those of different ops may cancel, so from here on it is float64.
    a, b = (wide(t.reshape(t.shape[0], -1)) for t in (a, b))
    return torch.linalg.vecdot(a, b).double()


def any_of(needs: tuple[Any, ...]) -> bool:
    """Whether anything is needed, of an entry for each argument like ``Rule.needs``."""
    return any(any(need) if isinstance(need, list) else need for need in needs)


def _only(results: tuple[Any, ...], wanted: tuple[Any, ...]) -> tuple[Any, ...]:
    """Replace what is not wanted by None."""
    return tuple(
        (None if result is None else [part if flag else None for part, flag in zip(result, want, strict=True)])
        if isinstance(want, list)
        else (result if want else None)
        for result, want in zip(results, wanted, strict=True)
    )


def _flat(values: Any) -> list[Tensor | None]:
    return [t for v in values for t in (v if isinstance(v, list) else [v])]


def rule(*ops: Op) -> Callable[[type[Rule]], type[Rule]]:
    """Register a class as the rule of these ATen overloads."""

    def register(cls: type[Rule]) -> type[Rule]:
        for op in ops:
            RULES[op] = cls
        return cls

    return register


def align(d: Tensor, ndim: int) -> Tensor:
    """View a tangent ``[k, *shape]`` so that it broadcasts against ``[k, *(ndim dims)]``: ones after k."""
    # Broadcasting aligns shapes at their end: without the ones, k would meet a dimension of the other argument.
    missing = ndim + 1 - d.ndim
    return d if missing <= 0 else d.reshape(d.shape[0], *([1] * missing), *d.shape[1:])


def reduce_to(g: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Sum a cotangent ``[k, *broadcast]`` down to ``[k, *shape]``: the adjoint of broadcasting."""
    if g.shape[1:] == shape:
        return g
    extra = g.ndim - 1 - len(shape)
    dims = list(range(1, 1 + extra))
    # Only what was 1 and no longer is: a dimension of size 1 on both sides has nothing to add up.
    dims += [i + 1 + extra for i, size in enumerate(shape) if size == 1 and g.shape[i + 1 + extra] != 1]
    # torch sums over every dimension, k too, where the list of dimensions is empty.
    return g.sum(dims).reshape(g.shape[0], *shape) if dims else g.reshape(g.shape[0], *shape)


def fold(d: Tensor) -> Tensor:
    """Merge k into the batch: ``[k, N, ...] -> [k*N, ...]``."""
    return d.reshape(-1, *d.shape[2:])
