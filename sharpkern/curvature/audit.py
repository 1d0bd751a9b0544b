"""Can the products be trusted for this model? Checks against themselves and against independent truths."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..rop import ReplayedProgram, UnsupportedOpError
from ..rop.double_backward import DoubleBackward
from .eager import EagerPass, run_eagerly
from .operators import HessianOperator

_SHIFTS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)  # of differences, in units of the parameters' norm
_PRODUCT = 1e4  # units of rounding in which two right products may differ: sums of terms that cancel
_MAY_LIE = ("the autograd.Function", "a gradient hook")  # what may make eager torch's gradient another than the loss's
_COARSE = 0.2  # the most that is ever taken for rounding, as in 16-bit floats


@dataclass(frozen=True)
class Check:
    """One figure of an audit.

    Attributes:
        name: what was compared with what.
        error: relative; NaN if one of the two was.
        allowed: the most that passes.
    """

    name: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the error is small enough; NaN is not."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class AuditReport:
    """What ``audit`` found.

    Attributes:
        checks: relative errors with their limits.
        fallback_ops: ops without a rule of their own (right, but slow).
        unchecked: why there is no independent truth for the products; empty if there is one.
        unseen: what may make the gradient another one than the loss's, such as "the autograd.Function Rounding".
    """

    checks: tuple[Check, ...]
    fallback_ops: tuple[str, ...]
    unchecked: str = ""
    unseen: tuple[str, ...] = ()

    @property
    def status(self) -> Literal["trustworthy", "wrong", "unchecked"]:
        """The outcome: a failed check is "wrong"; without a truth for the products it is "unchecked"."""
        if not all(check.ok for check in self.checks):
            return "wrong"
        return "unchecked" if self.unchecked else "trustworthy"

    @property
    def ok(self) -> bool:
        """Whether the products are trustworthy."""
        return self.status == "trustworthy"

    @property
    def verdict(self) -> str:
        """The outcome in one line: to which accuracy, or what is wrong and what to do, or why it is unknown."""
        failed = [c for c in self.checks if not c.ok]
        if failed:
            listed = ", ".join(f"{c.name} off by {c.error:.1e} (allowed {c.allowed:.0e})" for c in failed)
            return f"NOT TO BE TRUSTED: {listed}. {_advice(failed, self.unseen)}"
        if self.unchecked:
            return f"COULD NOT BE CHECKED: {self.unchecked}."
        worst = max(c.error for c in self.checks)
        slow = f"; {len(self.fallback_ops)} op(s) on the slow fallback" if self.fallback_ops else ""
        return f"Trustworthy: all {len(self.checks)} checks passed, to {worst:.0e}{slow}."

    @property
    def lines(self) -> list[str]:
        """The report, line by line, the verdict last."""
        rows = [f"{c.name:<46} {c.error:9.1e}   allowed {c.allowed:.0e}   {_mark(c.ok)}" for c in self.checks]
        ops = ", ".join(self.fallback_ops) or "none"
        return [*rows, f"ops on fallback: {ops}", self.verdict]


def audit(
    model: nn.Module, loss_fn: Callable[..., Tensor], batch: Any, *, generator: torch.Generator | None = None
) -> AuditReport:
    """Check the Hessian-vector products of a model against themselves and against independent truths.

    With random u, v: symmetry u'Hv = v'Hu, linearity H(au + bv) = aHu + bHv, repeatability (the same product twice).
    Truths: the gradient of the user's own model, closure included, by eager torch; Hv by double backward of the same
    model, with the same dropout masks; and both products again on a float64 copy, where rounding hides nothing. Where
    double backward is what gives the products, or where torch has none, the truth is the central difference of eager
    gradients, the best of six steps: a long one crosses the kinks of a ReLU, a short one is rounding. Where a
    function has a backward of its own, or a hook changes gradients, eager torch's gradient is no truth, and is compared
    with differences of the loss. How much may be rounding follows from the coarsest dtype that the model computes in,
    its own casts included.

    Args:
        model: a module; its parameters, buffers and mode are left as they are.
        loss_fn: ``(output, targets) -> scalar``.
        batch: ``(inputs, targets)``; see ``HessianOperator``.
        generator: of u and v.

    Returns:
        The report; ``report.ok``, ``report.status``, ``report.verdict``, ``report.lines``.

    Raises:
        Exception: whatever ``HessianOperator`` raises for this model.

    Cost: about 20 gradients, 10 Hessian-vector products, a copy of the model in float64; memory of double backward.
    """
    generator = generator or torch.Generator().manual_seed(0)
    seed = int(torch.randint(2**31, (), generator=generator))
    # The caller's random numbers are left alone; within, one seed gives every evaluation the same dropout masks.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        H = HessianOperator(model, loss_fn, batch)
        try:
            checks, v = _against_itself(H, generator)
        # Loss and gradient are still good, and are checked: only the products are missing.
        except UnsupportedOpError as error:
            found, unseen = _gradient_check(H, seed)
            found += _slope_check(H, unseen, seed)
            return AuditReport(tuple(found), tuple(H.fallback_ops), f"there are no products: {error}", unseen)
        found, unseen = _gradient_check(H, seed)
        own, reason = _product_check(H, v, seed, "")
        # Last, for it moves the parameters: products of H are stale afterwards.
        checks += found + own + _slope_check(H, unseen, seed)
        wide = _in_float64(H, v, seed)
        checks += wide
    return AuditReport(tuple(checks), tuple(H.fallback_ops), "" if own or wide else reason, unseen)


def _against_itself(H: HessianOperator, generator: torch.Generator) -> tuple[list[Check], Tensor]:
    u, v = _unit(H, generator), _unit(H, generator)
    Hu, Hv = H @ u, H @ v
    # One scale for all three: u'Hv itself may be near zero, and a relative error of it would be noise.
    scale = max(float(Hu.norm()), float(Hv.norm()), torch.finfo(H.dtype).tiny)
    # Tighter than for the truths: both sides come from the same sweeps and differ by the order of sums alone.
    allowed = min(_COARSE, 1e3 * _rounding(H))
    twice = float((H @ (2 * u - 3 * v) - 2 * Hu + 3 * Hv).norm())
    return [
        Check("symmetry, u'Hv - v'Hu", abs(float(u @ Hv - v @ Hu)) / scale, allowed),
        Check("linearity, H(2u - 3v)", twice / scale, allowed),
        Check("repeatability, Hv twice", float((H @ v - Hv).norm()) / scale, allowed),
    ], v


def _gradient_check(H: HessianOperator, seed: int) -> tuple[list[Check], tuple[str, ...]]:
    """Compare with eager torch on the user's own model object and closure; say what may make that gradient wrong."""
    torch.manual_seed(seed)
    eager = run_eagerly(H.module, H.batch, H.params, H.others)
    error, allowed = _relative(H.gradient, _flat(H, eager.gradients)), min(_COARSE, _PRODUCT * _rounding(H))
    unseen = tuple(what for what in eager.unseen if what.startswith(_MAY_LIE))
    return [Check("gradient against eager torch", error, allowed)], unseen


def _slope_check(H: HessianOperator, unseen: tuple[str, ...], seed: int) -> list[Check]:
    """Compare the gradient with the loss itself, where eager torch's is no truth."""
    if not unseen:
        return []
    allowed = max(1e-3, min(_COARSE, 30 * _rounding(H) ** 0.5))
    return [Check("gradient against differences of the loss", _slope_error(H, H.gradient, seed), allowed)]


def _slope_error(H: HessianOperator, gradient: Tensor, seed: int) -> float:
    """Return how far the loss's slope along the gradient is from the gradient's length, in units of that."""
    length = float(gradient.norm())
    if length == 0:
        return 0.0
    with _along(H, gradient / length, seed) as at:
        slopes = [(float(at(h).loss.double() - at(-h).loss.double())) / (2 * h) for h in _steps(H)]
    # The step whose neighbour agrees best. Not the one nearest to the gradient: of six noisy slopes one may be near a
    # wrong gradient, and so few numbers hide nothing where a vector of differences could not agree by chance.
    plateau = min(range(1, len(slopes)), key=lambda i: abs(slopes[i] - slopes[i - 1]))
    return abs(slopes[plateau] / length - 1)


def _product_check(H: HessianOperator, v: Tensor, seed: int, where: str) -> tuple[list[Check], str]:
    """Compare Hv with double backward, or with differences; no check and the reason where neither can be had."""
    allowed = min(_COARSE, _PRODUCT * _rounding(H))
    floor = max(_rounding(H) * float(H.gradient.norm()), torch.finfo(H.dtype).tiny)  # where Hv is zero but for rounding
    product = H @ v
    # Double backward can only judge a program: where it gives the products itself, it would agree with itself.
    if isinstance(H.engine, ReplayedProgram):
        leaves, spec = pytree.tree_flatten(H.batch)
        truth = DoubleBackward(H.module, spec, H.params, H.others)
        torch.manual_seed(seed)
        try:
            loss = truth.forward(H.module, leaves)
            # Else the two have drawn different noise, and a difference of their products would say nothing.
            if abs(float(loss - H.loss)) <= allowed * max(abs(float(loss)), torch.finfo(H.dtype).tiny):
                wanted = truth.hvp(v[None])[0]
                return [Check(f"Hv against double backward{where}", _relative(product, wanted, floor), allowed)], ""
        except (UnsupportedOpError, RuntimeError, NotImplementedError):
            pass  # torch cannot: differences can
    error, reason = _difference_error(H, v, product, seed, floor)
    if reason:
        return [], reason
    # The best difference is off by the cube root of rounding squared; a kink beside the point by more.
    return [Check(f"Hv against differences{where}", error, max(1e-4, min(_COARSE, 30 * _rounding(H) ** 0.5)))], ""


def _difference_error(H: HessianOperator, v: Tensor, product: Tensor, seed: int, floor: float) -> tuple[float, str]:
    """Return the smallest distance from a central difference of gradients along v; or why there is none."""
    with _along(H, v, seed) as at:
        # At the point itself the gradients must agree, or the noise is another one and all differences are worthless.
        if _relative(_flat(H, at(0.0).gradients), H.gradient) > min(_COARSE, _PRODUCT * _rounding(H)):
            return 0.0, "the model's noise cannot be drawn again as the program drew it"
        pairs = [(h, _flat(H, at(h).gradients) - _flat(H, at(-h).gradients)) for h in _steps(H)]
    # Central, whose error is of second order in the step. The best of several, as no one step suits every loss.
    return min(_relative(product, change / (2 * h), floor) for h, change in pairs), ""


def _steps(H: HessianOperator) -> list[float]:
    size = max(float(torch.cat([p.detach().reshape(-1) for p in H.params.values()]).norm()), 1e-3)
    return [shift * size for shift in _SHIFTS]


@contextmanager
def _along(H: HessianOperator, v: Tensor, seed: int) -> Iterator[Callable[[float], EagerPass]]:
    """Give a function that runs the eager model with its parameters shifted along v, always from one random state."""
    params = list(H.params.values())
    before = [p.detach().clone() for p in params]

    def at(shift: float) -> EagerPass:
        with torch.no_grad():
            for p, old, d in zip(params, before, v.split([p.numel() for p in params]), strict=True):
                # Each step starts from the saved values: adding and taking away again would leave rounding behind.
                p.copy_(old + shift * d.view(p.shape).to(p.dtype))
        torch.manual_seed(seed)
        return run_eagerly(H.module, H.batch, H.params, H.others)

    try:
        yield at
    # Also after an error in the user's code: the model must not be left at shifted parameters.
    finally:
        with torch.no_grad():
            for p, old in zip(params, before, strict=True):
                p.copy_(old)


def _in_float64(H: HessianOperator, v: Tensor, seed: int) -> list[Check]:
    """Check the products of a float64 copy; nothing where the model cannot be copied or does not run in float64."""
    if H.dtype == torch.float64:
        return []
    try:
        # Copied as a pair, since a loss function may hold the model or share modules with it.
        model, loss_fn = copy.deepcopy((H.module.model, H.module.loss_fn))
        for part in (model, loss_fn):
            if isinstance(part, nn.Module):
                part.double()
        batch = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, H.batch)
        torch.manual_seed(seed)
        # By name, so that a selection made by the caller is made in the copy.
        wide = HessianOperator(model, loss_fn, batch, params=list(H.params))
        checks, _ = _product_check(wide, v.double(), seed, ", float64 copy")
    except Exception:  # a user's code need not be copied, nor run in float64: the own dtype was checked
        return []
    return checks


def _rounding(H: HessianOperator) -> float:
    if isinstance(H.engine, ReplayedProgram):
        return H.engine.program.graph.rounding
    # An autograd graph does not tell which casts the model makes, so the parameters' dtypes must do.
    return max(torch.finfo(p.dtype).eps for p in H.params.values())


def _flat(H: HessianOperator, gradients: list[Tensor | None]) -> Tensor:
    pairs = zip(gradients, H.params.values(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs]).to(H.dtype)


def _relative(a: Tensor, b: Tensor, floor: float = torch.finfo(torch.float64).tiny) -> float:
    return float((a.double() - b.double()).norm()) / max(float(b.double().norm()), floor)


def _unit(H: HessianOperator, generator: torch.Generator) -> Tensor:
    # Drawn on the generator's device and then moved: one seed gives one vector on every machine.
    v = torch.randn(H.n, generator=generator, dtype=H.dtype).to(H.device)
    return v / v.norm()


def _advice(failed: list[Check], unseen: tuple[str, ...]) -> str:
    if unseen:
        return (
            f"The gradient need not be the loss's: the model uses {', '.join(unseen)}. Make each backward the "
            "derivative of its forward, or audit the model without it."
        )
    if failed[0].name.startswith("symmetry"):
        return (
            "The gradient is not that of a scalar function, so there is no Hessian (scale_grad_by_freq changes it), or "
            "a rule is wrong: then please report the model."
        )
    if failed[0].name.startswith("gradient against eager"):
        return (
            "Do two forward passes of the model differ? Then it has random numbers from elsewhere than torch, and no "
            "Hessian: draw them with torch. Otherwise please report the model."
        )
    return "Please report the model; until then, use sharpkern only for models that pass."


def _mark(ok: bool) -> str:
    return "ok" if ok else "FAILED"
