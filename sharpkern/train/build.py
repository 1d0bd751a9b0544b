"""What a run is made of, from its configuration: task, optimizer, schedule, tracker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..optimizers.gi_adam import GIAdam
from ..optimizers.rules import rule_of
from ..tracking.tracker import SharpnessTracker
from ..warmup.schedule import WarmupLR
from .config import TrainConfig
from .data import Dataset, load
from .losses import build_loss, loss_targets
from .metrics import Row
from .models import CNN, FCN, GPT
from .own import load_own


def build_model(config: TrainConfig, data: Dataset) -> nn.Module:
    """Make the reference model that fits the data, float32 on the CPU.

    Args:
        config: model, context and seed are read.
        data: sets the number of inputs, channels and outputs.

    Raises:
        ValueError: see ``FCN``, ``GPT``.
    """
    m = config.model
    if m.kind == "gpt":
        return GPT(
            data.classes, config.data.context, width=m.width, heads=m.heads, blocks=m.blocks, last_norm=m.last_norm,
            seed=config.seed,
        )  # fmt: skip
    if m.kind == "cnn":
        return CNN(data.train_inputs.shape[1], data.classes, width=m.width, seed=config.seed)
    return FCN(
        data.train_inputs[0].numel(), data.classes, depth=m.depth, width=m.width, activation=m.activation,
        parameterisation=m.parameterisation, zero_readout=m.zero_readout, seed=config.seed,
    )  # fmt: skip


def build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer, one group of all parameters; the schedule sets its learning rate.

    Args:
        config: the table ``optimizer`` is read.
        model: gives the parameters.
    """
    o = config.optimizer
    if o.name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=o.lr, momentum=o.momentum)
    betas = (o.beta1, o.beta2)
    if o.name == "adam":
        return torch.optim.Adam(model.parameters(), lr=o.lr, betas=betas, eps=o.eps)
    v0: Literal["gradient", "random"] = "random" if o.name == "ri-adam" else "gradient"
    return GIAdam(model.parameters(), lr=o.lr, betas=betas, eps=o.eps, v0=v0)


def batch_at(step: int, config: TrainConfig, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the batch of step 1, 2, ...: the full batch, or the next part of this epoch's permutation.

    A function of the step and the seed alone, so that a resumed run needs no data state. Incomplete batches at the end
    of an epoch are dropped.

    Args:
        step: from 1 on.
        config: batch size and seed are read.
        inputs: ``[N, ...]``.
        targets: ``[N, ...]``.

    Returns:
        ``[batch_size, ...]`` each; a copy, but for the full batch.

    Cost: a permutation of N, and the copy.
    """
    size = config.batch_size
    if size is None or size >= len(inputs):
        return inputs, targets
    per_epoch = len(inputs) // size
    epoch, index = divmod(step - 1, per_epoch)
    # The factor is larger than any number of epochs, so that no two seeds ever share a permutation.
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(config.seed * 1_000_003 + epoch))
    chosen = order[index * size : (index + 1) * size]
    return inputs[chosen], targets[chosen]


def evaluated_at(step: int, config: TrainConfig) -> bool:
    """Whether accuracies and test loss are measured at a step."""
    return step == 1 or step % config.eval_every == 0 or step == config.steps


def what_is_exported(config: TrainConfig) -> tuple[Any, ...]:
    """Return what runs with one exported program have in common."""
    # Neither seed nor optimizer: a program reads parameters from their memory and holds none of their values.
    return config.task, config.model, config.data, config.loss, config.batch_size, config.tracking.recompute


class Task(Protocol):
    """What is trained.

    Attributes:
        model: as it starts.
        loss_fn: see ``HessianOperator``.
        note: where the data came from, and how much there is.
        per_epoch: batches in an epoch.
    """

    model: nn.Module
    loss_fn: Callable[..., Tensor]
    note: str
    per_epoch: int

    def batch(self, step: int) -> Any:
        """Return the batch of step 1, 2, ...; the same one whenever it is asked for."""

    def whole(self) -> list[Any]:
        """Return batches that hold every training example once."""

    def evaluate(self) -> Row:
        """Measure the model as it is; nothing for a task that has no test data."""


class ReferenceTask:
    """A reference model on a data set: see ``Task``.

    Args:
        config: model, data, loss, batch size and seed are read.
        like: of the same model, data, loss and batch size; its data are used again, and so is its model, which then
            holds this task's initial parameters.

    Attributes:
        data: inputs and classes.
        targets: what the loss takes, of the training set.

    Raises:
        ValueError, FileNotFoundError: see ``data.load``.
    """

    def __init__(self, config: TrainConfig, like: ReferenceTask | None = None) -> None:
        self.config = config
        self.data: Dataset = load(config.data) if like is None else like.data
        self.targets: Tensor = loss_targets(config, self.data.train_targets, self.data)
        self.model: nn.Module = build_model(config, self.data)
        if like is not None:
            # The program is bound to the memory of that model's parameters: they get the new values, and not the other
            # way round.
            like.model.load_state_dict(self.model.state_dict())
            like.model.zero_grad()
            self.model = like.model
        self.loss_fn: Callable[..., Tensor] = build_loss(config)
        count = len(self.targets)
        self.note = f"{self.data.note}, {count} training examples"
        self.per_epoch: int = count // min(config.batch_size or count, count)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the batch of step 1, 2, ...."""
        return batch_at(step, self.config, self.data.train_inputs, self.targets)

    def whole(self) -> list[Any]:
        """Return the training set, cut into batches; the last one may be smaller."""
        size = self.config.batch_size or len(self.targets)
        return list(zip(self.data.train_inputs.split(size), self.targets.split(size), strict=True))

    @torch.no_grad()
    def evaluate(self) -> Row:
        """Accuracy on training and test data, and the test loss, at the present parameters."""
        result: Row = {}
        # The mode is left alone: reference models have neither dropout nor batch norm.
        for split, inputs, targets in (
            ("train", self.data.train_inputs, self.data.train_targets),
            ("test", self.data.test_inputs, self.data.test_targets),
        ):
            # In parts, as the activations of 60,000 images at once may not fit.
            output = torch.cat([self.model(x) for x in inputs.split(1000)])
            result[f"{split}_accuracy"] = float((output.argmax(-1) == targets).float().mean())
            if split == "test":
                # Of all outputs together: a mean of the parts' means would weigh a smaller last part too much.
                goal = loss_targets(self.config, targets, self.data)
                result["test_loss"] = float(self.loss_fn(output, goal))
        return result


class OwnTask:
    """A user's own model and data: see ``Task``. Step t takes the batch (t - 1) mod ``per_epoch``.

    Args:
        name: ``package.module:function``.

    Raises:
        ValueError: see ``load_own``.
    """

    def __init__(self, name: str) -> None:
        parts = load_own(name)
        self.model, self.loss_fn, self._batches = parts.model, parts.loss_fn, parts.batches
        self.per_epoch: int = len(parts.batches)
        self.note = f"{name}, {self.per_epoch} batch(es)"

    def batch(self, step: int) -> Any:
        """Return the batch of step 1, 2, ...."""
        return self._batches[(step - 1) % self.per_epoch]

    def whole(self) -> list[Any]:
        """Return all batches."""
        return self._batches

    def evaluate(self) -> Row:
        """Nothing is known of how to evaluate it."""
        return {}


def build_task(config: TrainConfig, *, like: Task | None = None) -> Task:
    """Make what is trained, with the threads and from the seed of a configuration.

    Args:
        config: what to train.
        like: a reference task whose data and model are used again.

    Raises:
        ValueError: ``like`` is of another model, data, loss, batch size or recompute, or a user's own; see
            ``OwnTask`` and ``ReferenceTask`` for the others.
        FileNotFoundError: missing data.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    # For a user's own function, RI-Adam's draw and dropout; reference models have generators of their own.
    torch.manual_seed(config.seed)
    if like is None:
        return ReferenceTask(config) if config.task is None else OwnTask(config.task)
    if not isinstance(like, ReferenceTask) or what_is_exported(config) != what_is_exported(like.config):
        raise ValueError(
            f"{config.out} has another model, data, loss, batch size or recompute than the run that it is like."
        )
    return ReferenceTask(config, like)


def build_schedule(config: TrainConfig, task: Task, optimizer: torch.optim.Optimizer) -> WarmupLR:
    """Make the learning rate's schedule; a critical start is measured here, on the first batch.

    Args:
        config: the table ``optimizer`` and the number of steps are read.
        task: its model is measured for a critical start, and left as it is.
        optimizer: gets the first step's learning rate.

    Raises:
        NonFiniteLossError: for a critical start: the loss is NaN or infinite.

    Cost: nothing, or for a critical start one gradient and some forward passes (``critical_learning_rate``).
    """
    o = config.optimizer
    return WarmupLR(
        optimizer, o.lr, o.warmup_steps, lr_init="critical" if o.critical_start else o.lr_init,
        probe=(task.model, task.loss_fn, task.batch(1)), rise=rule_of(optimizer).rise, power=o.power,
        decay=o.decay, total_steps=config.steps,
    )  # fmt: skip


def build_tracker(config: TrainConfig, task: Task, optimizer: torch.optim.Optimizer) -> SharpnessTracker:
    """Make the tracker; nothing is exported or measured before its first step.

    Args:
        config: the table ``tracking`` is read.
        task: model, loss, and the data of a probe or of a whole-dataset Hessian.
        optimizer: that the tracker reads.

    Raises:
        ValueError: the probe has more examples than there are.
    """
    t = config.tracking
    probe = None if t.probe is None else first_examples(task, t.probe)
    # What is known of one mini-batch's Hessian says little of the next one's, so that there is nothing to carry.
    if t.budget is not None and task.per_epoch > 1 and probe is None and not t.dataset:
        probe = "auto"
    block: int | Literal["auto"] | None = {"no": None, "yes": 3, "auto": "auto"}[t.block]
    return SharpnessTracker(
        task.model, task.loss_fn, optimizer, tol=t.tol, every=t.every, max_matvecs=t.max_matvecs, k=t.k,
        budget=t.budget, probe=probe,
        loader=task.whole() if t.dataset else None, tf32=t.tf32,
        chunk=t.chunk, recompute=t.recompute, products=t.products, block=block, directions=t.directions,
    )  # fmt: skip


def first_examples(task: Task, count: int) -> Any:
    """Return a batch of the first so many training examples, in the order of ``task.whole()``.

    Args:
        task: its batches' tensors have one row an example.
        count: at least 1.

    Raises:
        ValueError: there are fewer examples.
    """
    parts: list[Any] = []
    left = count
    for batch in task.whole():
        leaves, spec = pytree.tree_flatten(batch)
        # A batch may hold several inputs or a mask: all tensors have one row an example, and the first tells how many.
        rows = next(len(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        parts.append([leaf[:left] if isinstance(leaf, Tensor) else leaf for leaf in leaves])
        left -= min(rows, left)
        if not left:
            columns = zip(*parts, strict=True)
            return pytree.tree_unflatten([torch.cat(c) if isinstance(c[0], Tensor) else c[0] for c in columns], spec)
    raise ValueError(f"tracking.probe = {count}, but there are only {count - left} training examples.")
