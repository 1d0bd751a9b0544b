"""Learning-rate warmup, and the curvature that a learning rate can bear."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def stability_threshold(optimizer: Optimizer, *, first_step: bool = False) -> float:
    """Return kappa: on a quadratic the optimizer is stable while ``lr * curvature < kappa``.

    The curvature is an eigenvalue of H for SGD, of ``P^-1 H`` for Adam and RMSprop (P frozen; P as
    ``preconditioner`` returns it). g is weight decay, b momentum or beta1, d dampening:

    =====================================  ===========================================
    SGD                                    2
    SGD, momentum                          (2 + 2b) / (1 - d)
    SGD, Nesterov momentum                 2 (1 + b) / (1 + 2b)
    RMSprop                                2; with momentum 2 + 2b
    Adam, AdamW, GIAdam                    (2 + 2b) / (1 - b)
    coupled weight decay                   minus lr g, for SGD
    decoupled weight decay (AdamW)         minus lr g (1 + b) / (1 - b)
    =====================================  ===========================================

    Args:
        optimizer: its first group is read.
        first_step: the bound of the very first step, whose moments start at zero: 2 for SGD with any momentum (the
            first step is plain gradient descent), ``2 / (1 - b)`` for Adam with P_1.

    Raises:
        TypeError: an optimizer whose threshold is unknown.

    Source: Cohen et al. (2021, 2022); Kalra and Barkeshli (2024), appendix B; companion matrices.

    >>> import torch
    >>> stability_threshold(torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9))
    3.8
    """
    group = optimizer.param_groups[0]
    lr, decay = float(group["lr"]), float(group.get("weight_decay", 0.0))
    names = {cls.__name__ for cls in type(optimizer).__mro__}
    if "SGD" in names:
        b, d = float(group["momentum"]), float(group["dampening"])
        if first_step or not b:
            kappa = 2 * (1 / (1 + b) if group["nesterov"] else 1.0)
        elif group["nesterov"]:
            kappa = 2 * (1 + b) / (1 + 2 * b)
        else:
            kappa = (2 + 2 * b) / (1 - d)
        return kappa - lr * decay
    if "RMSprop" in names:
        b = 0.0 if first_step else float(group["momentum"])
        return 2 + 2 * b
    if names & {"Adam", "AdamW", "GIAdam"}:
        b = float(group["betas"][0])
        decoupled = group.get("decoupled_weight_decay", "AdamW" in names)
        if first_step:
            return (2 - (lr * decay if decoupled else 0.0)) / (1 - b)
        return (2 + 2 * b - (lr * decay * (1 + b) if decoupled else 0.0)) / (1 - b)
    raise TypeError(
        f"no stability threshold is known for {type(optimizer).__name__}; "
        "supported are SGD, RMSprop, Adam, AdamW and GIAdam."
    )


class WarmupLR(LRScheduler):
    """Warm the learning rate up to a target, then keep it or let it decay along a cosine.

        lr_t = min(target, init + (target - init) (t / warmup_steps)^power)                     t = 1, 2, ...
        cosine, after warmup:  lr_t = lr_min + (target - lr_min) (1 + cos(pi s)) / 2

    with s running from 0 at the end of warmup to 1 at ``total_steps``. The first ``optimizer.step()`` uses t = 1, so
    ``warmup_steps=1`` is no warmup. Call ``step()`` after each ``optimizer.step()``. All parameter groups get the same
    learning rate.

    Args:
        optimizer: whose learning rate is set.
        lr_target: the learning rate after warmup.
        warmup_steps: at least 1.
        lr_init: where warmup starts, reached before the first step.
        power: exponent; 1 is linear.
        decay: "constant" or "cosine".
        total_steps: with cosine, the step at which lr_min is reached.
        lr_min: with cosine; default lr_target / 10.

    Raises:
        ValueError: an argument out of range.

    Source: Kalra and Barkeshli, Why Warmup the Learning Rate? (2024), section on schedules.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_target: float,
        warmup_steps: int,
        *,
        lr_init: float = 0.0,
        power: float = 1.0,
        decay: str = "constant",
        total_steps: int | None = None,
        lr_min: float | None = None,
    ) -> None:
        if warmup_steps < 1 or power <= 0:
            raise ValueError(f"warmup_steps must be at least 1 and power positive, got {warmup_steps} and {power}.")
        if not 0 <= lr_init <= lr_target:
            raise ValueError(f"0 <= lr_init <= lr_target is needed, got lr_init={lr_init}, lr_target={lr_target}.")
        if decay not in ("constant", "cosine"):
            raise ValueError(f"decay must be 'constant' or 'cosine', got {decay!r}.")
        if decay == "cosine" and (total_steps is None or total_steps <= warmup_steps):
            raise ValueError(f"cosine decay needs total_steps > warmup_steps = {warmup_steps}, got {total_steps}.")
        self.lr_target, self.warmup_steps, self.lr_init, self.power = lr_target, warmup_steps, lr_init, power
        self.decay, self.total_steps = decay, total_steps
        self.lr_min = lr_target / 10 if lr_min is None else lr_min
        super().__init__(optimizer)

    def lr_at(self, t: int) -> float:
        """Return the learning rate of step t = 1, 2, ..."""
        if t <= self.warmup_steps:
            rise = (self.lr_target - self.lr_init) * (t / self.warmup_steps) ** self.power
            return min(self.lr_target, self.lr_init + rise)
        if self.decay == "constant" or self.total_steps is None:
            return self.lr_target
        s = min(1.0, (t - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.lr_min + (self.lr_target - self.lr_min) * (1 + math.cos(math.pi * s)) / 2

    def get_lr(self) -> list[Any]:
        """Return the learning rate of the coming step, for every group."""
        return [self.lr_at(self.last_epoch + 1)] * len(self.optimizer.param_groups)
