"""How many steps of a warmup an initial learning rate saves."""

from __future__ import annotations

import math


def steps_to_target(warmup_steps: int, lr_init: float, lr_target: float, *, power: float = 1.0) -> int:
    """Return T_reach: the step at which a warmup from lr_init with the slope of one from zero is at its target.

        T_reach = ceil(T (1 - lr_init / lr_target)^(1 / power)), at least 1

    Args:
        warmup_steps: T, of the warmup from zero.
        lr_init: not negative; at or above the target no warmup is left, which is 1.
        lr_target: positive.
        power: exponent of the warmup.

    Source: Kalra and Barkeshli, Why warmup the learning rate? (2024), section 6.

    >>> steps_to_target(100, 0.25, 1.0)
    75
    """
    # Where lr_init + lr_target (t / T)^power has grown to lr_target.
    part = max(0.0, 1 - lr_init / lr_target) ** (1 / power)
    # Rounding may put a whole number a little above itself, and ceil() would then add a step.
    return max(1, math.ceil(warmup_steps * part - 1e-9 * warmup_steps))


def steps_saved(warmup_steps: int, lr_critical: float, lr_target: float, *, forward_passes: int) -> float:
    """Return T_save: training steps that starting a linear warmup at the critical learning rate saves.

        T_save = T min(1, lr_critical / lr_target) - forward_passes / 2

    A training step is counted as two forward passes. Negative where the search costs more than it saves.

    Args:
        warmup_steps: T, of the warmup from zero.
        lr_critical: ``CriticalLR.value``.
        lr_target: positive.
        forward_passes: ``CriticalLR.forward_passes``.

    Source: Kalra and Barkeshli, Why warmup the learning rate? (2024), section 6.

    >>> steps_saved(100, 0.25, 1.0, forward_passes=10)
    20.0
    """
    return warmup_steps * min(1.0, lr_critical / lr_target) - forward_passes / 2
