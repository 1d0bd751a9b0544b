"""What a tracker measures: the loss of a step's batch, and the operator whose eigenvalues are followed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature.chunked import ChunkedHessian, MicroBatches
from ..curvature.dataset import DatasetHessian
from ..curvature.distributed.choose import hessian_of
from ..curvature.distributed.replicated import DataParallelHessian
from ..curvature.distributed.sharded import ShardedHessian
from ..curvature.negative import NegativeOperator
from ..curvature.operators import HessianOperator
from ..curvature.parameters import gradients_of, select_parameters
from ..curvature.repeatable import check_no_iterator
from ..curvature.wrappers import inside, kind_of
from ..optimizers.held import check_held
from ..rop import ReplayedProgram
from ..rop.sandbox import kept_random_states, same_noise
from .probe import fitted_probe

StepHessian = HessianOperator | ChunkedHessian | DataParallelHessian | ShardedHessian
Tracked = StepHessian | DatasetHessian


class Target:
    """The Hessian of a step's own batch, and that of a probe or a loader if one is tracked instead.

    Args:
        model: a module.
        loss_fn: ``(output, targets) -> scalar``.
        probe: a fixed batch; "auto" until ``fit_probe`` has cut one; or None.
        loader: batches, or None.
        params: the parameters to differentiate by; None for all with ``requires_grad``.
        chunk: the most examples of a batch that are differentiated at a time; None for all.
        verify: compare programs with the eager model.
        recompute: keep less of the forward pass; see ``HessianOperator``.

    Raises:
        ValueError: a kind of parallelism that is not supported, or an option that its operator does not have.

    Attributes:
        kind: what the model is wrapped in, see ``kind_of``.
        hessian: of the step's batch, None before the first one.
        order: name and shape of each parameter in a vector, None before the first batch.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        *,
        probe: Any,
        loader: Iterable[Any] | None,
        params: Mapping[str, Tensor] | Iterable[str] | Iterable[Tensor] | None,
        chunk: int | None,
        verify: bool,
        recompute: bool = False,
    ) -> None:
        self.model, self.loss_fn = model, loss_fn
        self.kind = kind_of(model)
        if self.kind != "plain" and loader is not None:
            raise ValueError(
                f"loader= is for a model that one process holds, and this one is wrapped for several ({self.kind}): "
                "leave it out."
            )
        if self.kind == "fsdp2" and not (params is None and chunk is None and not recompute):
            raise ValueError("params=, chunk= and recompute= are not for a model under fully_shard: leave them out.")
        self.probe, self.loader, self.chunk, self.verify, self.recompute = probe, loader, chunk, verify, recompute
        # A generator of names would be empty the second time.
        self.params: Any = params if params is None or isinstance(params, Mapping | str) else list(params)
        self.hessian: StepHessian | None = None
        self.order: list[tuple[str, torch.Size]] | None = None
        self.auto_probe = self.waits_for_probe  # whether the probe is part of the run's state
        self._instead: Tracked | None = None
        self._present: list[int] = []  # what was checked last: ids of the parameters of model and optimizer

    def differentiate(
        self, batch: Any, optimizer: torch.optim.Optimizer, *, training: bool
    ) -> tuple[dict[Tensor, Tensor], bool]:
        """Compute loss and gradient of a batch.

        Args:
            batch: as for ``HessianOperator``, or ``MicroBatches``.
            optimizer: must hold the parameters.
            training: this is the training step itself: buffers change, and the gradients will be set.

        Returns:
            parameter -> gradient, and whether vectors of earlier steps still fit the parameters.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
            NotRepeatableError: the model reads an iterator, and this is not the training step itself.
            ValueError: bad batch, or see ``check_held``.
        """
        if self.chunk is not None and not isinstance(batch, MicroBatches):
            batch = MicroBatches.split(batch, self.chunk)
        # A loop may change from one form to the other, as for its last, shorter batch.
        same_form = isinstance(self.hessian, ChunkedHessian) == isinstance(batch, MicroBatches)
        if self.hessian is not None and (same_form or isinstance(self.hessian, DataParallelHessian)):
            self.hessian.refresh(batch, update_buffers=training)
        else:
            self.hessian = self._operator(batch, update_buffers=training)
        if not training:
            _check_beside(self.hessian)
        fits = self._follow(self.hessian.params, optimizer, sets_gradients=training)
        return gradients_of(self.hessian), fits

    def anew(self) -> Target:
        """Return a target of the same options that has run nothing."""
        return Target(
            self.model,
            self.loss_fn,
            probe=self.probe,
            loader=self.loader,
            params=self.params,
            chunk=self.chunk,
            verify=self.verify,
            recompute=self.recompute,
        )

    def plain_hessian(self, batch: Any) -> HessianOperator:
        """Return the Hessian of a batch as a whole, of a model that one process holds; nothing is kept."""
        options: dict[str, Any] = {"params": self.params, "verify": self.verify, "recompute": self.recompute}
        return HessianOperator(self.model, self.loss_fn, batch, **options)

    def operators(self, batch: Any) -> tuple[StepHessian, Tracked]:
        """Return the Hessian of a batch, and the operator that is tracked; no buffer changes."""
        if self.chunk is not None and not isinstance(batch, MicroBatches):
            batch = MicroBatches.split(batch, self.chunk)
        self.hessian = self._operator(batch, update_buffers=False)
        return self.hessian, self._tracked()

    def __getstate__(self) -> dict[str, Any]:
        # Programs are made anew where the copy goes on: they hold views of this model's parameters.
        return {**vars(self), "hessian": None, "_instead": None, "_present": []}

    @property
    def has_program(self) -> bool:
        """Whether a program gives the products of the step's Hessian; with several processes, on every one."""
        assert self.hessian is not None
        # Where a model can be exported on some processes only, all must still make the same calls.
        if isinstance(self.hessian, DataParallelHessian):
            return self.hessian.all_programs
        return isinstance(self.hessian.engine, ReplayedProgram)

    @property
    def waits_for_probe(self) -> bool:
        """Whether the probe is still to be cut."""
        return isinstance(self.probe, str)

    def fit_probe(self, *, fraction: float, operators: int, beside: bool) -> None:
        """Cut a probe off the present batch; see ``fitted_probe``.

        Raises:
            ValueError: the batch cannot be cut into examples.
        """
        assert isinstance(self.hessian, HessianOperator | ChunkedHessian)  # no budget with several processes
        with kept_random_states(self._devices()):
            self.set_probe(
                fitted_probe(
                    self.plain_hessian,
                    self.hessian.batch,
                    fraction=fraction,
                    operators=operators,
                    beside=beside,
                    chunk=self.chunk,
                )
            )

    def set_probe(self, probe: Any) -> None:
        """Track a fixed batch from now on."""
        if probe is not self.probe:
            self.probe, self._instead = probe, None

    def whole_model(self) -> bool:
        """Whether every trainable parameter is differentiated by, so that its gradient can be set."""
        if self.params is None:  # asked at every step, where a walk over the modules would be felt
            return True
        chosen = {id(p) for p in select_parameters(inside(self.model), self.params).values()}
        return all(id(p) in chosen for p in self.model.parameters() if p.requires_grad)

    def tracked(self, *, maximize: bool) -> Tracked | NegativeOperator:
        """Return the operator whose eigenvalues are followed, at the present parameters.

        Args:
            maximize: the optimizer climbs, which is to descend minus the loss: return that one's operator.
        """
        operator = self._tracked()
        return NegativeOperator(operator) if maximize else operator

    def _tracked(self) -> Tracked:
        assert self.hessian is not None
        if self.probe is None and self.loader is None:
            return self.hessian
        if self.waits_for_probe:
            raise ValueError(
                'probe="auto" is cut off the first step\'s batch: ask after that step, or give probe= a batch of your '
                "own."
            )
        # These are kept from step to step, as their export and recordings are.
        if self._instead is not None and not isinstance(self._instead, DatasetHessian):
            with same_noise(self._devices()):
                self._instead.refresh()
        elif self._instead is None and self.loader is not None:
            self._instead = DatasetHessian(
                self.model,
                self.loss_fn,
                self.loader,
                params=self.params,
                verify=self.verify,
                recompute=self.recompute,
            )
        elif self._instead is None:
            probe = self.probe if self.chunk is None else MicroBatches.split(self.probe, self.chunk)
            with same_noise(self._devices()):
                self._instead = self._operator(probe, update_buffers=False)
            _check_beside(self._instead)
        return self._instead

    def _devices(self) -> set[torch.device]:
        return {p.device for p in self.model.parameters()}

    def _operator(self, batch: Any, *, update_buffers: bool) -> StepHessian:
        options: dict[str, Any] = {
            "params": self.params, "update_buffers": update_buffers, "verify": self.verify, "recompute": self.recompute,
        }  # fmt: skip
        if self.kind == "plain" and isinstance(batch, MicroBatches):
            return ChunkedHessian(self.model, self.loss_fn, batch, **options)
        # Processes weigh alike, as DDP and FSDP average gradients: the curvature is that of the loss descended.
        return hessian_of(self.model, self.loss_fn, batch, weighting="ranks", **options)

    def _follow(self, params: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, *, sets_gradients: bool) -> bool:
        """Check who holds the parameters when they are others than before; say whether the flat order is the same.

        A layer that was unfrozen or replaced by one of other shapes has no place in the vectors followed so far.
        """
        held = [p for group in optimizer.param_groups for p in group["params"]]
        present = [int(sets_gradients), *(id(p) for p in (*params.values(), *held))]
        if present == self._present:
            return True
        self._present = present
        check_held(optimizer, params, sets_gradients=sets_gradients)
        order = [(name, p.shape) for name, p in params.items()]
        fits = self.order is None or order == self.order
        if not fits:
            # The probe's operator holds the old parameters, and would go on with them without a word.
            self._instead = None
        self.order = order
        return fits


def _check_beside(operator: StepHessian) -> None:
    """Refuse passes beside training's own where each would take a value from an iterator of the model's."""
    if isinstance(operator, HessianOperator | ChunkedHessian):
        check_no_iterator(operator.iterators)
