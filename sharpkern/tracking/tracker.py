"""Sharpness at every training step, from the sweeps that the step runs anyway."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature.dataset import DatasetHessian
from ..curvature.losses import NonFiniteLossError
from ..curvature.operators import HessianOperator
from ..curvature.parameters import gradients_of
from ..curvature.preconditioned import PreconditionedOperator
from ..eigen import WarmLanczos
from ..eigen import certify as certificate_of
from ..eigen.state import check_state
from ..optimizers.held import check_held
from ..optimizers.preconditioner import is_adaptive, threshold_preconditioner
from ..optimizers.threshold import stability_threshold
from .budget import Budget, Status
from .followed import Followed
from .record import Record

_CERTIFY_FAILURE = 0.01
_VERSION = 1  # of a saved state: raise it when a field changes its name or its meaning
_TF32_TOL = 0.005  # ten times TF32's rounding of a number: below, residuals would be mostly rounding

_Tracked = HessianOperator | DatasetHessian | PreconditionedOperator


class SharpnessTracker:
    """Computes a training step's loss and gradients, and tracks the sharpness on the way.

    ``step(batch)`` replaces the forward and backward pass: it sets ``p.grad`` for every trainable parameter (nothing
    is accumulated), lets batch-norm statistics change as a training forward does, and finds the sharpness by
    ``WarmLanczos`` (docs/tracking.md). The caller then calls ``optimizer.step()``.

    Args:
        model: a module.
        loss_fn: ``(output, targets) -> scalar``.
        optimizer: read for learning rate, threshold and, if adaptive, the diagonal preconditioner.
        tol: relative residual at which a solve stops. The eigenvalue's error is of second order in it.
        every: measure at steps 1, 1 + every, ... only; the steps between carry the last value.
        max_matvecs: the most Hessian-vector products per solve.
        k: how many eigenvalues to track.
        budget: spend at most this fraction of the steps' own time on tracking, choosing when to measure from how fast
            the sharpness moves and how near the threshold is, and stopping solves that the budget cannot pay short of
            ``tol`` (``Record.converged``). The steps between carry the last value or its Rayleigh quotient. Which
            steps are measured then depends on the clock; training does not. None: every step allowed by ``every``.
        probe: a fixed batch whose Hessian is tracked instead of that of the step's own batch, for one more gradient
            per measured step. The sharpness of a part of the data is not that of the whole: it reads higher.
        loader: batches whose mean Hessian is tracked, exactly: see ``DatasetHessian`` for the cost.
        tf32: let the products of all solves but the first round float32 factors to TF32 on a GPU (sums stay float32).
            What this changes is measured on the Ritz vector, at the first solve and every 32, for two products, and
            added to ``Record.sharpness_error``. Loss and gradients keep torch's own setting.
        verify: compare each program with the eager model before it sets a gradient; see ``HessianOperator``.

    Raises:
        ValueError: an argument out of range, probe and loader together, tf32 with tol below 0.005.

    Cost per measured step: a gradient and 2 to 10 Hessian-vector products; twice that for adaptive optimizers and for
    parameter groups with learning rates or momenta of their own, whose preconditioned sharpness is tracked besides.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        tol: float = 0.01,
        every: int = 1,
        max_matvecs: int = 80,
        *,
        k: int = 1,
        budget: float | None = None,
        probe: Any = None,
        loader: Iterable[Any] | None = None,
        tf32: bool = False,
        verify: bool = True,
    ) -> None:
        if not 0 < tol < 1:
            raise ValueError(f"tol must lie between 0 and 1, got {tol}.")
        if tf32 and tol < _TF32_TOL:
            raise ValueError(f"tol must be at least {_TF32_TOL} with tf32=True, whose rounding is 0.0005; got {tol}.")
        if every < 1 or k < 1 or max_matvecs < k:
            raise ValueError(f"need every >= 1, k >= 1 and max_matvecs >= k, got {every}, {k} and {max_matvecs}.")
        if budget is not None and not budget > 0:
            raise ValueError(f"budget must be a positive fraction of a step's time, got {budget}.")
        if probe is not None and loader is not None:
            raise ValueError("give probe or loader, not both.")
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self.tol, self.every, self.max_matvecs, self.k = tol, every, max_matvecs, k
        self.probe, self.loader, self.tf32, self.verify = probe, loader, tf32, verify
        self.hessian: HessianOperator | None = None
        self._tracked: HessianOperator | DatasetHessian | None = None
        self._steps = 0
        self._budget = None if budget is None else Budget(budget, tol)
        self._left_at: float | None = None  # clock at the end of the last step
        self._followed: dict[str, Followed] = {}
        self._present: list[int] = []  # ids of the parameters of model and optimizer
        self._order: list[tuple[str, torch.Size]] | None = None  # of the vectors followed
        try:
            stability_threshold(optimizer)
            self._has_threshold = True
        except TypeError as error:
            warnings.warn(f"SharpnessTracker reports no threshold: {error}", stacklevel=2)
            self._has_threshold = False

    def step(self, batch: Any, *, certify: bool = False) -> Record:
        """Compute loss and gradients on a batch, set ``p.grad``, and measure.

        Args:
            batch: ``(inputs, targets)``; see ``HessianOperator``.
            certify: measure at this step, and run an independent solve from a random start too (40 products): see
                ``sharpkern.certify``. A larger eigenvalue that it finds is tracked from then on.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite; parameters and ``p.grad`` are as before the call.
            ValueError: bad batch; the optimizer lacks a trainable parameter of the model, or holds one of another
                module, whose gradient would not be set; a parameter has a hook that runs in ``backward()`` only.
        """
        step, start = self._steps + 1, time.perf_counter()
        gradients = self._primal(batch, step)
        # Only now: after a loss that is not finite, step and gradients are as before the call.
        self._steps = step
        for p, g in gradients.items():
            p.grad = g
        # From the end of the last call: the caller's update and data loading belong to what a step takes.
        own = time.perf_counter() - (start if self._left_at is None else self._left_at)
        status = self._choose(step, own, certify=certify)
        matvecs, converged, upper = 0, True, None
        if status != "carried":
            start = time.perf_counter()
            at_most = None
            if self._budget is not None and self._budget.started and not certify:
                at_most = min(self.max_matvecs, max(self.k, self._budget.matvecs))
            operators = self._operators(gradients)
            for name, operator in operators.items():
                if name not in self._followed:
                    self._followed[name] = self._new()
                curvature = self._followed[name]
                if status == "bounded":
                    curvature.bound(operator, step)
                    continue
                extra = None
                if certify:
                    # A fresh seed: the promise holds for a start that has had no part in the run.
                    certificate = certificate_of(operator, failure=_CERTIFY_FAILURE)
                    matvecs += certificate.matvecs
                    upper, extra = certificate.upper, certificate.vector[None]
                result = curvature.solve(operator, step, extra, at_most)
                matvecs += result.matvecs + curvature.measure_rounding(operator)
                converged = converged and result.converged
            # The first step is not paid for: its solve is long, and the sweeps are recorded during it.
            if self._budget is not None and self._budget.started:
                self._budget.spent(time.perf_counter() - start, matvecs, self._deciding().shortfall)
            elif self._budget is not None:
                matvecs += self._start_budget(self._budget, operators, step)
        assert self.hessian is not None
        # Last, because reading a number waits for the device.
        loss, grad_norm = float(self.hessian.loss), float(torch.linalg.vector_norm(self.hessian.gradient))
        record = self._record(loss, grad_norm, matvecs, status, converged=converged, upper=upper)
        self._left_at = time.perf_counter()
        return record

    def carry(self, loss: float, grad_norm: float) -> Record:
        """Count a step whose loss and gradient were computed elsewhere, and carry the last value.

        Args:
            loss: before the update; finite.
            grad_norm: Euclidean norm of the gradient.

        Raises:
            RuntimeError: nothing has been measured yet.
        """
        if self._decisive() not in self._followed:
            raise RuntimeError(
                "nothing to carry: the first step, and one after groups part, must be tracker.step(batch)."
            )
        self._steps += 1
        return self._record(loss, grad_norm, 0, "carried", converged=True, upper=None)

    def adopt(self, twin: SharpnessTracker, record: Record) -> Record:
        """Take over the step that a twin has just taken at the same parameters, on the same batch.

        Args:
            twin: a tracker of the same options.
            record: of its step.

        Returns:
            What ``step`` would, but for the work: only learning rate, threshold and ratio are this optimizer's own.
        """
        self.load_state_dict(twin.state_dict())
        threshold, ratio = self._threshold_and_ratio()
        return replace(record, lr=float(self.optimizer.param_groups[0]["lr"]), threshold=threshold, ratio=ratio)

    def _primal(self, batch: Any, step: int) -> dict[Tensor, Tensor]:
        try:
            if self.hessian is None:
                self.hessian = HessianOperator(self.model, self.loss_fn, batch, update_buffers=True, verify=self.verify)
            else:
                self.hessian.refresh(batch, update_buffers=True)
        except NonFiniteLossError as error:
            raise NonFiniteLossError(error.loss, step) from None
        self._follow_parameters(self.hessian.params)
        return gradients_of(self.hessian)

    def _follow_parameters(self, params: Mapping[str, Tensor]) -> None:
        """Check who holds the parameters, when they are others than before; start anew if the flat order has changed.

        A layer that was unfrozen or replaced by one of other shapes has no place in the vectors followed so far.
        """
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        present = [id(p) for p in (*params.values(), *held)]
        if present == self._present:
            return
        self._present = present
        check_held(self.optimizer, params)
        order = [(name, p.shape) for name, p in params.items()]
        if self._order is not None and order != self._order:
            self._followed.clear()
            self._tracked = None
        self._order = order

    def _new(self) -> Followed:
        """Start to follow an operator. Its random numbers are its own: no other operator changes what is found."""
        generator = torch.Generator().manual_seed(0)
        return Followed(WarmLanczos(self.k, self.tol, self.max_matvecs, generator), self.tf32)

    def _choose(self, step: int, own_seconds: float, *, certify: bool) -> Status:
        if certify or self._decisive() not in self._followed:
            return "measured"
        if (step - 1) % self.every:
            return "carried"
        if self._budget is None:
            return "measured"
        ratio = self._threshold_and_ratio()[1]
        deciding = self._deciding()
        return self._budget.choose(own_seconds * self.every, deciding.drift(step), deciding.turned, ratio)

    def _start_budget(self, budget: Budget, operators: Mapping[str, _Tracked], step: int) -> int:
        """Time a matvec and a form, now that their sweeps are recorded; return the matvecs spent on it."""
        matvecs, matvec_seconds, form_seconds = 0, 0.0, 0.0
        for name, operator in operators.items():
            curvature = self._followed[name]
            curvature.bound(operator, step)  # records its sweep, which the second one only replays
            times = [time.perf_counter()]
            curvature.bound(operator, step)
            times.append(time.perf_counter())
            matvecs += (spent := curvature.solve(operator, step, None, None).matvecs)
            times.append(time.perf_counter())
            form_seconds += times[1] - times[0]
            matvec_seconds += (times[2] - times[1]) / spent
        budget.operators = len(operators)
        budget.start(matvec_seconds, form_seconds)
        return matvecs

    def _operators(self, gradients: dict[Tensor, Tensor]) -> dict[str, _Tracked]:
        """Return what to solve, at the present parameters."""
        assert self.hessian is not None
        # The probe's and the loader's operators are kept, as their export and recordings are.
        if self.probe is None and self.loader is None:
            self._tracked = self.hessian
        elif self.loader is not None:
            self._tracked = self._tracked or DatasetHessian(self.model, self.loss_fn, self.loader, verify=self.verify)
        elif isinstance(self._tracked, HessianOperator):
            self._tracked.refresh()
        else:
            self._tracked = HessianOperator(self.model, self.loss_fn, self.probe, verify=self.verify)
        operators: dict[str, _Tracked] = {"sharpness": self._tracked}
        if self._decisive() not in operators:
            P = threshold_preconditioner(self.optimizer, gradients)
            operators["preconditioned_sharpness"] = PreconditionedOperator(self._tracked, P)
        return operators

    def _decisive(self) -> str:
        """Name the curvature that the threshold is about, by the groups' present learning rates."""
        adaptive = self._has_threshold and is_adaptive(self.optimizer)
        return "preconditioned_sharpness" if adaptive else "sharpness"

    def _deciding(self) -> Followed:
        return self._followed[self._decisive()]

    def _threshold_and_ratio(self) -> tuple[float | None, float | None]:
        if not self._has_threshold:
            return None, None
        lr, kappa = float(self.optimizer.param_groups[0]["lr"]), stability_threshold(self.optimizer)
        return kappa / lr if lr > 0 else float("inf"), lr * self._deciding().value / kappa

    def _record(
        self, loss: float, grad_norm: float, matvecs: int, status: Status, *, converged: bool, upper: float | None
    ) -> Record:
        threshold, ratio = self._threshold_and_ratio()
        sharpness, deciding = self._followed["sharpness"], self._deciding()
        preconditioned = None if deciding is sharpness else deciding
        return Record(
            step=self._steps,
            loss=loss,
            lr=float(self.optimizer.param_groups[0]["lr"]),
            grad_norm=grad_norm,
            sharpness=sharpness.value,
            sharpness_error=sharpness.doubt(self._steps),
            preconditioned_sharpness=None if preconditioned is None else preconditioned.value,
            preconditioned_sharpness_error=None if preconditioned is None else preconditioned.doubt(self._steps),
            threshold=threshold,
            ratio=ratio,
            matvecs=matvecs,
            status=status,
            converged=converged,
            eigenvalues=deciding.eigenvalues,
            overlaps=deciding.overlaps,
            upper=upper,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to continue identically: tensors and plain Python only."""
        return {
            "version": _VERSION,
            "steps": self._steps,
            "followed": {name: c.state_dict() for name, c in self._followed.items()},
            "budget": None if self._budget is None else self._budget.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict()``'s result; the tracker must have been made with the same options.

        Raises:
            ValueError: a field is missing or unknown, here or in a part's state, or a version is another one.
        """
        check_state("SharpnessTracker", state, ("steps", "followed", "budget"), _VERSION)
        self._steps = state["steps"]
        self._followed = {name: self._new() for name in state["followed"]}
        for name, curvature in self._followed.items():
            curvature.load_state_dict(state["followed"][name])
        if self._budget is not None and state["budget"] is not None:
            self._budget.load_state_dict(state["budget"])
