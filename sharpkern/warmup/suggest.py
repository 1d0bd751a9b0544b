"""Which warmup a model needs: measured at its initial state, and tried out on copies."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..dynamics import TRENDS, Regime
from ..optimizers.threshold import stability_threshold
from .critical import CriticalLR
from .suggest_text import say_choice, say_critical, say_largest, say_sharpness, say_start, say_warmup
from .trials import Probe, Trial, as_good, batches_of, holding


@dataclass(frozen=True)
class WarmupSuggestion:
    """A warmup, and what it rests on. ``print`` it.

    Attributes:
        sharpness: lambda_0, mean over batches; of ``P^-1 H`` for an adaptive optimizer.
        critical: the result of ``critical_learning_rate`` for the first batch.
        critical_lr: the smallest learning rate whose first step raises the loss, median over batches.
        regime: the natural trend of the sharpness below the threshold.
        lr_init, warmup_steps, lr_target: recommended, as arguments of ``WarmupLR``; linear.
        lr_target_max: the largest target that held, in runs this short: the loss stayed below twice the first, and fell
            at least 0.8 times as much as in the best run.
        trials: the runs behind it.
        evidence: why, a sentence for each of "sharpness", "critical_lr", "regime", "lr_target_max", "lr_target",
            "lr_init", "warmup_steps", "cost".
        forward_passes, gradients, matvecs: what it cost, ``matvecs`` in Hessian-vector products.
    """

    sharpness: float
    critical: CriticalLR
    critical_lr: float
    regime: Regime
    lr_init: float
    warmup_steps: int
    lr_target: float
    lr_target_max: float
    trials: list[Trial]
    evidence: dict[str, str]
    forward_passes: int
    gradients: int
    matvecs: int

    def __str__(self) -> str:
        return "\n".join(self.evidence.values())


def suggest_warmup(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    data: Any,
    optimizer: torch.optim.Optimizer,
    *,
    lr_target: float | None = None,
    probe_steps: int = 64,
    batches: int = 4,
    on_run: Callable[[str], None] | None = None,
) -> WarmupSuggestion:
    """Measure a model at its present state, and recommend where to start, how long to warm up and how far to go.

    1. Sharpness lambda_0 and critical learning rate eta_c, on a few batches.
    2. Natural trend: a warmup of a copy from 0 to the threshold ``kappa / lambda_0``, its sharpness tracked.
    3. Targets eta_c, 2 eta_c, 4 eta_c, ... with the longest warmup, each on a fresh copy, while they hold: the loss
       stays below twice the first and falls at least 0.8 times as much as in the best run. The last is
       ``lr_target_max``. Then eta_c / 2, eta_c / 4, ... while the loss falls more, at least until two hold.
    4. The target whose loss fell most runs four times as long, and its halves while they learn more: the best of these
       runs is the target.
    5. For the target, warmups of 1, 4, 16, ... steps: the shortest that holds, if it learns as much as the one of
       step 4 in a run as long, and that one otherwise.

    eta_init is eta_c: a warmup from zero spends steps below it, where no catapult can happen. Where training at eta_c
    itself does not hold (momentum gathers speed, some transformers), it is a tenth of the target. Model, optimizer and
    random states are left as they are.

    Args:
        model: in training mode, at the state to start from; must allow ``copy.deepcopy`` together with the optimizer.
        loss_fn: ``(output, targets) -> scalar``.
        data: a ``DataLoader`` or list of batches, gone through again and again; or one batch, a tuple or dict.
        optimizer: one that ``stability_threshold`` knows; learning rates are its first group's, the others keep their
            ratio to it.
        lr_target: the target that you want; None recommends the one that learnt most in the longest runs.
        probe_steps: longest warmup tried; a run has a quarter more steps, and those that decide on the target have five
            times as many. Longer training may fail later.
        batches: how many batches lambda_0 and eta_c are measured on.
        on_run: called after each run with a few words about it, to show progress.

    Returns:
        A ``WarmupSuggestion``.

    Raises:
        TypeError: the optimizer's threshold is not known.
        ValueError: an argument is out of range, no batch, data that can be read only once, a sharpness that is not
            positive, a first step that does not descend.
        NonFiniteLossError: the loss is NaN or infinite at the present state.
        RuntimeError: no target trained, down to eta_c / 4096.

    Cost: 7 to 20 runs of ``1.25 probe_steps`` training steps, two to nine, mostly three, of ``5 probe_steps``, a few
    dozen forward passes, 100 to 600 Hessian-vector products; counted in the result. Memory: one copy of model and
    optimizer.
    Source: Kalra and Barkeshli, Why warmup the learning rate? (2024), for eta_init = eta_c, a tenth of the target, and
    raising T_wrm until spikes are small; the trials and their limits (0.8, twice) are ours.
    """
    if probe_steps < 8 or batches < 1:
        raise ValueError(f"probe_steps must be at least 8 and batches at least 1, got {probe_steps} and {batches}.")
    if lr_target is not None and not 0 < lr_target < math.inf:
        raise ValueError(f"lr_target must be positive and finite, got {lr_target}.")
    # Before anything is measured: an unknown optimizer is refused at once.
    kappa = stability_threshold(optimizer)
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    # Short runs draw dropout masks and orders of batches; training afterwards must draw what it would have drawn.
    with torch.random.fork_rng(devices):
        probe = Probe(model, loss_fn, batches_of(data), optimizer, probe_steps)
        probe.on_run = on_run or probe.on_run
        sharpness, gi_adam = probe.sharpness(batches)
        if sharpness <= 0:
            raise ValueError(f"the sharpness is {sharpness:.4g}, not positive: train a few steps first.")
        # The threshold is a guess from below: ``critical_learning_rate`` says how far eta_c lies above it.
        first, critical = probe.critical(batches, kappa / sharpness)
        regime = probe.trend(kappa, kappa / sharpness)
        trials = probe.targets(critical)
        held = holding(trials)
        if not held:
            raise RuntimeError(
                f"no learning rate from {trials[-1].lr_target:.4g} to {critical:.4g} held for {probe_steps * 5 // 4} "
                f"steps: check loss and data, or give more probe_steps."
            )
        top = max(t.lr_target for t in held)
        finals = probe.finals(trials) if lr_target is None else []
        target = lr_target if lr_target is not None else _best(finals).lr_target
        # The first trial was at eta_c without a warmup. Below eta_c it need not have learnt well, only not have failed.
        jumps = trials[0] in held or (target < critical and bool(holding(trials[:1])))
        start = min(critical, target) if jumps else min(critical, target / 10)
        warmups = probe.warmups(target, start)
        # Judged together: "half the fall of the best run" is about all runs to all targets.
        all_held = holding([*trials, *warmups])
        good = [t for t in warmups if t in all_held]
        # They are in the order of their lengths, so the first is the shortest.
        chosen = good[0] if good else min(warmups, key=lambda t: t.peak)
        confirmed = [probe.longer(chosen)] if finals and _differs(chosen, decisive := _best(finals)) else []
        # What is short enough for 80 steps may be too short for a longer run.
        if confirmed and not as_good(confirmed[0], decisive):
            chosen, start = decisive, decisive.lr_init
    # A warmup of one step is at its target in that step: the start would never be used.
    lr_init = start if chosen.warmup_steps > 1 else target
    evidence = {
        "sharpness": say_sharpness(sharpness, gi_adam, kappa, probe, min(batches, probe.seen)),
        "critical_lr": say_critical(critical, first, sharpness, kappa),
        "regime": f"Natural trend: {TRENDS[regime.name]} ({regime.name}): {regime.evidence}",
        "lr_target_max": say_largest(top, trials),
        "lr_target": f"Recommended target: {target:.4g}"
        + (say_choice(finals) if finals else ", as asked")
        + (f"; it is above the largest sensible one, {top:.4g}." if target > top else "."),
        "lr_init": say_start(lr_init, target, critical),
        "warmup_steps": say_warmup(chosen, warmups, bool(good), confirmed),
        "cost": f"Cost: {probe.forward_passes} forward passes, {probe.gradients} gradients, {probe.matvecs} "
        "Hessian-vector products.",
    }  # fmt: skip
    return WarmupSuggestion(
        sharpness, first, critical, regime, lr_init, chosen.warmup_steps, target, top,
        [*trials, *finals, *warmups, *confirmed], evidence, probe.forward_passes, probe.gradients, probe.matvecs,
    )  # fmt: skip


def _differs(chosen: Trial, decisive: Trial) -> bool:
    """Whether a run has another schedule than the one that decided on the target; of one step only the end counts."""
    short = chosen.warmup_steps == decisive.warmup_steps == 1
    return not short and (chosen.lr_init, chosen.warmup_steps) != (decisive.lr_init, decisive.warmup_steps)


def _best(finals: list[Trial]) -> Trial:
    """Return the run that learnt most.

    Raises:
        RuntimeError: all diverged.
    """
    best = max(finals, key=lambda t: t.fall)
    if not best.fall > 0:
        raise RuntimeError(
            f"no learning rate from {finals[-1].lr_target:.4g} to {finals[0].lr_target:.4g} trained for "
            f"{best.steps} steps: check loss and data."
        )
    return best
