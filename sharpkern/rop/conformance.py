"""Check one rule, anyone's, against the contract that ``Rule`` states. Whether its formulas are right, a truth says.

A rule can break the contract and still give the right numbers where it is first tried: in a program that uses a value
once, for one vector, unrecorded. ``check_rule`` looks at the promises themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .rule import Op, Rule, Selective, inner

_K = 3  # vectors in a block


def check_rule(cls: type[Rule], op: Op, args: Sequence[Any], needs: tuple[Any, ...] | None = None) -> None:
    """Run the methods of a rule on random tangents and cotangents, and compare what they do with the contract.

    Args:
        cls: the rule's class.
        op: the ATen overload that it is used for.
        args: the arguments of ``forward``, in the order of the op's schema; those left out at the end are not passed.
        needs: like ``Rule.needs``; None: every floating-point tensor.

    Raises:
        AssertionError: the rule breaks its contract; the sentence says how.

    Cost:
        One forward pass of the op, and about ten sweeps over it. The random numbers are its own.
    """
    # As a program calls a rule: one that needs gradients enables them by itself.
    with torch.no_grad():
        case = _Case(cls, op, args, needs)
        case.check_backward()
        case.check_wanted()
        case.check_products()


class _Case:
    """A rule after ``forward``, with cotangents and tangents for it."""

    def __init__(self, cls: type[Rule], op: Op, args: Sequence[Any], needs: tuple[Any, ...] | None) -> None:
        self.name = cls.__name__
        # Of its own: a check must not move the random state of who asks for it.
        self.generator = torch.Generator().manual_seed(0)
        pairs = zip(op._schema.arguments, args, strict=False)
        self.primals = [arg for argument, arg in pairs if "Tensor" in str(argument.type)]
        self.needs = tuple(_floating(p) for p in self.primals) if needs is None else needs
        self.rule = cls(op, self.needs)
        self.args = args
        y = self._call(self.rule.forward, *args)
        self.many = isinstance(y, tuple | list)
        ys = y if self.many else (y,)
        chosen = cls.differentiable
        self.outputs = [t if _floating(t) and (chosen is None or i in chosen) else None for i, t in enumerate(ys)]
        self.g, self.other = self._cotangent(), self._cotangent()
        # None for what does not need a tangent, as a program gives it.
        self.dargs = tuple(_each(self._random, p, n) for p, n in zip(self.primals, self.needs, strict=True))
        # Of mixed dtypes the coarsest rounds: a float32 result of bfloat16 arguments is no better than these.
        self.coarsest = min((t.dtype for t in _tensors((self.outputs, self.dargs))), key=lambda t: t.itemsize)

    def _random(self, like: Tensor, k: int = _K) -> Tensor:
        # On the CPU and in float64, then cast: the same numbers on every device and in every dtype.
        d = torch.randn(k, *like.shape, generator=self.generator, dtype=torch.float64)
        return d.to(like.device, like.dtype)

    def _cotangent(self) -> Any:
        parts = tuple(None if y is None else self._random(y, 1) for y in self.outputs)
        return parts if self.many else parts[0]

    def _call(self, method: Callable[..., Any], *inputs: Any) -> Any:
        """Call a method, and see that neither its inputs nor the primal arguments are written to."""
        watched = _tensors((inputs, self.args))
        before = [(t._version, t.clone()) for t in watched]
        result = method(*inputs)
        for t, (version, value) in zip(watched, before, strict=True):
            same = t._version == version and torch.equal(t.nan_to_num(), value.nan_to_num())  # kernels leave no version
            assert same, f"{self.name}.{method.__name__} writes into a tensor that it was given or that forward saved."
        return result

    def _backward(self, g: Any, when: str = "") -> list[Tensor | None]:
        """Return what ``backward`` gives the arguments that need it, one entry per tensor."""
        results = self._call(self.rule.backward, g)
        self._check_fits(results, "backward" + when, len(_tensors(g)[0]))
        return self._needed(results)

    def _needed(self, results: tuple[Any, ...]) -> list[Tensor | None]:
        return [t for r, n in zip(results, self.needs, strict=True) for t in _listed(_each(lambda t: t, r, n))]

    def _check_fits(self, results: tuple[Any, ...], method: str, k: int) -> None:
        message = f"{self.name}.{method} gives {len(results)} results for {len(self.primals)} tensor arguments."
        assert len(results) == len(self.primals), message
        primals = [t for p, n in zip(self.primals, self.needs, strict=True) for t in _listed(_each(lambda t: t, p, n))]
        for result, primal in zip(self._needed(results), primals, strict=True):
            if result is not None and primal is not None:
                self._check_like(result, primal, method, k)

    def _check_like(self, result: Tensor, primal: Tensor, method: str, k: int) -> None:
        got, want = (list(result.shape), result.dtype), ([k, *primal.shape], primal.dtype)
        assert got == want, f"{self.name}.{method} gives {got[0]} {got[1]}, and should give {want[0]} {want[1]}."

    def check_backward(self) -> None:
        """See that it is linear in g, in a block as alone."""
        # One block tells three things: that its columns do not mix, that it is linear, and that k may be 3.
        block = _map(lambda a, b: torch.cat([a, b, 2 * a - 3 * b]), self.g, self.other)
        self.alone = self._backward(self.g)
        for a, b, c in zip(self.alone, self._backward(self.other), self._backward(block), strict=True):
            if a is not None and b is not None and c is not None:
                sentence = f"{self.name}.backward of a block is not what it is of each cotangent, or not linear in g."
                _assert_close(c, torch.cat([a, b, 2 * a - 3 * b]), sentence, self.coarsest)

    def check_wanted(self) -> None:
        """See that a selective rule gives what is wanted and nothing else."""
        if not isinstance(self.rule, Selective):
            return
        for position, need in enumerate(self.needs):
            if need is True:
                wanted = tuple(i == position if not isinstance(n, list) else False for i, n in enumerate(self.needs))
                results = self._call(self.rule.backward, self.g, wanted)
                others = _tensors([r for i, r in enumerate(results) if i != position])
                assert not others, f"{self.name}.backward ignores what is wanted: it gives other cotangents too."
                want = self.rule.backward(self.g)[position]
                if want is not None:
                    sentence = f"{self.name}.backward gives another cotangent when it alone is wanted."
                    _assert_close(results[position], want, sentence)

    def check_products(self) -> None:
        """See that the tangent sweeps fit to ``backward``, keep nothing, and that ``prepare`` may run twice."""
        # The twin runs ``prepare`` twice, as the capture of a CUDA graph does, and must give the same product.
        twin, unprepared = copy.deepcopy(self.rule), copy.deepcopy(self.rule)
        twin.prepare(self.g)
        for rule in (self.rule, twin):
            self._call(rule.prepare, self.g)
            rule.forget_primals()
        # Addresses, since an attribute may be set anew to the same tensor. What is new after a product is not freed.
        before = _state(self.rule)
        dy = self._call(self.rule.tangent, *self.dargs)
        twin.tangent(*self.dargs)
        for early, late in zip(_tensors(unprepared.tangent(*self.dargs)), _tensors(dy), strict=True):
            _assert_close(early, late, f"{self.name}.tangent gives something else without prepare.")
        # <g, J d> = <J'g, d>: no truth is needed to see that the two disagree.
        self._check_tangent(dy)
        for a, b in zip(self._backward(self.g, " after tangent"), self.alone, strict=True):
            if a is not None and b is not None:
                _assert_close(a, b, f"{self.name}.backward gives something else after tangent.")
        dg = _map(lambda a, b: torch.cat([a, b, a + b]), self.g, self.other)
        results = self._call(self.rule.backward_tangent, dg, self.g)
        self._check_fits(results, "backward_tangent", _K)
        for a, b in zip(self._needed(results), self._needed(twin.backward_tangent(dg, self.g)), strict=True):
            if a is not None and b is not None:
                _assert_close(a, b, f"{self.name}.backward_tangent gives something else after a second prepare.")
        self.rule.forget_tangents()
        kept = [name for name, ids in _state(self.rule).items() if ids - before.get(name, set())]
        assert not kept, f"{self.name}.tangent sets {kept}, to be named in freed_after_reverse: they are never freed."

    def _check_tangent(self, dy: Any) -> None:
        """See that its results have the outputs' shapes and dtypes, and that ``backward`` is its adjoint."""
        pushed: Any = 0.0
        dys, gs = (v if self.many else (v,) for v in (dy, self.g))
        for d, y, g in zip(dys, self.outputs, gs, strict=True):
            if d is not None and y is not None:
                self._check_like(d, y, "tangent", _K)
                pushed = pushed + inner(g, d)
        pulled: Any = 0.0
        for d, a in zip([t for part in self.dargs for t in _listed(part)], self.alone, strict=True):
            if d is not None and a is not None:
                pulled = pulled + inner(a, d)
        dtype = self.coarsest
        _assert_close(pushed, pulled, f"{self.name}.backward is not the adjoint of tangent.", dtype)


def _floating(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_floating(v) for v in value]
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _each(f: Callable[[Any], Any], value: Any, need: Any) -> Any:
    """Apply f to an argument, or to those of a list argument that are needed; None for the others."""
    if isinstance(need, list):
        return [None] * len(need) if value is None else [f(v) if n else None for v, n in zip(value, need, strict=True)]
    return f(value) if need else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _map(f: Callable[[Tensor, Tensor], Tensor], a: Any, b: Any) -> Any:
    if isinstance(a, tuple):
        return tuple(_map(f, x, y) for x, y in zip(a, b, strict=True))
    return None if a is None else f(a, b)


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _state(rule: Rule) -> dict[str, set[int]]:
    """Name the attributes that hold tensors, those of rules inside too, with the addresses of their memory."""
    state: dict[str, set[int]] = {}
    for name, value in vars(rule).items():
        if isinstance(value, Rule):
            state.update({f"{name}.{inside}": ids for inside, ids in _state(value).items()})
        elif tensors := _tensors(value):
            state[name] = {t.untyped_storage().data_ptr() for t in tensors}
    return state


def _assert_close(got: Any, want: Any, sentence: str, dtype: torch.dtype | None = None) -> None:
    """Compare up to rounding, in units of the largest entry; entries that are not finite must be so in both."""
    # Between the rounding of a sum and a wrong formula, which is off by order 1: 6e-5 in float32, 2e-11 in float64, and
    # 0.26 in bfloat16, where no more can be told.
    tolerance = 10 * torch.finfo(want.dtype if dtype is None else dtype).eps ** 0.75
    got, want = (torch.as_tensor(t).double().nan_to_num() for t in (got, want))
    if got.numel():
        error, scale = float((got - want).abs().max()), float(want.abs().max())
        # A floor for results that are exactly zero.
        assert error <= tolerance * max(scale, 1e-30), f"{sentence} Off by {error:.2g}, of {scale:.2g}."
