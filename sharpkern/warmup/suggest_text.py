"""The sentences of a warmup suggestion."""

from __future__ import annotations

import math

from ..optimizers.preconditioner import is_adaptive
from .critical import CriticalLR
from .trials import Probe, Trial


def say_sharpness(value: float, gi_adam: float | None, kappa: float, probe: Probe, batches: int) -> str:
    """Say how sharp the start is, and what learning rate that allows."""
    # The number is one of P^-1 H then, and no sharpness in the usual sense.
    name = "Preconditioned sharpness" if is_adaptive(probe.optimizer) else "Sharpness"
    text = (
        f"{name} at the start: {value:.4g}, the mean of {batches} batch(es), so the threshold {kappa:.3g} / sharpness "
        f"is a learning rate of {kappa / value:.4g}."
    )
    return (
        text if gi_adam is None else f"{text} GI-Adam would start at {gi_adam:.4g}, {value / gi_adam:.1f} times lower."
    )


def say_critical(critical: float, first: CriticalLR, sharpness: float, kappa: float) -> str:
    """Say how far the first step may go."""
    how = "no learning rate tried raised the loss" if first.capped else f"a step there raises it by {first.rise:.1%}"
    return (
        f"Critical learning rate: {critical:.4g}, {critical * sharpness / kappa:.3g} times the threshold; on the first "
        f"batch the loss {first.loss:.4g} falls up to {first.lower:.4g}, and {how}."
    )


def say_largest(top: float, trials: list[Trial]) -> str:
    """Say which targets were tried."""
    tried = ", ".join(f"{t.lr_target:.3g}: {_told(t)}" for t in sorted(trials, key=lambda t: t.lr_target))
    return f"Largest sensible target: {top:.4g}. Short runs by target, largest loss over first, and fall: {tried}."


def say_choice(finals: list[Trial]) -> str:
    """Say why a target is recommended: of the runs that decided."""
    tried = ", ".join(f"{t.lr_target:.3g}: {_told(t)}" for t in finals)
    return f", which learnt most in {finals[0].steps} steps ({tried})"


def say_start(lr_init: float, target: float, critical: float) -> str:
    """Say where to start, and why there."""
    # Compared exactly: ``suggest_warmup`` has chosen one of these very numbers.
    if lr_init == target:
        why = "the target: no warmup is needed"
    elif lr_init == critical:
        why = "the critical one"
    else:
        why = "a tenth of the target: training at the critical one did not hold"
    return f"Recommended initial learning rate: {lr_init:.4g} ({why})."


def say_warmup(chosen: Trial, warmups: list[Trial], good: bool, confirmed: list[Trial]) -> str:
    """Say how long to warm up, and what was tried."""
    tried = ", ".join(f"{t.warmup_steps}: {_told(t)}" for t in warmups)
    why = "the shortest that held" if good else "but none held: choose a smaller target or a longer probe"
    if confirmed and chosen.warmup_steps != confirmed[0].warmup_steps:
        c = confirmed[0]
        why = f"of the run that decided: {c.warmup_steps} steps held, but learnt less in {c.steps} ({_told(c)})"
    return f"Recommended warmup: {chosen.warmup_steps} steps, {why}. Runs by length, likewise: {tried}."


def _told(t: Trial) -> str:
    # Stopped at 100 times the first loss or not finite: both have a fall of minus infinity.
    return "diverged" if math.isinf(t.fall) else f"{t.peak:.2f} and {t.fall:.0%}"
