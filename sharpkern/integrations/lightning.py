"""Sharpness beside Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ..tracking.tracker import SharpnessTracker
from .observer import Observer, data_parallel


class SharpnessCallback(Callback):
    """Observes the optimizer steps of a Trainer, and logs to its loggers.

        Trainer(callbacks=[SharpnessCallback(loss_fn, every=10)])

    The curvature is that of ``loss_fn(module(inputs), targets)`` on the step's own micro-batches, with the dropout
    masks of the step itself; clipped gradients are the optimizer's. ``training_step`` is not run again, because it
    logs. Training is bit for bit what it is without. With ``DDPStrategy`` what is measured is the mean over the
    processes, whose gradient the optimizer gets, and the first process writes the file.

    Args:
        loss_fn: the loss that ``training_step`` minimises, ``(output, targets) -> scalar``, or ``(output, batch)`` for
            a dict batch. Compared with the Trainer's gradient at the first step.
        every: observe optimizer steps 1, 1 + every, ...
        path: of the JSON lines, one for each observed step; None for ``sharpness.jsonl`` in the Trainer's ``log_dir``
            or ``default_root_dir``.
        batch: turns what the data loader gives into ``(inputs, targets)`` or a dict; None if it is that already.
        options: of ``SharpnessTracker``.

    Raises:
        ValueError: while training, the Trainer runs on several devices with another strategy than DDP, the module has
            several optimizers or optimizes by hand, or the first gradient is not that of the loss, or a multiple of it.
        DistributedError: while training, a process failed, is missing, or does something else than the others.

    Cost: nothing at the steps between. At an observed one what ``SharpnessTracker.observe`` costs; with c
    micro-batches, each product takes c gradients more, so that the memory stays that of one.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Tensor],
        *,
        every: int = 1,
        path: Path | str | None = None,
        batch: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        self.loss_fn, self.every, self.path, self.batch, self.options = loss_fn, every, path, batch, options
        self._observer: Observer | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the tracker."""
        if len(trainer.optimizers) != 1 or not pl_module.automatic_optimization:
            raise ValueError(
                f"SharpnessCallback needs one optimizer that Lightning steps, got {len(trainer.optimizers)}; with "
                "automatic_optimization=False call SharpnessTracker.observe in training_step."
            )
        model = pl_module if trainer.world_size == 1 else data_parallel(trainer.strategy.model)
        tracker = SharpnessTracker(model, self.loss_fn, trainer.optimizers[0], **self.options)
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # on every process: the first tells the others
        path = folder / "sharpness.jsonl" if self.path is None else Path(self.path)
        first = trainer.is_global_zero
        self._observer = Observer(tracker, path if first else None, every=self.every, done=trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the micro-batch; it is on its device now."""
        if self._observer is not None and self._observer.wants(trainer.global_step + 1):
            accepted = batch if self.batch is None else self.batch(batch)
            self._observer.add(accepted, 1.0 / trainer.accumulate_grad_batches)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Observe: gradients are accumulated and unscaled now, and about to be clipped."""
        step = trainer.global_step + 1
        if self._observer is None or not self._observer.wants(step):
            return
        # Mixed precision holds for the forward pass only, and the observed one must be the same.
        with trainer.precision_plugin.forward_context(), torch.enable_grad():
            values = self._observer.observe(step, _clipped(trainer, pl_module, optimizer))
        # Not ``pl_module.log``: it would average over an epoch, and a logger may write fewer steps than were observed.
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the file."""
        if self._observer is not None:
            self._observer.close()
            self._observer = None


def _clipped(
    trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer
) -> dict[Tensor, Tensor] | None:
    """Return the gradients as the optimizer will get them; None where they are not clipped.

    Lightning clips after this hook, inside of ``optimizer.step``, and a module may override how: so the gradients are
    clipped now, copied, and put back.
    """
    overridden = type(module).configure_gradient_clipping is not LightningModule.configure_gradient_clipping
    if trainer.gradient_clip_val is None and not overridden:
        return None
    gradients = {p: p.grad for p in module.parameters() if p.grad is not None}
    before = [g.clone() for g in gradients.values()]
    module.configure_gradient_clipping(
        optimizer,
        gradient_clip_val=trainer.gradient_clip_val,
        gradient_clip_algorithm=trainer.gradient_clip_algorithm,
    )
    after: dict[Tensor, Tensor] = {p: g.clone() for p, g in gradients.items()}
    for g, was in zip(gradients.values(), before, strict=True):
        g.copy_(was)
    return after
