"""Sharpness beside Hugging Face's Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..tracking.tracker import SharpnessTracker
from .observer import Observer, data_parallel


class SharpnessCallback(TrainerCallback):
    """Observes the optimizer steps of a Trainer, and logs to whatever the Trainer logs to.

        trainer.add_callback(SharpnessCallback(trainer, every=10))

    The loss is the model's own, on the step's micro-batches as they are (padding, gradient accumulation, tokens counted
    over the whole step), with the dropout masks of the step itself; clipped gradients are the optimizer's. Training is
    bit for bit what it is without. Under ``DistributedDataParallel`` every process makes the callback; what is measured
    is the loss over all processes, whose gradient the optimizer gets, and the first process writes the file.

    Args:
        trainer: whose steps to observe.
        loss_fn: ``(output, batch) -> scalar``, where the Trainer does not minimise the loss that the model returns
            (label smoothing, ``compute_loss_func``, an overridden ``compute_loss``). Scaled as what that returns,
            but for the factor by which the Trainer's own ``compute_loss`` counts processes. Compared with the
            Trainer's gradient at the first step.
        every: observe steps 1, 1 + every, ...
        path: of the JSON lines, one for each observed step; None for ``sharpness.jsonl`` in the Trainer's
            ``output_dir``.
        options: of ``SharpnessTracker``.

    Raises:
        ValueError: the Trainer minimises another loss than the model's and ``loss_fn`` is not given, or runs on several
            devices in another way than ``DistributedDataParallel``; while training, the first gradient is not that of
            the loss, or a multiple of it.
        DistributedError: while training, a process failed, is missing, or does something else than the others.

    Cost: nothing at the steps between. At an observed one what ``SharpnessTracker.observe`` costs; with c
    micro-batches, each product takes c gradients more, so that the memory stays that of one.
    """

    def __init__(
        self,
        trainer: Trainer,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        *,
        every: int = 1,
        path: Path | str | None = None,
        **options: Any,
    ) -> None:
        if trainer.args.n_gpu > 1:
            raise ValueError(
                f"SharpnessCallback needs one process for each device, and this one has {trainer.args.n_gpu} GPUs "
                "(DataParallel): start with torchrun or accelerate launch, which makes it DistributedDataParallel."
            )
        own = type(trainer).compute_loss is not Trainer.compute_loss
        if loss_fn is None and (own or trainer.label_smoother is not None or trainer.compute_loss_func is not None):
            raise ValueError(
                "this Trainer does not minimise the loss that the model returns (label smoothing, compute_loss_func "
                "or an overridden compute_loss): pass loss_fn(output, batch) -> scalar."
            )
        self.trainer, self.loss_fn = trainer, loss_fn or _loss_of_output
        self.every, self.path, self.options = every, path, options
        self._observer: Observer | None = None
        self._values: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the tracker, and listen to the Trainer's losses."""
        model = self.trainer.model if args.world_size == 1 else data_parallel(self.trainer.model_wrapped)
        tracker = SharpnessTracker(model, self.loss_fn, kwargs["optimizer"], **self.options)
        path = Path(args.output_dir) / "sharpness.jsonl" if self.path is None else Path(self.path)
        first = state.is_world_process_zero
        self._observer = Observer(tracker, path if first else None, every=self.every, done=state.global_step)
        # On the instance, so that nothing is left on the class, and an overridden method is called too.
        self.trainer.compute_loss = self._compute_loss

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Observe: gradients are accumulated, clipped and unscaled now."""
        if self._observer is not None and self._observer.wants(state.global_step + 1):
            longest = args.max_grad_norm if args.max_grad_norm and args.max_grad_norm > 0 else math.inf
            self._values = self._observer.observe(state.global_step + 1, clipped_to=longest)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log under the number that the step has now."""
        if self._values:
            should_log = control.should_log
            self.trainer.log(self._values)
            control.should_log = should_log  # the Trainer's own values are still to come
            self._values = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the Trainer as it was."""
        if self._observer is not None:
            self._observer.close()
            self._observer = None
            del self.trainer.compute_loss

    def _compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Note the micro-batch of a training step, and compute its loss as the Trainer does."""
        observer = self._observer
        training = model.training and torch.is_grad_enabled()  # an evaluation comes here too
        if observer is not None and training and observer.wants(self.trainer.state.global_step + 1):
            items = kwargs.get("num_items_in_batch")
            observer.add(self._batch(inputs, items), self._weight(items))
        return type(self.trainer).compute_loss(self.trainer, model, inputs, *args, **kwargs)

    def _batch(self, inputs: Any, items: Tensor | int | None) -> dict[str, Any]:
        """Return what the model is called with."""
        batch = dict(inputs)
        if self.trainer.model_accepts_loss_kwargs and items is not None:
            # As a tensor, because a Python number is a part of the exported program, and this one changes.
            batch["num_items_in_batch"] = torch.as_tensor(items)
        return batch

    def _weight(self, items: Tensor | int | None) -> float:
        """Return what the Trainer multiplies a micro-batch's loss with; processes are averaged over afterwards."""
        trainer = self.trainer
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        counts = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
        if scaled is None:
            counted = trainer.model_accepts_loss_kwargs and items is not None
            scaled = counted or trainer.compute_loss_func is not None
        weight = 1.0 if scaled else 1.0 / trainer.current_gradient_accumulation_steps
        # Tokens are counted over all processes then, so that their losses are to be summed, while DDP averages. An
        # overridden method has its own way, and may or may not call this one.
        own = type(trainer).compute_loss is not Trainer.compute_loss
        if trainer.args.average_tokens_across_devices and counts and items is not None and not own:
            weight *= trainer.accelerator.num_processes
        return weight


def _loss_of_output(output: Any, _batch: Any) -> Tensor:
    loss: Tensor = output["loss"] if isinstance(output, Mapping) else output[0]
    return loss
