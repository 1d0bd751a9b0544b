"""How an adaptive optimizer's second moment starts, and what that does to the preconditioned sharpness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature.operators import HessianOperator
from ..curvature.parameters import gradients_of
from ..curvature.preconditioned import PreconditionedOperator
from ..eigen import lanczos
from ..optimizers.gi_adam import GIAdam
from ..optimizers.preconditioner import preconditioner
from .metrics import Row


def draw_second_moment(
    model: nn.Module, loss_fn: Callable[..., Tensor], batch: Any, optimizer: torch.optim.Optimizer
) -> None:
    """Draw RI-Adam's v_0 with the norm of this batch's gradient; any other optimizer is left alone.

    The tracker needs it before the first step, whose preconditioner depends on it. ``p.grad`` is left None.

    Args:
        model, loss_fn, batch: see ``HessianOperator``; left as they are.
        optimizer: of that model, before its first step.

    Raises:
        NonFiniteLossError: the loss is NaN or infinite.
        RuntimeError: v_0 has been drawn already.

    Cost: nothing, or an export and one gradient.
    """
    if not (isinstance(optimizer, GIAdam) and optimizer.v0 == "random"):
        return
    # Not ``backward()``, whose forward pass would change batch-norm statistics before the first step.
    for p, gradient in gradients_of(HessianOperator(model, loss_fn, batch)).items():
        p.grad = gradient
    optimizer.initialize()
    optimizer.zero_grad()


def initial_preconditioned_sharpness(
    model: nn.Module, loss_fn: Callable[..., Tensor], batch: Any, optimizer: torch.optim.Optimizer
) -> Row:
    """Compare the preconditioned sharpness before the first step of Adam and of GI-Adam.

    Args:
        model, loss_fn, batch: see ``HessianOperator``; left as they are.
        optimizer: Adam or GI-Adam, whose betas and eps both have; only read.

    Returns:
        ``initial_adam`` and ``initial_gi_adam``, largest eigenvalues of P^-1 H; nothing for any other optimizer.

    Cost: a gradient, and two solves of up to 100 Hessian-vector products.
    Source: Kalra and Barkeshli, Why warmup the learning rate? (2024), GI-Adam.
    """
    if not isinstance(optimizer, torch.optim.Adam):
        return {}
    hessian = HessianOperator(model, loss_fn, batch)
    gradients = gradients_of(hessian)
    # The trainer's optimizers have one group.
    group = optimizer.param_groups[0]
    found: Row = {}
    for name, cls in (("initial_adam", torch.optim.Adam), ("initial_gi_adam", GIAdam)):
        # Fresh optimizers: P of the first step follows from betas, eps and the gradient, and the run's own state is not
        # touched.
        P = preconditioner(cls(list(gradients), betas=group["betas"], eps=group["eps"]), gradients=gradients)
        # The same start for both, so that their ratio does not come from two random vectors.
        generator = torch.Generator().manual_seed(0)
        result = lanczos(PreconditionedOperator(hessian, P), tol=1e-2, max_matvecs=100, generator=generator)
        found[name] = float(result.eigenvalues[0])
    return found
