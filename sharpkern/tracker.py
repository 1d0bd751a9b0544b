"""Sharpness at every training step, from the sweeps that the step runs anyway."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .eigen import EigenResult, lanczos
from .measure import gradients_of
from .operators import HessianOperator, NonFiniteLossError, Operator, PreconditionedOperator
from .preconditioning import is_adaptive, preconditioner
from .warmup import stability_threshold

# The first solve starts from a random vector, where a loose tolerance can stop on the second eigenvector and the warm
# start then keep it there: ask for ten times the accuracy once.
_FIRST_TOL = 0.1


@dataclass(frozen=True)
class Record:
    """One training step as the tracker saw it, before the update.

    Attributes:
        step: 1 for the first step.
        loss: at the parameters before the update, on the step's batch.
        lr: learning rate of the optimizer's first group, as it was when the step was tracked.
        grad_norm: Euclidean norm of the gradient.
        sharpness: largest algebraic eigenvalue of the Hessian on the same batch.
        sharpness_error: residual norm: an eigenvalue lies this close to ``sharpness``.
        preconditioned_sharpness: largest eigenvalue of P^-1 H for an adaptive optimizer, else None.
        preconditioned_sharpness_error: likewise.
        threshold: kappa / lr: training is stable on a quadratic while the (preconditioned) sharpness is below it.
            Infinite when lr is 0; None for an optimizer without a known threshold.
        ratio: (preconditioned) sharpness / threshold; above 1 is beyond the edge of stability.
        matvecs: Hessian-vector products spent at this step.
        measured: False on steps that ``every`` skips; the values are then those of the last measured step.
        converged: every solve of this step reached ``tol``.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    sharpness: float
    sharpness_error: float
    preconditioned_sharpness: float | None
    preconditioned_sharpness_error: float | None
    threshold: float | None
    ratio: float | None
    matvecs: int
    measured: bool
    converged: bool


class SharpnessTracker:
    """Computes a training step's loss and gradients, and tracks the sharpness on the way.

    ``step(batch)`` replaces the forward and backward pass: it sets ``p.grad`` for every trainable parameter (nothing
    is accumulated), lets batch-norm statistics change as a training forward does, and finds the sharpness on the same
    batch by Lanczos, warm-started from the last step's Ritz vector. The caller then calls ``optimizer.step()``.

    Args:
        model: a module.
        loss_fn: ``(output, targets) -> scalar``.
        optimizer: read for learning rate, threshold and, if adaptive, the diagonal preconditioner.
        tol: relative residual at which a solve stops. The eigenvalue's error is of second order in it.
        every: measure at steps 1, 1 + every, ...; the steps between carry the last value.
        max_matvecs: the most Hessian-vector products per solve.

    Raises:
        ValueError: tol, every or max_matvecs out of range; the optimizer lacks a trainable parameter.

    Cost per measured step: a gradient and 2 to 10 Hessian-vector products; twice that for adaptive optimizers, whose
    preconditioned sharpness is tracked besides.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        tol: float = 0.01,
        every: int = 1,
        max_matvecs: int = 80,
    ) -> None:
        if not 0 < tol < 1:
            raise ValueError(f"tol must lie between 0 and 1, got {tol}.")
        if every < 1 or max_matvecs < 1:
            raise ValueError(f"every and max_matvecs must be at least 1, got {every} and {max_matvecs}.")
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self.tol, self.every, self.max_matvecs = tol, every, max_matvecs
        self.hessian: HessianOperator | None = None
        self._generator = torch.Generator().manual_seed(0)
        self._vectors: dict[str, Tensor] = {}
        self._steps = 0
        self._last: dict[str, float] = {}
        try:
            stability_threshold(optimizer)
            self._adaptive, self._has_threshold = is_adaptive(optimizer), True
        except TypeError as error:
            warnings.warn(f"SharpnessTracker reports no threshold: {error}", stacklevel=2)
            self._adaptive = self._has_threshold = False

    def step(self, batch: Any) -> Record:
        """Compute loss and gradients on a batch, set ``p.grad``, and measure.

        Args:
            batch: ``(inputs, targets)``; see ``HessianOperator``.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite; parameters and ``p.grad`` are as before the call.
            ValueError: bad batch.
        """
        step = self._steps + 1
        try:
            if self.hessian is None:
                self.hessian = HessianOperator(self.model, self.loss_fn, batch, update_buffers=True)
            else:
                self.hessian.refresh(batch, update_buffers=True)
        except NonFiniteLossError as error:
            raise NonFiniteLossError(error.loss, step) from None
        self._steps = step
        gradients = gradients_of(self.hessian)
        for p, g in gradients.items():
            p.grad = g
        matvecs, converged = 0, True
        measured = (step - 1) % self.every == 0
        if measured:
            operators: dict[str, Operator] = {"sharpness": self.hessian}
            if self._adaptive:
                P = preconditioner(self.optimizer, gradients=gradients)
                operators["preconditioned_sharpness"] = PreconditionedOperator(self.hessian, P)
            for name, operator in operators.items():
                result = self._solve(name, operator)
                matvecs += result.matvecs
                converged = converged and result.converged
        return self._record(step, matvecs, measured, converged)

    def _solve(self, name: str, operator: Operator) -> EigenResult:
        start = self._vectors.get(name)
        tol = self.tol if start is not None else self.tol * _FIRST_TOL
        result = lanczos(operator, tol=tol, v0=start, max_matvecs=self.max_matvecs, generator=self._generator)
        self._vectors[name] = result.eigenvectors
        self._last[name] = float(result.eigenvalues[0])
        self._last[f"{name}_error"] = float(result.residual_norms[0])
        return result

    def _record(self, step: int, matvecs: int, measured: bool, converged: bool) -> Record:
        assert self.hessian is not None
        lr = float(self.optimizer.param_groups[0]["lr"])
        preconditioned = self._last.get("preconditioned_sharpness")
        threshold = ratio = None
        if self._has_threshold:
            kappa = stability_threshold(self.optimizer)
            curvature = self._last["sharpness"] if preconditioned is None else preconditioned
            threshold = kappa / lr if lr > 0 else float("inf")
            ratio = lr * curvature / kappa
        return Record(
            step=step,
            loss=float(self.hessian.loss),
            lr=lr,
            grad_norm=float(torch.linalg.vector_norm(self.hessian.gradient)),
            sharpness=self._last["sharpness"],
            sharpness_error=self._last["sharpness_error"],
            preconditioned_sharpness=preconditioned,
            preconditioned_sharpness_error=self._last.get("preconditioned_sharpness_error"),
            threshold=threshold,
            ratio=ratio,
            matvecs=matvecs,
            measured=measured,
            converged=converged,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to continue identically: tensors and plain Python only."""
        return {
            "steps": self._steps,
            "last": dict(self._last),
            "vectors": {name: v.clone() for name, v in self._vectors.items()},
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict()``'s result."""
        self._steps = state["steps"]
        self._last = dict(state["last"])
        self._vectors = dict(state["vectors"])
        self._generator.set_state(state["generator"])
