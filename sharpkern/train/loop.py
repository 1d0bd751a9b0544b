"""The training loop: a tracked step, an update, a row of metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..curvature.losses import NonFiniteLossError
from ..optimizers.gi_adam import GIAdam
from ..optimizers.norms import dead_units, optimizer_norms
from ..tracking.record import Record
from ..tracking.tracker import SharpnessTracker
from ..warmup.schedule import WarmupLR
from . import checkpoint
from .config import TrainConfig, to_toml
from .data import Dataset, load
from .losses import build_loss, loss_targets
from .metrics import MetricsFile, Row, replace_file
from .models import CNN, FCN, GPT
from .moments import draw_second_moment, initial_preconditioned_sharpness


def build_model(config: TrainConfig, data: Dataset) -> nn.Module:
    """Make the model that fits the data."""
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
    """Make the optimizer; the schedule sets its learning rate."""
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
    """
    size = config.batch_size
    if size is None or size >= len(inputs):
        return inputs, targets
    per_epoch = len(inputs) // size
    epoch, index = divmod(step - 1, per_epoch)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(config.seed * 1_000_003 + epoch))
    chosen = order[index * size : (index + 1) * size]
    return inputs[chosen], targets[chosen]


def evaluated_at(step: int, config: TrainConfig) -> bool:
    """Whether accuracies and test loss are measured at a step."""
    return step == 1 or step % config.eval_every == 0 or step == config.steps


def what_is_exported(config: TrainConfig) -> tuple[Any, ...]:
    """Return what runs with one exported program have in common."""
    return config.model, config.data, config.loss, config.batch_size


class Run:
    """A run in its folder: config.toml, metrics.jsonl, checkpoint.pt.

    A row of metrics.jsonl holds the fields of the step's ``Record``; what tells a failing Adam, ``m_norm``, ``v_norm``
    and ``theta_norm`` after the update and the share of ``dead_units`` (see ``optimizer_norms``, ``dead_units``); at
    step 1 of an adaptive optimizer ``initial_adam`` and ``initial_gi_adam`` (see ``initial_preconditioned_sharpness``);
    where it was evaluated accuracies and test loss; and ``seconds``.

    Args:
        config: what to train.
        resume: continue from the folder's checkpoint.
        like: a run that takes no more steps, of the same model, data, loss and batch size, whatever its seed. Its data,
            model and exported program are used again, which saves most of a short run's start; this run is the same
            with it and without.

    Raises:
        ValueError: the folder holds another run already, the configuration is invalid, or ``like`` differs.
        FileNotFoundError: nothing to resume, or missing data.
    """

    def __init__(self, config: TrainConfig, *, resume: bool = False, like: Run | None = None) -> None:
        config.validate()
        self.config: TrainConfig = config
        self.folder = config.out
        if like is not None and what_is_exported(config) != what_is_exported(like.config):
            raise ValueError(f"{config.out} has another model, data, loss or batch size than {like.config.out}.")
        if not resume and (self.folder / "metrics.jsonl").exists():
            raise ValueError(
                f"{self.folder} holds a run already: choose another --out, or continue with --resume {self.folder}."
            )
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        d = config.data
        self.data: Dataset = (
            load(d.name, data_dir=d.dir, text_file=d.text_file, context=d.context, limit=d.limit)
            if like is None
            else like.data
        )
        self.targets = loss_targets(config, self.data.train_targets, self.data)
        self.model: nn.Module = build_model(config, self.data)
        self.loss_fn = build_loss(config)
        if like is not None:
            like.model.load_state_dict(self.model.state_dict())
            like.model.zero_grad()
            self.model = like.model
        self.optimizer = build_optimizer(config, self.model)
        o, t = config.optimizer, config.tracking
        batch = batch_at(1, config, self.data.train_inputs, self.targets)
        draw_second_moment(self.model, self.loss_fn, batch, self.optimizer)
        self.schedule = WarmupLR(
            self.optimizer, o.lr, o.warmup_steps, lr_init="critical" if o.critical_start else o.lr_init,
            probe=(self.model, self.loss_fn, batch), rise=0.1 if o.name == "sgd" else 0.01, power=o.power,
            decay=o.decay, total_steps=config.steps,
        )  # fmt: skip
        self.tracker: SharpnessTracker = SharpnessTracker(
            self.model, self.loss_fn, self.optimizer, tol=t.tol, every=t.every, max_matvecs=t.max_matvecs
        )
        if like is not None:
            self.tracker.hessian = like.tracker.hessian
        self.done = 0
        if resume:
            self._load()
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self.folder / "config.toml", to_toml(config).encode())
            self._save()
        self.metrics = MetricsFile(self.folder / "metrics.jsonl", keep=self.done)

    def steps(self) -> Iterator[Row]:
        """Train to the end; yield each step's row after it is written.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite; the last row says so.
        """
        try:
            while self.done < self.config.steps:
                yield self.step()
        finally:
            self.metrics.close()

    def step(self) -> Row:
        """Take the next step, write its row, and return it.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite; the row says so.
        """
        start = time.perf_counter()
        return self.update(*self.measure(), start)

    def measure(self) -> tuple[Record, Row]:
        """Compute the next step's gradients, and what its row holds of the parameters before the update.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite; a row says so.
        """
        step = self.done + 1
        batch = batch_at(step, self.config, self.data.train_inputs, self.targets)
        try:
            starts = (
                initial_preconditioned_sharpness(self.model, self.loss_fn, batch, self.optimizer) if step == 1 else {}
            )
            record = self.tracker.step(batch)
        except NonFiniteLossError:
            self.diverge()
            raise
        figures = {"dead_units": dead_units(self.model)} | starts
        if evaluated_at(step, self.config):
            figures |= self.evaluate()
        return record, figures

    def update(self, record: Record, figures: Row, start: float) -> Row:
        """Update the parameters with the gradients in ``p.grad``, write the step's row, and return it.

        Args:
            record, figures: of ``measure``.
            start: of the step, by ``time.perf_counter``.
        """
        self.optimizer.step()
        norms = optimizer_norms(self.optimizer)  # moments with this step's gradient in them; its norm is in the record
        figures = figures | {f"{name}_norm": value for name, value in norms.items() if name != "g"}
        row = self.count(record, figures, time.perf_counter() - start)
        if self.done % self.config.checkpoint_every == 0 or self.done == self.config.steps:
            self._save()
        return row

    def count(self, record: Record, figures: Row, seconds: float) -> Row:
        """Write the row of a step that was taken, here or in a stack, and advance the schedule.

        Args:
            record: of the step.
            figures: what the row holds besides.
            seconds: that the step took.
        """
        self.schedule.step()
        self.done = record.step
        row = vars(record) | {"measured": record.measured} | figures | {"seconds": seconds}
        self.metrics.write(row)
        return row

    def diverge(self) -> None:
        """Write the row of a step whose loss is not finite."""
        self.metrics.write({"step": self.done + 1, "loss": None, "diverged": True})

    @torch.no_grad()
    def evaluate(self) -> Row:
        """Accuracy on training and test data, and the test loss, at the present parameters."""
        result: Row = {}
        for split, inputs, targets in (
            ("train", self.data.train_inputs, self.data.train_targets),
            ("test", self.data.test_inputs, self.data.test_targets),
        ):
            parts = [self.model(x) for x in inputs.split(1000)]
            output = torch.cat(parts)
            result[f"{split}_accuracy"] = float((output.argmax(-1) == targets).float().mean())
            if split == "test":
                goal = loss_targets(self.config, targets, self.data)
                result["test_loss"] = float(self.loss_fn(output, goal))
        return result

    def _save(self) -> None:
        checkpoint.save(
            self.folder / "checkpoint.pt",
            {
                "step": self.done,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "tracker": self.tracker.state_dict(),
            },
        )

    def _load(self) -> None:
        rows = self.folder / "metrics.jsonl"
        if not (self.folder / "checkpoint.pt").exists() and not (rows.exists() and rows.stat().st_size):
            self._save()  # killed before the first checkpoint: nothing is done yet
            return
        state = checkpoint.load(self.folder / "checkpoint.pt")
        self.done = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.tracker.load_state_dict(state["tracker"])
