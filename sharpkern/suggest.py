"""Which warmup a model needs: measured at its initial state, and tried out on copies."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .critical import CriticalLR, critical_learning_rate
from .dynamics import Regime, classify_regime
from .eigen import lanczos
from .flat import trainable
from .measure import gradients_of
from .operators import HessianOperator, NonFiniteLossError, Operator, PreconditionedOperator
from .optim import GIAdam
from .preconditioning import is_adaptive, preconditioner
from .rop import LossModule
from .tracker import Record, SharpnessTracker
from .warmup import WarmupLR, set_rates, stability_threshold

_NAMES = {"C1": "progressive sharpening", "C2": "sharpness reduction", "C3": "nearly constant sharpness"}
_DOUBLINGS = 12
_SPIKE = 2.0  # a run holds only if its loss stays below so many times the first
_HOPELESS = 100.0  # a loss so many times the first ends a run


@dataclass(frozen=True)
class Trial:
    """A short training run of a copy.

    Attributes:
        lr_target, lr_init, warmup_steps: its schedule.
        peak: largest loss over the first loss, both means over a few steps with minibatches; infinite if it diverged.
        fall: first loss less last loss, over the first: 0 is nothing learnt, 1 everything; negative infinity if it
            diverged, or was stopped at 100 times the first loss.
    """

    lr_target: float
    lr_init: float
    warmup_steps: int
    peak: float
    fall: float


@dataclass(frozen=True)
class WarmupSuggestion:
    """A warmup, and what it rests on. ``print`` it.

    Attributes:
        sharpness: lambda_0, mean over batches; of ``P^-1 H`` for an adaptive optimizer.
        critical: eta_c of the first batch, whole; ``critical_lr`` is the median over batches.
        critical_lr: the smallest learning rate whose first step raises the loss.
        regime: the natural trend of the sharpness below the threshold.
        lr_init, warmup_steps, lr_target: recommended, as arguments of ``WarmupLR``; linear.
        lr_target_max: the largest target that held, in runs this short: the loss stayed below twice the first, and fell
            at least half as much as in the best run.
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
) -> WarmupSuggestion:
    """Measure a model at its present state, and recommend where to start, how long to warm up and how far to go.

    1. Sharpness lambda_0 and critical learning rate eta_c, on a few batches.
    2. Natural trend: a warmup of a copy from 0 to the threshold ``kappa / lambda_0``, its sharpness tracked.
    3. Targets eta_c, 2 eta_c, 4 eta_c, ... with the longest warmup, each on a fresh copy, while they hold: the loss
       stays below twice the first and falls at least half as much as in the best run. The last is ``lr_target_max``.
       If not even eta_c holds, eta_c / 2, eta_c / 4, ... until two hold.
    4. For the target, warmups of 1, 4, 16, ... steps; the shortest that holds.

    eta_init is eta_c: a warmup from zero spends steps below it, where no catapult can happen. Where training at eta_c
    itself does not hold (momentum gathers speed, some transformers), it is a tenth of the target. Model, optimizer and
    random states are left as they are.

    Args:
        model: in training mode, at the state to start from; must allow ``copy.deepcopy`` together with the optimizer.
        loss_fn: ``(output, targets) -> scalar``.
        data: a ``DataLoader`` or list of batches, gone through again and again; or one batch, a tuple or dict.
        optimizer: SGD, Adam, AdamW, GIAdam or RMSprop; learning rates are its first group's, the others keep their
            ratio to it.
        lr_target: the target that you want; None recommends the one that learnt most.
        probe_steps: longest warmup tried; a run has a quarter more steps. Longer training may fail later.
        batches: how many batches lambda_0 and eta_c are measured on.

    Returns:
        A ``WarmupSuggestion``.

    Raises:
        TypeError: the optimizer's threshold is not known.
        ValueError: an argument is out of range, no batch, data that can be read only once, a sharpness that is not
            positive, a first step that does not descend.
        NonFiniteLossError: the loss is NaN or infinite at the present state.
        RuntimeError: no target trained, down to eta_c / 64.

    Cost: 6 to 16 runs of ``1.25 probe_steps`` training steps, a few dozen forward passes, 100 to 600 Hessian-vector
    products; counted in the result. Memory: one copy of model and optimizer.
    Source: Kalra and Barkeshli, Why warmup the learning rate? (2024), for eta_init = eta_c, a tenth of the target, and
    raising T_wrm until spikes are small; the trials and their limits (half, twice) are ours.
    """
    if probe_steps < 8 or batches < 1:
        raise ValueError(f"probe_steps must be at least 8 and batches at least 1, got {probe_steps} and {batches}.")
    if lr_target is not None and not 0 < lr_target < math.inf:
        raise ValueError(f"lr_target must be positive and finite, got {lr_target}.")
    kappa = stability_threshold(optimizer)
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        probe = _Probe(model, loss_fn, _batches_of(data), optimizer, probe_steps)
        sharpness, gi_adam = probe.sharpness(batches)
        if sharpness <= 0:
            raise ValueError(f"the sharpness is {sharpness:.4g}, not positive: train a few steps first.")
        first, critical = probe.critical(batches, kappa / sharpness)
        regime = probe.trend(kappa, kappa / sharpness)
        trials = probe.targets(critical)
        held = _holding(trials)
        if not held:
            raise RuntimeError(
                f"no learning rate from {trials[-1].lr_target:.4g} to {critical:.4g} held for {probe_steps * 5 // 4} "
                f"steps: check loss and data, or give more probe_steps."
            )
        top = max(t.lr_target for t in held)
        target = max(held, key=lambda t: t.fall).lr_target if lr_target is None else lr_target
        start = min(critical, target) if trials[0] in held else min(critical, target / 10)
        warmups = probe.warmups(target, start)
    all_held = _holding([*trials, *warmups])
    good = [t for t in warmups if t in all_held]
    chosen = good[0] if good else min(warmups, key=lambda t: t.peak)
    lr_init = start if chosen.warmup_steps > 1 else target
    evidence = {
        "sharpness": _say_sharpness(sharpness, gi_adam, kappa, probe, min(batches, probe.seen)),
        "critical_lr": _say_critical(critical, first, sharpness, kappa),
        "regime": f"Natural trend: {_NAMES[regime.name]} ({regime.name}): {regime.evidence}",
        "lr_target_max": _say_largest(top, trials),
        "lr_target": f"Recommended target: {target:.4g}"
        + (", as asked" if lr_target is not None else ", which learnt most")
        + (f"; it is above the largest sensible one, {top:.4g}." if target > top else "."),
        "lr_init": _say_start(lr_init, target, critical),
        "warmup_steps": _say_warmup(chosen, warmups, bool(good)),
        "cost": f"Cost: {probe.forward_passes} forward passes, {probe.gradients} gradients, {probe.matvecs} "
        "Hessian-vector products.",
    }  # fmt: skip
    return WarmupSuggestion(
        sharpness, first, critical, regime, lr_init, chosen.warmup_steps, target, top, [*trials, *warmups], evidence,
        probe.forward_passes, probe.gradients, probe.matvecs,
    )  # fmt: skip


@dataclass
class _Probe:
    """The measurements, and what they cost."""

    model: nn.Module
    loss_fn: Callable[..., Tensor]
    data: Iterable[Any]
    optimizer: torch.optim.Optimizer
    steps: int
    forward_passes: int = 0
    gradients: int = 0
    matvecs: int = 0
    seen: int = 0
    ratios: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        if rates[0] == 0 and any(rates):
            raise ValueError(f"the first group's lr is 0 and another's is {max(rates)}: their ratio is unknown.")
        self.ratios = [1.0 if lr == rates[0] else lr / rates[0] for lr in rates]
        self.width = 5 if len(list(itertools.islice(self.data, 2))) > 1 else 1  # steps averaged against noise

    def sharpness(self, batches: int) -> tuple[float, float | None]:
        """Return the mean sharpness over batches, and GI-Adam's of the first if the optimizer is a fresh Adam."""
        found: list[float] = []
        gi_adam, hessian = None, None
        generator = torch.Generator().manual_seed(0)
        for batch in itertools.islice(self.data, batches):
            if hessian is None:
                hessian = HessianOperator(self.model, self.loss_fn, batch)
            else:
                hessian.refresh(batch)
            self.gradients += 1
            operators: list[Operator] = [hessian]
            if is_adaptive(self.optimizer):
                gradients = gradients_of(hessian)
                operators = [PreconditionedOperator(hessian, preconditioner(self.optimizer, gradients=gradients))]
                if type(self.optimizer) is torch.optim.Adam and not self.optimizer.state and not found:
                    group = self.optimizer.param_groups[0]
                    twin = GIAdam(list(gradients), betas=group["betas"], eps=group["eps"])
                    operators.append(PreconditionedOperator(hessian, preconditioner(twin, gradients=gradients)))
            results = [lanczos(op, tol=1e-3, max_matvecs=100, generator=generator) for op in operators]
            self.matvecs += sum(r.matvecs for r in results)
            found.append(float(results[0].eigenvalues[0]))
            gi_adam = float(results[1].eigenvalues[0]) if len(results) > 1 else gi_adam
        self.seen = len(found)
        return statistics.fmean(found), gi_adam

    def critical(self, batches: int, start: float) -> tuple[CriticalLR, float]:
        """Return eta_c of the first batch, and the median over batches."""
        rise = 0.01 if is_adaptive(self.optimizer) else 0.1
        found: list[CriticalLR] = []
        for batch in itertools.islice(self.data, batches):
            found.append(
                critical_learning_rate(
                    self.model, self.loss_fn, batch, self.optimizer, start=found[-1] if found else start, rise=rise
                )
            )
            self.forward_passes += found[-1].forward_passes
            self.gradients += 1
        median = statistics.median(c.value for c in found)
        if not 0 < median < math.inf:
            raise ValueError(f"the critical learning rate is {median}: the optimizer's first step does not descend.")
        return found[0], median

    def trend(self, kappa: float, top: float) -> Regime:
        """Warm a copy up from 0 to the threshold, tracking its sharpness."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        schedule = WarmupLR(optimizer, [top * ratio for ratio in self.ratios], self.steps)
        tracker = SharpnessTracker(model, self.loss_fn, optimizer, tol=0.03)
        records: list[Record] = []
        for batch in itertools.islice(_endless(self.data), self.steps):
            try:
                records.append(tracker.step(batch))
            except NonFiniteLossError:
                break
            optimizer.step()
            schedule.step()
        self.gradients += len(records)
        self.matvecs += sum(r.matvecs for r in records)
        adaptive = is_adaptive(optimizer)
        curvature = [r.preconditioned_sharpness if adaptive else r.sharpness for r in records]
        return classify_regime(curvature, [r.lr for r in records], kappa, smooth=self.width)

    def targets(self, critical: float) -> list[Trial]:
        """Try targets around eta_c, the first at eta_c without a warmup: doubled while they hold, else halved."""
        trials = [self.run(critical, critical, 1)]
        recovers = bool(_holding(trials))
        if not recovers:
            trials.append(self.run(critical, critical / 10, self.steps))
        if trials[-1] in _holding(trials):
            while trials[-1] in _holding(trials) and trials[-1].lr_target < 2**_DOUBLINGS * critical:
                target = 2 * trials[-1].lr_target
                trials.append(self.run(target, critical if recovers else target / 10, self.steps))
            return trials
        while len(_holding(trials)) < 2 and trials[-1].lr_target > critical / 64:
            target = trials[-1].lr_target / 2
            trials.append(self.run(target, target / 10, self.steps))
        return trials

    def warmups(self, target: float, start: float) -> list[Trial]:
        """Try ever longer warmups to a target."""
        if start >= target:
            return [self.run(target, target, 1)]
        lengths = [4**k for k in range(20) if 4**k < self.steps]
        return [self.run(target, start, length) for length in (*lengths, self.steps)]

    def run(self, target: float, start: float, warmup: int) -> Trial:
        """Train a copy with a warmup of some steps to a target, from ``start``."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        module, params = LossModule(model, self.loss_fn), list(trainable(model).values())
        losses: list[float] = []
        for t, batch in enumerate(itertools.islice(_endless(self.data), self.steps * 5 // 4), start=1):
            lr = start + (target - start) * min(1.0, t / warmup)
            set_rates(optimizer, [lr * ratio for ratio in self.ratios])
            loss = module(batch)[0]
            losses.append(float(loss.detach()))
            self.gradients += 1
            if not losses[-1] <= losses[0] + (_HOPELESS - 1) * abs(losses[0]):
                peak = losses[-1] / losses[0] if math.isfinite(losses[-1]) else math.inf
                return Trial(target, start, warmup, peak, -math.inf)
            for p, g in zip(params, torch.autograd.grad(loss, params, allow_unused=True), strict=True):
                p.grad = g
            optimizer.step()
        means = [statistics.fmean(losses[i : i + self.width]) for i in range(len(losses) - self.width + 1)]
        last = statistics.fmean(losses[-max(self.width, self.steps // 8) :])
        return Trial(target, start, warmup, max(means) / means[0], 1 - last / means[0])


def _batches_of(data: Any) -> Iterable[Any]:
    """Turn data into something to go through again and again."""
    if isinstance(data, tuple | Mapping):
        return [data]
    if isinstance(data, Iterator):
        raise ValueError("data can be read only once: give a list of batches, a DataLoader, or one batch as a tuple.")
    if not isinstance(data, Iterable) or (not isinstance(data, DataLoader) and not any(True for _ in data)):
        raise ValueError(f"data must be a DataLoader, a list of batches, or one batch, got {type(data).__name__}.")
    return data


def _endless(data: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from data


def _holding(trials: list[Trial]) -> list[Trial]:
    """Return the runs without a spike whose loss fell at least half as much as in the best of them."""
    calm = [t for t in trials if t.peak <= _SPIKE and t.fall > 0]
    return [t for t in calm if t.fall >= 0.5 * max(c.fall for c in calm)]


def _say_sharpness(value: float, gi_adam: float | None, kappa: float, probe: _Probe, batches: int) -> str:
    name = "Preconditioned sharpness" if is_adaptive(probe.optimizer) else "Sharpness"
    text = (
        f"{name} at the start: {value:.4g}, the mean of {batches} batch(es), so the threshold {kappa:.3g} / sharpness "
        f"is a learning rate of {kappa / value:.4g}."
    )
    return (
        text if gi_adam is None else f"{text} GI-Adam would start at {gi_adam:.4g}, {value / gi_adam:.1f} times lower."
    )


def _say_critical(critical: float, first: CriticalLR, sharpness: float, kappa: float) -> str:
    how = "no learning rate tried raised the loss" if first.capped else f"a step there raises it by {first.rise:.1%}"
    return (
        f"Critical learning rate: {critical:.4g}, {critical * sharpness / kappa:.3g} times the threshold; on the first "
        f"batch the loss {first.loss:.4g} falls up to {first.lower:.4g}, and {how}."
    )


def _say_largest(top: float, trials: list[Trial]) -> str:
    tried = ", ".join(f"{t.lr_target:.3g}: {_told(t)}" for t in trials)
    return f"Largest sensible target: {top:.4g}. Short runs by target, largest loss over first, and fall: {tried}."


def _say_start(lr_init: float, target: float, critical: float) -> str:
    if lr_init == target:
        why = "the target: no warmup is needed"
    elif lr_init == critical:
        why = "the critical one"
    else:
        why = "a tenth of the target: training at the critical one did not hold"
    return f"Recommended initial learning rate: {lr_init:.4g} ({why})."


def _say_warmup(chosen: Trial, warmups: list[Trial], good: bool) -> str:
    tried = ", ".join(f"{t.warmup_steps}: {_told(t)}" for t in warmups)
    why = "the shortest that held" if good else "but none held: choose a smaller target or a longer probe"
    return f"Recommended warmup: {chosen.warmup_steps} steps, {why}. Runs by length, likewise: {tried}."


def _told(t: Trial) -> str:
    return "diverged" if math.isinf(t.fall) else f"{t.peak:.2f} and {t.fall:.0%}"
