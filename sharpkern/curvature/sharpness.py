"""Sharpness and preconditioned sharpness of a model at its present parameters: one call, one number with its bound."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..eigen import EigenResult, lanczos
from ..optimizers.preconditioner import preconditioner
from .distributed.choose import hessian_of
from .parameters import gradients_of
from .preconditioned import PreconditionedOperator


@dataclass(frozen=True)
class Sharpness:
    """The largest algebraic eigenvalue of a curvature operator.

    Attributes:
        value: Ritz value, a lower bound up to rounding; units of loss / parameter^2 (of loss for the
            preconditioned one in units of the optimizer's step).
        error_bound: some eigenvalue lies within this distance of ``value``. It certifies *an* eigenvalue, not that
            it is the largest.
        vector: ``[n]``, the unit Ritz vector (of P^-1/2 H P^-1/2 for the preconditioned sharpness); under
            ``fully_shard`` this process's part of it.
        matvecs: Hessian-vector products spent.
        converged: the residual is at most tol * value.
        reason: why the solver stopped.
    """

    value: float
    error_bound: float
    vector: Tensor
    matvecs: int
    converged: bool
    reason: str


def sharpness(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batch: Any,
    tol: float = 1e-3,
    *,
    params: Iterable[str] | None = None,
    recompute: bool = False,
    v0: Tensor | None = None,
    max_matvecs: int = 200,
    generator: torch.Generator | None = None,
) -> Sharpness:
    """Return the largest algebraic eigenvalue of the loss's Hessian.

    Args:
        model: a module; under DDP or ``fully_shard`` see ``hessian_of``: the value is that of all processes' batches.
        loss_fn: ``(output, targets) -> scalar``.
        batch: ``(inputs, targets)``; see ``HessianOperator``.
        tol: relative residual at which to stop.
        params: names of the parameters to differentiate by; None for all trainable ones, and under ``fully_shard``.
        recompute: keep less of the forward pass; see ``HessianOperator``.
        v0: ``[n]`` or ``[m, n]``, where to start; None for a random vector.
        max_matvecs: the most Hessian-vector products to spend.
        generator: of the random start.

    Raises:
        ValueError: bad batch, v0, or tolerance.
        NonFiniteLossError: the loss is NaN or infinite.

    Cost: one gradient, and ``matvecs`` Hessian-vector products (10 to 60 from a random start at 1e-3).
    Source: Lanczos with full reorthogonalisation; Parlett, The Symmetric Eigenvalue Problem (1998), chapter 13.

    >>> model = nn.Linear(3, 1, bias=False)
    >>> x = torch.randn(8, 3)
    >>> r = sharpness(model, nn.MSELoss(), (x, torch.randn(8, 1)), tol=1e-6)
    >>> bool(abs(r.value - torch.linalg.eigvalsh(2 / 8 * x.T @ x)[-1]) < 1e-4)
    True
    """
    operator = hessian_of(model, loss_fn, batch, params=params, recompute=recompute)
    return _top(lanczos(operator, tol=tol, v0=v0, max_matvecs=max_matvecs, generator=generator))


def preconditioned_sharpness(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batch: Any,
    optimizer: torch.optim.Optimizer,
    tol: float = 1e-3,
    *,
    v0: Tensor | None = None,
    max_matvecs: int = 200,
    generator: torch.Generator | None = None,
) -> Sharpness:
    """Return the largest eigenvalue of ``P^-1 H``, P the diagonal that scales the optimizer's next step on this batch.

    P includes the second moment of this batch's gradient, as the step about to be taken will
    (``preconditioner(optimizer, gradients=...)``); it works before the first step too. The parameters are those of the
    model that the optimizer updates.

    Args:
        model: a module; under DDP or ``fully_shard`` see ``hessian_of``: the value is that of all processes' batches.
        loss_fn: ``(output, targets) -> scalar``.
        batch: ``(inputs, targets)``; see ``HessianOperator``.
        optimizer: SGD (P = 1), Adam, AdamW, GIAdam, RMSprop; its state is read, never changed.
        tol: relative residual at which to stop.
        v0: ``[n]`` or ``[m, n]``, where to start, in the coordinates of P^-1/2 H P^-1/2.
        max_matvecs: the most Hessian-vector products to spend.
        generator: of the random start.

    Raises:
        TypeError: an optimizer without a known diagonal preconditioner.
        ValueError: bad batch, v0, or tolerance; a trainable parameter that the optimizer does not hold.
        NonFiniteLossError: the loss is NaN or infinite.

    Cost: one gradient, and ``matvecs`` Hessian-vector products.
    Source: Cohen et al., Adaptive gradient methods at the edge of stability (2022).
    """
    hessian = hessian_of(model, loss_fn, batch)
    # With this batch's gradient and not the state alone: the step about to be taken divides by a v that holds it.
    P = preconditioner(optimizer, gradients=gradients_of(hessian))
    # Symmetric, with the eigenvalues of P^-1 H: Lanczos needs a symmetric matrix.
    operator = PreconditionedOperator(hessian, P)
    return _top(lanczos(operator, tol=tol, v0=v0, max_matvecs=max_matvecs, generator=generator))


def _top(result: EigenResult) -> Sharpness:
    return Sharpness(
        float(result.eigenvalues[0]),
        float(result.error_bounds[0]),
        result.eigenvectors[0],
        result.matvecs,
        result.converged,
        result.reason,
    )
