"""Can the products be trusted for this model? Symmetry, linearity, repeatability, and two independent truths."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .operators import HessianOperator
from .parameters import unwrapped


@dataclass(frozen=True)
class Check:
    """One figure of an audit: a relative error and the most that passes."""

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
        ok: every check passed.
        verdict: one line.
    """

    checks: tuple[Check, ...]
    fallback_ops: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    @property
    def verdict(self) -> str:
        """The outcome in one line."""
        failed = [c for c in self.checks if not c.ok]
        if failed:
            listed = ", ".join(f"{c.name} off by {c.error:.1e} (allowed {c.allowed:.0e})" for c in failed)
            return f"NOT TO BE TRUSTED: {listed}."
        slow = f"; {len(self.fallback_ops)} op(s) on the slow fallback" if self.fallback_ops else ""
        return f"Trustworthy: all {len(self.checks)} checks passed{slow}."

    @property
    def lines(self) -> list[str]:
        """The report, line by line, the verdict last."""
        rows = [f"{c.name:<38} {c.error:9.1e}   allowed {c.allowed:.0e}   {_mark(c.ok)}" for c in self.checks]
        ops = ", ".join(self.fallback_ops) or "none"
        return [*rows, f"ops on fallback: {ops}", self.verdict]


def audit(
    model: nn.Module, loss_fn: Callable[..., Tensor], batch: Any, *, generator: torch.Generator | None = None
) -> AuditReport:
    """Check the Hessian-vector products of a model against themselves and against independent truths.

    With random u, v: symmetry u'Hv = v'Hu, linearity H(au + bv) = aHu + bHv, repeatability (the same product twice),
    the gradient against ``torch.autograd``, and Hv against the central difference of ``torch.autograd`` gradients.
    The last two run on a float64 copy of the model, so that rounding does not hide an error; the products of the
    model's own dtype are compared with those of the copy.

    Args:
        model: a module; its parameters, buffers and mode are left as they are.
        loss_fn: ``(output, targets) -> scalar``.
        batch: ``(inputs, targets)``; see ``HessianOperator``.
        generator: of u and v.

    Returns:
        The report; ``report.ok``, ``report.verdict``, ``report.lines``.

    Raises:
        UnsupportedOpError: an op that torch cannot differentiate twice, by name.

    Cost: a copy of the model in float64, about 10 gradients and 10 Hessian-vector products.
    """
    generator = generator or torch.Generator().manual_seed(0)
    seed = int(torch.randint(2**31, (), generator=generator))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        H = HessianOperator(model, loss_fn, batch)
        u, v = _unit(H, generator), _unit(H, generator)
        Hu, Hv = H @ u, H @ v
        scale = max(float(Hu.norm()), float(Hv.norm()), torch.finfo(H.dtype).tiny)
        low = any(p.dtype in (torch.bfloat16, torch.float16) for p in H.params.values())
        rounding = 0.2 if low else 1e3 * torch.finfo(H.dtype).eps
        checks = [
            Check("symmetry, u'Hv - v'Hu", abs(float(u @ Hv - v @ Hu)) / scale, rounding),
            Check(
                "linearity, H(2u - 3v)",
                float((H @ (2 * u - 3 * v) - 2 * Hu + 3 * Hv).norm()) / scale,
                rounding,
            ),
            Check("repeatability, Hv twice", float((H @ v - Hv).norm()) / scale, rounding),
        ]
        checks += _against_float64(H, model, loss_fn, batch, seed, v, Hv, 0.2 if low else 1e4 * rounding)
    return AuditReport(tuple(checks), tuple(H.fallback_ops))


def _against_float64(
    H: HessianOperator,
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batch: Any,
    seed: int,
    v: Tensor,
    Hv: Tensor,
    rounding: float,
) -> list[Check]:
    """Compare with autograd's gradient and its central difference, on a float64 copy with the same random numbers."""
    exact = copy.deepcopy(unwrapped(model)).double()
    exact_loss = copy.deepcopy(loss_fn).double() if isinstance(loss_fn, nn.Module) else loss_fn
    batch = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, batch)
    torch.manual_seed(seed)
    H64 = HessianOperator(exact, exact_loss, batch)
    direction = v.double()
    product, own_gradient = H64 @ direction, H64.gradient
    params = list(H64.params.values())

    def gradient(shift: float) -> Tensor:
        moved = direction.split([p.numel() for p in params])
        saved = [p.detach().clone() for p in params]
        buffers = [b.clone() for b in exact.buffers()]
        with torch.no_grad():
            for p, d in zip(params, moved, strict=True):
                p.add_(d.view(p.shape), alpha=shift)
        torch.manual_seed(seed)
        with torch.enable_grad():
            loss = H64.module(batch)[0]
            parts = torch.autograd.grad(loss, params, materialize_grads=True)
        with torch.no_grad():
            for p, s in zip(params, saved, strict=True):
                p.copy_(s)
            for b, s in zip(exact.buffers(), buffers, strict=True):
                b.copy_(s)
        return torch.cat([g.reshape(-1) for g in parts])

    size = torch.cat([p.detach().reshape(-1) for p in params]).norm()
    shift = 1e-5 * max(float(size), 1e-3)
    difference = (gradient(shift) - gradient(-shift)) / (2 * shift)
    tiny = torch.finfo(torch.float64).tiny
    reference = gradient(0.0)
    return [
        Check(
            "gradient against torch.autograd",
            float((own_gradient - reference).norm()) / max(float(reference.norm()), tiny),
            1e-9,
        ),
        Check(
            "Hv against finite differences",
            float((product - difference).norm()) / max(float(product.norm()), tiny),
            1e-4,
        ),
        Check(
            f"rounding of {str(H.dtype).removeprefix('torch.')} products",
            float((Hv.double() - product).norm()) / max(float(product.norm()), tiny),
            rounding,
        ),
    ]


def _unit(H: HessianOperator, generator: torch.Generator) -> Tensor:
    v = torch.randn(H.n, generator=generator, dtype=H.dtype).to(H.device)
    return v / v.norm()


def _mark(ok: bool) -> str:
    return "ok" if ok else "FAILED"
