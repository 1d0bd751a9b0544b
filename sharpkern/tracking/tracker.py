"""Sharpness at every training step: from the sweeps that the step runs anyway, or beside a loop of your own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..curvature.losses import NonFiniteLossError
from ..curvature.memory import Memory
from ..curvature.preconditioned import PreconditionedOperator
from ..eigen.state import check_state
from ..optimizers.preconditioner import Preconditioner, is_adaptive, threshold_preconditioner
from ..optimizers.rules import learning_rate
from ..optimizers.threshold import stability_threshold
from ..rop.sandbox import kept_random_states
from .budget import Status
from .cost import Cost, cost_of, forecast
from .directions import directional_curvatures
from .failures import FAILURES, Failures
from .following import Following, Look, Operator
from .gradients import climbs, gradients_to_step_with
from .options import check_kind, check_options, has_threshold
from .record import Record
from .target import StepHessian, Target

_VERSION = 2  # of a saved state: raise it when a field changes its name or its meaning


class SharpnessTracker:
    """Finds the sharpness at every step of a training run.

    ``observe(batch)`` stands beside a loop of your own and changes nothing: call it before ``optimizer.step()``.
    ``step(batch)`` replaces the forward and backward pass, which saves one gradient: it sets ``p.grad`` for every
    trainable parameter (nothing is accumulated), and lets batch-norm statistics change as a training forward does.
    Both find the sharpness by ``WarmLanczos``, or by ``WarmBlockLanczos`` with ``block`` (docs/explain/tracking.md).
    A step that cannot be measured, as a product is not finite, has a record with ``status="failed"``, and training goes
    on.

    Args:
        model: a module; one that ``torch.compile`` has wrapped is looked into. Under ``DistributedDataParallel`` or
            ``fully_shard`` every process calls the tracker on its own batch, under the former also on its own
            ``MicroBatches``; loss, gradients and sharpness are those of all batches, each process weighing the same
            (docs/explain/distributed.md).
        loss_fn: ``(output, targets) -> scalar``.
        optimizer: read for learning rate, threshold and, if adaptive, the diagonal preconditioner.
        tol: relative residual at which a solve stops. The eigenvalue's error is of second order in it.
        every: measure at steps 1, 1 + every, ... only; the steps between carry the last value.
        max_matvecs: the most Hessian-vector products per solve.
        k: how many eigenvalues to track.
        budget: spend at most this fraction of the steps' own time on tracking. The tracker then measures where the
            sharpness moves fast or is near the threshold. A solve may end before ``tol`` is reached
            (``Record.converged``), where the budget does not pay for more. The steps between carry the last value or
            its Rayleigh quotient. Which steps are measured depends on the clock; training does not. None: every step
            allowed by ``every``.
        probe: a fixed batch whose Hessian is tracked instead of that of the step's own batch, for one more gradient
            per measured step. The sharpness of a part of the data is not that of the whole: it reads higher. "auto",
            with ``budget``: the first examples of the first batch, as many as the budget pays for; for mini-batches,
            whose own Hessians differ too much for one's value to be carried to the next (docs/explain/tracking.md).
        loader: batches whose mean Hessian is tracked, exactly: see ``DatasetHessian`` for the cost.
        tf32: let the products of all solves but the first round float32 factors to TF32 on a GPU (sums stay float32).
            What this changes is measured on the Ritz vector, at the first solve and every 32, for two products, and
            added to ``Record.sharpness_error``. Loss and gradients keep torch's own setting.
        verify: compare each program with the eager model before it sets a gradient; see ``HessianOperator``.
        params: track the Hessian with respect to these parameters only (names, tensors or a dict); ``observe`` only,
            because ``step`` sets every gradient.
        chunk: differentiate at most so many examples at a time, so that a product needs the memory of a micro-batch;
            see ``ChunkedHessian`` for the cost.
        recompute: keep only a part of the forward pass and compute the rest again in each product: less memory, for
            twice a product's time; see docs/explain/memory.md.
        products: False spends no Hessian-vector product: only ``Record.batch_sharpness`` and
            ``Record.update_curvature`` are measured, at every step, and ``Record.sharpness`` is NaN.
        block: vectors in a product: None or 1 for one after the other. Blocks of 3 need about half as many products one
            after the other, each with 3 vectors, and miss fewer steps; they need memory for 3 tangents of each
            activation. "auto": at the first step, for 20 products more, it is measured what a block costs here, and
            blocks are used where it is at most 1.8 times as much as one vector; which it is then depends on the clock,
            and stays in ``state_dict``.
        directions: True: measure these two as well, at every step, for about half a product each. False: neither.
            None: spend one such half product at measured steps, if no ``budget`` is set and a program gives it: for
            the batch sharpness, and for the update curvature too where the update is along the gradient.

    Raises:
        ValueError: an argument out of range, one that a model over several processes does not have, probe and loader
            together, tf32 with tol below 0.005, or neither products nor directions.

    Cost per measured step: a gradient and 2 to 10 Hessian-vector products; twice that for adaptive optimizers and for
    parameter groups with learning rates or momenta of their own, whose preconditioned sharpness is tracked besides.
    A gradient and the batch sharpness alone (``products=False``) cost 1.7 to 1.8 gradients with plain SGD.
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
        params: Mapping[str, Tensor] | Iterable[str] | Iterable[Tensor] | None = None,
        chunk: int | None = None,
        recompute: bool = False,
        products: bool = True,
        block: int | Literal["auto"] | None = None,
        directions: bool | None = None,
    ) -> None:
        check_options(
            tol=tol, every=every, max_matvecs=max_matvecs, k=k, budget=budget, probe=probe, loader=loader, tf32=tf32,
            chunk=chunk, products=products, block=block, directions=directions,
        )  # fmt: skip
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self.tol, self.every, self.max_matvecs, self.k = tol, every, max_matvecs, k
        self.tf32, self.products, self.directions = tf32, products, directions
        self._target = Target(
            model, loss_fn, probe=probe, loader=loader, params=params, chunk=chunk, verify=verify, recompute=recompute
        )
        check_kind(self._target.kind, budget=budget, block=block, directions=directions or not products)
        self._steps = 0
        self._following = Following(
            k=k, tol=tol, every=every, max_matvecs=max_matvecs, budget=budget, probe=probe is not None, tf32=tf32,
            width=None if block == "auto" else block or 1,
        )  # fmt: skip
        self._failures = Failures()
        self._left_at: float | None = None  # clock at the end of the last call
        self._primal_seconds = math.nan  # that the last loss and gradient took
        self._has_threshold = has_threshold(optimizer)

    @property
    def hessian(self) -> StepHessian | None:
        """The Hessian of the last step's batch; None before the first step."""
        return self._target.hessian

    @hessian.setter
    def hessian(self, operator: StepHessian) -> None:
        # A run like one before takes over its exported program.
        self._target.hessian = operator

    @property
    def probe(self) -> Any:
        """The fixed batch whose Hessian is tracked; None where it is the step's own, "auto" until it is chosen."""
        return self._target.probe

    def step(self, batch: Any, *, certify: bool = False) -> Record:
        """Compute loss and gradients on a batch, set ``p.grad``, and measure.

        Args:
            batch: ``(inputs, targets)``; see ``HessianOperator``. Or ``MicroBatches``.
            certify: measure at this step, and run an independent solve from a random start too (40 products): see
                ``sharpkern.certify``. A larger eigenvalue that it finds is tracked from then on.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite; parameters and ``p.grad`` are as before the call.
            ValueError: bad batch; the optimizer lacks a trainable parameter of the model, or holds one of another
                module, whose gradient would not be set; a parameter has a hook that runs in ``backward()`` only; or
                the tracker was made for a part of the parameters.
        """
        start = time.perf_counter()
        # Before anything runs: a step that set some gradients and left stale ones elsewhere would train on both.
        if not self._target.whole_model():
            raise ValueError(
                "step() sets the gradient of every trainable parameter, but params= names a part of them: use "
                "observe() beside your own backward(), or freeze the others."
            )
        gradients = self._differentiate(batch, training=True)
        # Only now: after a loss that is not finite, step and gradients are as before the call.
        for p, g in gradients.items():
            p.grad = g
        # From the end of the last call: the caller's update and data loading belong to what a step takes.
        own = time.perf_counter() - (start if self._left_at is None else self._left_at)
        paid_from = time.perf_counter()
        status = self._choose(own, gradients, certify=certify)
        return self._measure(status, gradients, paid_from, certify=certify)

    def observe(self, batch: Any, gradients: Mapping[Tensor, Tensor] | None = None, *, certify: bool = False) -> Record:
        """Measure beside a training loop, without side effects; call it before ``optimizer.step()``.

        No ``p.grad`` is written, no buffer moves, no random number is used up. Dropout masks are those that the
        random state gives now, not those of the loop's own forward pass.

        Args:
            batch: the step's batch, as for ``step``; for gradient accumulation the last micro-batch, or all of them in
                ``MicroBatches``, whose loss and Hessian are those of the whole step.
            gradients: parameter -> the gradient that the optimizer will step with; read for the preconditioner of
                adaptive optimizers and the next update. None: ``p.grad``, so accumulated and clipped as it is, and
                the batch's own gradient for parameters that have none.
            certify: as for ``step``.

        Returns:
            The record; ``loss`` is the batch's, ``grad_norm`` that of the gradients to step with. At a step that only
            carries the last value nothing is computed, and both are NaN.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
            NotRepeatableError: the model reads an iterator; what a pass takes from it, training would miss.
            ValueError: bad batch; the optimizer lacks a parameter; a gradient has another shape; or ``p.grad`` is a
                hundred times the batch's own gradient and parallel to it, as a ``GradScaler`` leaves it.

        Cost: as ``step``, and one gradient at steps that are not carried.
        """
        start = time.perf_counter()
        own = 0.0 if self._left_at is None else start - self._left_at
        present: Any = {p: p.grad for p in self.model.parameters()} if gradients is None else gradients
        status = self._choose(own, present, certify=certify)
        if status == "carried" and not self.directions:
            self._steps += 1
            return self._left(self._record(math.nan, math.nan, status), start)
        # The program draws the dropout masks that the eager model would, so it moves the generators as far.
        with kept_random_states({p.device for p in self.model.parameters()}):
            batch_gradients = self._differentiate(batch, training=False)
        stepped = gradients_to_step_with(batch_gradients, gradients)
        return self._measure(status, stepped, start, certify=certify, beside=True)

    def _measure(
        self,
        status: Status,
        gradients: dict[Tensor, Tensor],
        paid_from: float,
        *,
        certify: bool,
        beside: bool = False,
    ) -> Record:
        """Do what a step's status says, after loss and gradient are known.

        Args:
            status: as chosen.
            gradients: that the optimizer will step with.
            paid_from: clock, from which on the time is the tracker's own.
            certify: see ``step``.
            beside: by ``observe``.
        """
        self._steps += 1
        if status in ("bounded", "carried") and self._decisive() not in self._following.followed:
            status = "measured"  # parameters were replaced since the choice, so there is nothing to carry
        hessian = self._target.hessian
        assert hessian is not None
        if self._target.waits_for_probe and self._following.budget is not None:
            operators = 1 if self._decisive() == "sharpness" else 2
            self._target.fit_probe(fraction=self._following.budget.fraction, operators=operators, beside=beside)
        try:
            look, directions = self._look(hessian, status, gradients, paid_from, certify=certify)
        except FAILURES as error:
            self._failures.note(error, self._steps, self._target.kind)
            status, look, directions = "failed", Look(converged=False), (None, None)
        # Last, because reading a number waits for the device.
        loss, grad_norm = float(hessian.loss), float(torch.nn.utils.get_total_norm(gradients.values()))
        return self._left(self._record(loss, grad_norm, status, look, directions), paid_from)

    def _look(
        self,
        hessian: StepHessian,
        status: Status,
        gradients: dict[Tensor, Tensor],
        paid_from: float,
        *,
        certify: bool,
    ) -> tuple[Look, tuple[float | None, float | None]]:
        """Look at the eigenvalues and along the directions, as far as the status says."""
        along, solves = self._measures_directions(status), status in ("measured", "bounded")
        # Made once: the preconditioned operator and the norm of the update are about the same P.
        P = None
        if self._decisive() != "sharpness" and (along or solves):
            P = threshold_preconditioner(self.optimizer, gradients)
        look = Look()
        if solves:
            look = self._following.look(
                status, self._operators(P), self._decisive(), self._steps, paid_from, gradient=hessian.gradient,
                certify=certify,
            )  # fmt: skip
        if not along:
            return look, (None, None)
        both = self.directions is True or not self.products
        return look, directional_curvatures(hessian, self.optimizer, gradients, P, two_forms=both)

    def _measures_directions(self, status: Status) -> bool:
        if self.directions is not None:
            return self.directions
        if not self.products:
            return True
        # Double backward has no half product: there, two forms cost two products.
        return self._target.has_program and status == "measured" and self._following.budget is None

    def _left(self, record: Record, paid_from: float) -> Record:
        """Note the time at which the caller's own work goes on, and what the step has cost until then."""
        self._left_at = time.perf_counter()
        seconds = self._left_at - paid_from
        # The first loss and gradient are exported and recorded: no unit to measure in.
        unit = math.nan if self._steps == 1 else self._primal_seconds
        return replace(record, seconds=seconds, gradients=seconds / unit if unit else math.nan)

    def cost(self, batch: Any = None) -> Cost:
        """Measure time and memory of tracking on this model; print it. Nothing of model or tracker changes.

        Args:
            batch: as for ``step``; None for that of the last step.

        Raises:
            ValueError: None before the first step; bad batch; a model that is wrapped for several processes.
            NonFiniteLossError: the loss is NaN or infinite.

        Cost: an export, and up to 17 rounds of the parts: two seconds, more for large models. Memory as for tracking.
        """
        last = getattr(self.hessian, "batch", None)  # there is none before the first step
        return cost_of(self._target.anew(), last if batch is None else batch)

    def memory(self, batch: Any) -> Memory:
        """Forecast the memory that a batch (with ``chunk`` a chunk) will need: a quarter of it is run, or one example.

        Raises:
            ValueError: it cannot be cut into examples.
        """
        return forecast(self._target.anew(), batch)

    def carry(self, loss: float, grad_norm: float) -> Record:
        """Count a step whose loss and gradient were computed elsewhere, and carry the last value.

        Args:
            loss: before the update; finite.
            grad_norm: Euclidean norm of the gradient.

        Raises:
            RuntimeError: nothing has been measured yet.
        """
        if self._decisive() not in self._following.followed:
            raise RuntimeError(
                "nothing to carry: the first step, and one after groups part, must be tracker.step(batch)."
            )
        self._steps += 1
        return self._record(loss, grad_norm, "carried")

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
        return replace(record, lr=learning_rate(self.optimizer.param_groups[0]), threshold=threshold, ratio=ratio)

    def _differentiate(self, batch: Any, *, training: bool) -> dict[Tensor, Tensor]:
        start = time.perf_counter()
        try:
            gradients, fits = self._target.differentiate(batch, self.optimizer, training=training)
        except NonFiniteLossError as error:
            raise NonFiniteLossError(error.loss, self._steps + 1) from None
        if not fits:
            self._following.followed.clear()
        self._primal_seconds = time.perf_counter() - start
        return gradients

    def _choose(self, own_seconds: float, gradients: Mapping[Tensor, Tensor | None], *, certify: bool) -> Status:
        if not self.products:
            return "untracked"
        self._following.hear(gradients)
        ratio = self._threshold_and_ratio()[1] if self._decisive() in self._following.followed else None
        return self._following.choose(self._steps + 1, self._decisive(), own_seconds, ratio, certify=certify)

    def _operators(self, P: Preconditioner | None) -> dict[str, Operator]:
        """Return what to solve, at the present parameters."""
        tracked = self._target.tracked(maximize=climbs(self.optimizer))
        operators: dict[str, Operator] = {"sharpness": tracked}
        if P is not None:
            operators["preconditioned_sharpness"] = PreconditionedOperator(tracked, P)
        return operators

    def _decisive(self) -> str:
        """Name the curvature that the threshold is about, by the groups' present learning rates."""
        adaptive = self._has_threshold and is_adaptive(self.optimizer)
        return "preconditioned_sharpness" if adaptive else "sharpness"

    def _threshold_and_ratio(self) -> tuple[float | None, float | None]:
        if not self._has_threshold:
            return None, None
        lr, kappa = learning_rate(self.optimizer.param_groups[0]), stability_threshold(self.optimizer)
        threshold = kappa / lr if lr > 0 else math.inf
        if not self.products:
            return threshold, None
        deciding = self._following.followed.get(self._decisive())  # there is none after a first step that failed
        return threshold, math.nan if deciding is None else lr * deciding.value / kappa

    def _record(
        self,
        loss: float,
        grad_norm: float,
        status: Status,
        look: Look | None = None,
        directions: tuple[float | None, float | None] = (None, None),
    ) -> Record:
        threshold, ratio = self._threshold_and_ratio()
        failed, look = status == "failed", look or Look()
        adaptive = self.products and self._decisive() != "sharpness"
        return Record(
            step=self._steps,
            loss=loss,
            lr=learning_rate(self.optimizer.param_groups[0]),
            grad_norm=grad_norm,
            threshold=threshold,
            ratio=math.nan if failed and ratio is not None else ratio,
            matvecs=look.matvecs,
            status=status,
            converged=look.converged,
            upper=look.upper,
            batch_sharpness=directions[0],
            update_curvature=directions[1],
            **self._following.seen(self._steps, failed=failed, adaptive=adaptive),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to continue identically: tensors and plain Python only."""
        return {
            "version": _VERSION,
            "steps": self._steps,
            **self._following.state_dict(),
            **({"probe": self._target.probe} if self._target.auto_probe else {}),
        }

    def __getstate__(self) -> dict[str, Any]:
        # A copy may go on in another process, whose clock starts elsewhere. The budget then misses one step's time.
        return {**vars(self), "_left_at": None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict()``'s result; the tracker must have been made with the same options.

        Raises:
            ValueError: a field is missing or unknown, here or in a part's state, or a version is another one.
        """
        parts = ("followed", "budget", "width")
        probe = ("probe",) if self._target.auto_probe else ()
        check_state("SharpnessTracker", state, ("steps", *parts, *probe), _VERSION)
        self._following.load_state_dict({name: state[name] for name in parts})
        self._steps = state["steps"]
        if probe:
            self._target.set_probe(state["probe"])
