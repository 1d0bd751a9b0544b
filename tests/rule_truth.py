"""One rule at a time through the whole program, against ``torch.func`` in float64.

``check`` takes any functional loss; ``check_op`` wraps one op so that every term of its rule matters: parameters
go through a curved map, then the op, then a weighted sum of squares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev, jvp

from sharpkern.curvature.losses import FunctionalLoss
from sharpkern.rop import Program, ReplayedProgram, export
from sharpkern.rop.conformance import check_rule
from sharpkern.rop.rule import RULES, Rule
from sharpkern.rop.rules.fallback import Fallback

Loss = Callable[[Mapping[str, Tensor], Any], Tensor]


def check(
    params: Mapping[str, Tensor],
    loss_fn: Loss,
    batch: Any = None,
    *,
    rule: type[Rule] | None = None,
    op: Any = None,
    truth: Callable[[Loss, dict[str, Tensor], Any, dict[str, Tensor]], dict[str, Tensor]] | None = None,
    fallback: tuple[str, ...] = (),
    reference: Loss | None = None,
    tolerance: float = 1e-10,
    values: int = 2,
) -> Program:
    """Compare gradient and products with the truth, at several parameter values, for one and three vectors.

    ``rule`` and ``op`` must be among the program's live steps; ``fallback`` lists the ops expected there.
    ``reference`` is the same loss in other words, where torch's own derivative of ``loss_fn`` is not exact.
    """
    params = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
    module = FunctionalLoss(params, loss_fn)
    tied = dict(zip(params, module.values, strict=True))
    program = Program(export(module, (batch,) if batch is None else batch), tied)
    _assert_on_the_path(program, rule, op, fallback)
    replayed = ReplayedProgram(Program(export(module, (batch,) if batch is None else batch), tied))
    seen = [_watch(step.rule) for step in program.live]
    leaves = torch.utils._pytree.tree_leaves((batch,) if batch is None else batch)
    for _ in range(values):  # the second time at other parameters: nothing may be left from the first
        _compare(
            program,
            module,
            tied,
            reference or loss_fn,
            batch,
            leaves,
            truth or forward_over_reverse,
            tolerance,
        )
        for step, calls in zip(program.live, seen, strict=True):
            _backward_is_linear_in_blocks(step, calls["g"])
            if not isinstance(step.rule, Fallback):
                check_rule(type(step.rule), step.op, calls["args"], step.rule.needs)
        _replays_the_same(program, replayed, module, leaves)
        with torch.no_grad():
            for p in tied.values():
                p.add_(0.1 * torch.randn_like(p))
    return program


def check_op(
    f: Callable[..., Any],
    *shapes: tuple[int, ...],
    op: Any = None,
    rule: type[Rule] | None = None,
    inner: Callable[[Tensor], Tensor] | None = None,
    reference: Callable[..., Any] | None = None,
    **options: Any,
) -> Program:
    """Check ``f`` of one curved parameter per shape, with a weighted sum of squares of all its outputs."""
    inner = inner or curved
    params = {f"p{i}": torch.randn(shape, dtype=torch.float64) for i, shape in enumerate(shapes)}
    weights = [torch.randn_like(y) for y in _floating(f(*(inner(p) for p in params.values())))]

    def loss_of(function: Callable[..., Any]) -> Loss:
        def loss(p: Mapping[str, Tensor], _: Any) -> Tensor:
            ys = _floating(function(*(inner(p[name]) for name in params)))
            return sum((w * y * y).sum() + (w * y).sum() for w, y in zip(weights, ys, strict=True))

        return loss

    expected = rule or RULES.get(op)
    other = None if reference is None else loss_of(reference)
    return check(params, loss_of(f), op=op, rule=expected, reference=other, **options)


def curved(p: Tensor) -> Tensor:
    """Map onto (-2, 2)."""
    return 2 * torch.tanh(p)


def positive(p: Tensor) -> Tensor:
    """Map onto [0.3, inf)."""
    return 0.3 + p * p


def within_one(p: Tensor) -> Tensor:
    """Map onto (-0.9, 0.9)."""
    return 0.9 * torch.tanh(p)


def forward_over_reverse(
    loss_fn: Loss, primals: dict[str, Tensor], batch: Any, v: dict[str, Tensor]
) -> dict[str, Tensor]:
    """``jvp(jacrev(loss))``."""
    product: dict[str, Tensor] = jvp(jacrev(lambda p: loss_fn(p, batch)), (primals,), (v,))[1]
    return product


def double_backward(loss_fn: Loss, primals: dict[str, Tensor], batch: Any, v: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reverse over reverse, where torch's forward mode is the one that is wrong or missing."""
    leaves = {name: p.clone().requires_grad_() for name, p in primals.items()}
    grads = torch.autograd.grad(
        loss_fn(leaves, batch), list(leaves.values()), create_graph=True, materialize_grads=True
    )
    dot = sum((g * v[name]).sum() for g, name in zip(grads, leaves, strict=True))
    hv = torch.autograd.grad(dot, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, hv, strict=True))


def product(program: Program, block: Tensor) -> Tensor:
    """Multiply the Hessian with the rows of a block."""
    result = torch.empty_like(block)
    program.hvp(block, result)
    return result


def quadratic_form(program: Program, block: Tensor) -> Tensor:
    """Return ``v'Hv`` for the rows of a block."""
    result = block.new_empty(len(block), dtype=torch.float64)
    program.quadratic_form(block, result)
    return result


def _compare(
    program: Program,
    module: Any,
    params: Any,
    loss_fn: Any,
    batch: Any,
    leaves: Any,
    truth: Any,
    tol: float,
) -> None:
    primals = {name: p.detach().clone() for name, p in params.items()}
    loss = program.forward(module, leaves)
    for _ in range(2):  # as the capture of a CUDA graph does: once to warm up, once to record
        program.backward()
    program.gradient(gradient := program.layout.empty(1))
    _close(loss, loss_fn(primals, batch), tol, "loss")
    wanted = torch.autograd.grad(loss_fn(params, batch), list(params.values()), materialize_grads=True)
    _close(gradient, torch.cat([g.reshape(-1) for g in wanted]), tol, "gradient")
    block = torch.randn(3, program.layout.n, dtype=torch.float64)
    want = torch.stack([_flat(truth(loss_fn, primals, batch, _named(params, v))) for v in block])
    three = product(program, block)
    _close(three, want, tol, "Hv, k = 3")
    _close(product(program, block[1:2]), want[1:2], tol, "Hv, k = 1")
    _close(product(program, block), three, 0.0, "Hv again")
    forms = quadratic_form(program, block)
    size = block.norm(dim=1) * want.norm(dim=1)
    assert bool(((forms - (block * want).sum(1)).abs() <= tol * size).all()), "v'Hv, k = 3"
    assert bool(((quadratic_form(program, block[:1]) - forms[:1]).abs() <= tol * size[0]).all()), "v'Hv, k = 1"
    uhv, vhu = (block[0] * three[1]).sum(), (block[1] * three[0]).sum()
    size = block[0].norm() * three[1].norm()
    assert abs(uhv - vhu) <= tol * size, f"u'Hv - v'Hu = {uhv - vhu:.3g}, |u||Hv| = {size:.3g}"


def _replays_the_same(program: Program, replayed: ReplayedProgram, module: Any, leaves: Any) -> None:
    """Recorded sweeps give what the program gives, at the first call, which records, and at the second."""
    replayed.forward(module, leaves)
    replayed.backward()
    program.gradient(gradient := program.layout.empty(1))
    _close(replayed.gradient(), gradient[0], 1e-12, "gradient, recorded")
    for block in torch.randn(2, 2, program.layout.n, dtype=torch.float64):
        want = product(program, block)
        _close(replayed.hvp(block[:1]), want[:1], 1e-12, "Hv, recorded")
        _close(replayed.hvp(block), want, 1e-12, "Hv, k = 2, recorded")
        forms, recorded = quadratic_form(program, block), replayed.quadratic_form(block)
        size = float((block.norm(dim=1) * want.norm(dim=1)).max())
        assert float((recorded - forms).abs().max()) <= 1e-12 * max(size, 1e-30), "v'Hv, recorded"


def _backward_is_linear_in_blocks(step: Any, like: Any) -> None:
    """``backward`` of k cotangents is k times ``backward`` of one (the GGN's use of it)."""
    gs = [_random_like(like) for _ in range(2)]
    both = _results(step.rule.backward(_together(gs)))
    single = [_results(step.rule.backward(g)) for g in gs]
    for together, *apart in zip(both, *single, strict=True):
        if together is not None:
            _close(together, torch.cat(apart), 1e-12, f"{step.op}: backward of a block")


def _random_like(g: Any) -> Any:
    if isinstance(g, tuple):
        return tuple(_random_like(part) for part in g)
    return None if g is None else torch.randn_like(g)


def _together(gs: list[Any]) -> Any:
    if isinstance(gs[0], tuple):
        return tuple(_together(list(parts)) for parts in zip(*gs, strict=True))
    return None if gs[0] is None else torch.cat(gs)


def _results(results: tuple[Any, ...]) -> list[Tensor | None]:
    flat: list[Tensor | None] = []
    for r in results:
        flat += r if isinstance(r, list) else [r]
    return [None if r is None else r.clone() for r in flat]


def _assert_on_the_path(program: Program, rule: Any, op: Any, fallback: tuple[str, ...]) -> None:
    seen = [f"{step.op}: {type(step.rule).__name__}" for step in program.live]
    assert tuple(program.fallback_ops) == fallback, f"on the fallback: {program.fallback_ops}"
    if op is not None:
        assert any(step.op is op for step in program.live), f"{op} is not among {seen}"
    if rule is not None:
        steps = [step for step in program.live if op is None or step.op is op]
        assert any(type(step.rule) is rule for step in steps), f"{rule.__name__} is not among {seen}"


def _watch(rule: Any) -> dict[str, Any]:
    """Wrap a rule's methods: results have their arguments' shapes and dtypes, and inputs stay as they are.

    Returns what the calls have seen last: the result of ``forward``, the cotangent ``g`` of ``backward``.
    """
    forward, tangent, backward, second = rule.forward, rule.tangent, rule.backward, rule.backward_tangent
    seen: dict[str, Any] = {}

    def watched_forward(*args: Any) -> Any:
        schema = rule.op._schema.arguments
        seen["in"] = [a for a, s in zip(args, schema, strict=False) if "Tensor" in str(s.type)]
        before = _copies(seen["in"])
        seen["args"] = args
        seen["out"] = forward(*args)
        _same(before, seen["in"], f"{rule.op}.forward changed its argument")
        return seen["out"]

    def watched_tangent(*dargs: Any) -> Any:
        k = next(t for t in _tensors(dargs)).shape[0]
        before = _copies(dargs)
        result = tangent(*dargs)
        _same(before, dargs, f"{rule.op}.tangent changed its argument")
        _fits(result, seen["out"], k, f"{rule.op}.tangent")
        return result

    def watched(method: Any, name: str) -> Any:
        def run(*gs: Any) -> Any:
            before = _copies(gs)
            k = next(t for t in _tensors(gs)).shape[0]
            if name == "backward":
                seen["g"] = gs[0]
            results = method(*gs)
            _same(before, gs, f"{rule.op}.{name} changed its argument")
            for need, result, arg in zip(rule.needs, results, seen["in"], strict=True):
                listed = (need, result, arg) if isinstance(need, list) else ([need], [result], [arg])
                for wanted, part, tensor in zip(*listed, strict=True) if any(listed[0]) else ():
                    if wanted and part is not None:
                        _fits(part, tensor, k, f"{rule.op}.{name}")
            return results

        return run

    rule.forward, rule.tangent = watched_forward, watched_tangent
    rule.backward, rule.backward_tangent = watched(backward, "backward"), watched(second, "backward_tangent")
    return seen


def _fits(result: Any, primal: Any, k: int, what: str) -> None:
    if isinstance(primal, tuple | list):
        for r, p in zip(result, primal, strict=True):
            if r is not None:
                _fits(r, p, k, what)
        return
    want = [k, *primal.shape]
    assert list(result.shape) == want, f"{what}: {list(result.shape)}, expected {want}"
    assert result.dtype == primal.dtype, f"{what}: {result.dtype}, the argument has {primal.dtype}"


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in _tensors(part)] if isinstance(value, tuple | list) else []


def _copies(value: Any) -> list[Tensor]:
    return [t.clone() for t in _tensors(value)]


def _same(before: list[Tensor], after: Any, what: str) -> None:
    pairs = zip(before, _tensors(after), strict=True)
    assert all(torch.equal(b.nan_to_num(), a.nan_to_num()) for b, a in pairs), what


def _floating(value: Any) -> list[Tensor]:
    return [t for t in _tensors(value) if t.dtype.is_floating_point]


def _flat(named: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in named.values()])


def _named(params: Mapping[str, Tensor], v: Tensor) -> dict[str, Tensor]:
    pieces = v.split([p.numel() for p in params.values()])
    return {name: piece.view_as(p) for (name, p), piece in zip(params.items(), pieces, strict=True)}


def _close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    if not want.numel():
        return
    error = float((got.detach() - want).abs().max())
    scale = float(want.detach().abs().max())
    assert error <= tolerance * max(scale, 1e-30), f"{what}: off by {error:.3g}, scale {scale:.3g}"
