"""Learning-rate schedules that warm up: the rate grows to its target, then stays or decays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LRScheduler

from .critical import critical_learning_rate
from .formulas import steps_to_target


class WarmupLR(LRScheduler):
    """Learning rate that grows from ``lr_init`` to ``lr_target``, then stays or decays along a cosine.

        t <= T:            lr_t = lr_init + (lr_target - lr_init) (t / T)^power,        T = warmup_steps
          keep_slope:      lr_t = min(lr_target, lr_init + lr_target (t / T)^power)
        t > R, constant:   lr_t = lr_target
        t > R, cosine:     lr_t = lr_min + (lr_target - lr_min) (1 + cos(pi s)) / 2
                           s = min(1, (t - R) / (total_steps - R))

    R is the step that reaches the target: T, or sooner with ``keep_slope`` (``steps_to_target``).
    ``lr_init="critical"`` starts at the critical learning rate of the model's present state, found by forward passes
    (``critical_learning_rate``), with the slope kept: the warmup from zero without the part that no catapult needs.

    The first ``optimizer.step()`` uses t = 1; call ``step()`` after each. ``warmup_steps=1`` means no warmup.
    Beyond ``total_steps`` a cosine stays at ``lr_min``. The optimizer's own lr is ignored.
    ``load_state_dict`` also sets the optimizer's lr, so scheduler and optimizer may be restored in either
    order.

    Args:
        optimizer: any torch optimizer.
        lr_target: a number, or one for each parameter group.
        warmup_steps: T, at least 1.
        lr_init: a number, or one for each group; "critical" measures it now, at most ``lr_target``. The groups then
            have the ratios of ``lr_target``.
        probe: ``(model, loss_fn, batch)`` for "critical". Not kept, and not part of the state: a run to be resumed
            may give any lr_init, as ``load_state_dict`` restores it.
        rise: relative rise of the loss allowed at the critical learning rate; 0.01 for Adam, to avoid a large
            catapult.
        keep_slope: grow as fast as from zero, and reach the target sooner; None: for "critical" only.
        power: exponent of the warmup; 1 is linear.
        decay: "constant" or "cosine".
        total_steps: where the cosine ends; more than warmup_steps. Not used by "constant".
        lr_min: end value of the cosine, a number or one for each group; default ``lr_target / 10``.
        last_epoch: as for every torch scheduler.

    Raises:
        ValueError: an argument is out of range.

    Attributes:
        lr_init: of each group, measured or given.
        forward_passes: spent on "critical".

    Source: Kalra and Barkeshli, Why warmup the learning rate? (2024), polynomial warmup; section 6 for the critical
    initial learning rate.

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    >>> schedule = WarmupLR(optimizer, 1.0, 4)
    >>> schedule.get_last_lr()
    [0.25]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        lr_target: float | Sequence[float],
        warmup_steps: int,
        *,
        lr_init: float | Sequence[float] | Literal["critical"] = 0.0,
        probe: tuple[Any, Any, Any] | None = None,
        rise: float = 0.1,
        keep_slope: bool | None = None,
        power: float = 1.0,
        decay: Literal["constant", "cosine"] = "constant",
        total_steps: int | None = None,
        lr_min: float | Sequence[float] | None = None,
        last_epoch: int = -1,
    ) -> None:
        groups = len(optimizer.param_groups)
        self.lr_target = _per_group("lr_target", lr_target, groups)
        critical = isinstance(lr_init, str)
        if critical and (lr_init != "critical" or probe is None):
            raise ValueError(
                f"lr_init must be numbers, or 'critical' with probe=(model, loss_fn, batch), got {lr_init!r} and "
                f"probe={'None' if probe is None else 'given'}."
            )
        self.lr_init = [0.0] * groups if critical else _per_group("lr_init", lr_init, groups)  # type: ignore[arg-type]
        self.lr_min = [lr / 10 for lr in self.lr_target] if lr_min is None else _per_group("lr_min", lr_min, groups)
        for target, start, end in zip(self.lr_target, self.lr_init, self.lr_min, strict=True):
            if start > target:
                raise ValueError(f"lr_init must be at most lr_target = {target}, got {start}.")
            if end > target:
                raise ValueError(f"lr_min must be at most lr_target = {target}, got {end}.")
        if warmup_steps < 1:
            raise ValueError(f"warmup_steps must be at least 1 (1 is no warmup), got {warmup_steps}.")
        if not 0 < power < math.inf:
            raise ValueError(f"power must be positive, got {power}.")
        if decay not in ("constant", "cosine"):
            raise ValueError(f"decay must be 'constant' or 'cosine', got {decay!r}.")
        if decay == "cosine" and (total_steps is None or total_steps <= warmup_steps):
            raise ValueError(
                f"decay='cosine' needs total_steps above warmup_steps = {warmup_steps}, got {total_steps}."
            )
        self.warmup_steps, self.power, self.decay, self.total_steps = warmup_steps, power, decay, total_steps
        self.keep_slope = critical if keep_slope is None else keep_slope
        self.forward_passes = 0
        if critical:
            set_rates(optimizer, self.lr_target)  # the critical learning rate is one number for groups in this ratio
            # Not made attributes: a scheduler's state_dict is all its attributes, and a checkpoint would hold model and
            # batch.
            model, loss_fn, batch = probe  # type: ignore[misc]
            # Capped at the target, which is also where a search stops that finds no rise.
            found = critical_learning_rate(model, loss_fn, batch, optimizer, cap=self.lr_target[0], rise=rise)
            self.lr_init = [found.value * target / self.lr_target[0] for target in self.lr_target]
            self.forward_passes = found.forward_passes
        # Last, because torch's constructor asks for the first rate, which needs all of the above.
        super().__init__(optimizer, last_epoch)

    @property
    def reached(self) -> int:
        """The first step t at which every group has its target."""
        if not self.keep_slope:
            return self.warmup_steps
        pairs = zip(self.lr_init, self.lr_target, strict=True)
        return max(steps_to_target(self.warmup_steps, start, target, power=self.power) for start, target in pairs)

    def lr_at(self, t: int) -> list[float]:
        """Return the lr of optimizer step t = 1, 2, ..., for each parameter group."""
        reached = self.reached
        if t < reached:
            # With the slope kept, growth is that of a warmup from zero, whatever the start; else the start shortens the
            # climb.
            grown = (t / self.warmup_steps) ** self.power
            pairs = zip(self.lr_target, self.lr_init, strict=True)
            gaps = [(target, start, target if self.keep_slope else target - start) for target, start in pairs]
            return [min(target, start + gap * grown) for target, start, gap in gaps]
        if t == reached or self.decay == "constant" or self.total_steps is None:
            # The target itself, not what the formula rounds to.
            return list(self.lr_target)
        s = min(1.0, (t - reached) / (self.total_steps - reached))
        left = (1 + math.cos(math.pi * s)) / 2
        return [end + (target - end) * left for target, end in zip(self.lr_target, self.lr_min, strict=True)]

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return the lr of the next optimizer step, for each parameter group."""
        # torch counts steps that are done, t the one that comes.
        return list(self.lr_at(self.last_epoch + 1))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a schedule, and the optimizer's lr with it."""
        super().load_state_dict(state_dict)
        # torch leaves the rate to the optimizer's state. Set here too, the order of the two restores does not matter.
        set_rates(self.optimizer, self.lr_at(self.last_epoch + 1))


def set_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    """Set the learning rate of each group; a tensor is filled in place.

    Args:
        optimizer: any.
        rates: one for each parameter group.

    Raises:
        ValueError: not one for each group.
    """
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            # A compiled or captured step reads this very tensor; a new one would never reach it.
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def _per_group(name: str, value: float | Sequence[float], groups: int) -> list[float]:
    """Spread a number over the groups, and check."""
    values = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)] * groups
    if len(values) != groups:
        raise ValueError(f"{name} must be a number or {groups}, one for each parameter group, got {len(values)}.")
    # The smallest float above 0 makes one comparison serve for "positive" and for "not negative".
    least = 0.0 if name != "lr_target" else math.nextafter(0.0, 1.0)
    if not all(least <= v < math.inf for v in values):
        kind = "positive" if name == "lr_target" else "not negative"
        raise ValueError(f"{name} must be finite and {kind}, got {value}.")
    return values
