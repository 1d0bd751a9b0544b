"""The measurements and short runs behind a warmup suggestion, and what they cost."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..curvature.losses import LossModule, NonFiniteLossError
from ..curvature.operators import HessianOperator
from ..curvature.parameters import gradients_of, trainable
from ..curvature.preconditioned import PreconditionedOperator
from ..dynamics import Regime, classify_regime
from ..eigen import SymmetricOperator, lanczos
from ..optimizers.gi_adam import GIAdam
from ..optimizers.preconditioner import is_adaptive, preconditioner, threshold_preconditioner
from ..optimizers.rules import learning_rate, rule_of
from ..tracking.record import Record
from ..tracking.tracker import SharpnessTracker
from .critical import CriticalLR, critical_learning_rate
from .schedule import WarmupLR, set_rates

# A model that holds 4096 eta_c is not limited by its learning rate: the search for a limit ends.
_DOUBLINGS = 12
_HALVINGS = 12
_SPIKE = 2.0  # a run holds only if its loss stays below so many times the first
_LEARNS = 0.8  # and falls at least so many times the best run's fall
_LONGER = 4  # times as many steps, for the runs that decide
_FINALS = 8  # of them at most
_AS_GOOD = 0.98  # of the longer warmup's fall, for a shorter one to be taken
_HOPELESS = 100.0  # a loss so many times the first ends a run


@dataclass(frozen=True)
class Trial:
    """A short training run of a copy.

    Attributes:
        lr_target, lr_init, warmup_steps: its schedule.
        peak: largest loss over the loss before training, both means over a few batches where there are several;
            infinite if it diverged.
        fall: loss before training less last loss, over the one before: 0 is nothing learnt, 1 everything; negative
            infinity if it diverged, or was stopped at 100 times the first loss.
        steps: how many it took, or would have taken.
    """

    lr_target: float
    lr_init: float
    warmup_steps: int
    peak: float
    fall: float
    steps: int


@dataclass
class Probe:
    """The measurements, and what they cost. Each works on copies or leaves the model as it is.

    Attributes:
        model, loss_fn, optimizer: as given to ``suggest_warmup``; only read.
        data: of ``batches_of``.
        steps: of the longest warmup.
        forward_passes, gradients, matvecs: spent so far.
        seen: batches that ``sharpness`` was measured on.
        ratios: of each parameter group's learning rate to the first group's.
        width: steps over which losses are averaged: 5 for several batches, 1 for a single one.
        on_run: called after each short run with a few words about it.

    Raises:
        ValueError: the first group's lr is 0 and another's is not.
    """

    model: nn.Module
    loss_fn: Callable[..., Tensor]
    data: Iterable[Any]
    optimizer: torch.optim.Optimizer
    steps: int
    forward_passes: int = 0
    gradients: int = 0
    matvecs: int = 0
    seen: int = 0
    on_run: Callable[[str], None] = lambda _: None
    ratios: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        rates = [learning_rate(group) for group in self.optimizer.param_groups]
        if rates[0] == 0 and any(rates):
            raise ValueError(f"the first group's lr is 0 and another's is {max(rates)}: their ratio is unknown.")
        # Equal rates have the ratio 1 also where they are all 0, as before a schedule has set them.
        self.ratios = [1.0 if lr == rates[0] else lr / rates[0] for lr in rates]
        self.width = 5 if len(list(itertools.islice(self.data, 2))) > 1 else 1  # steps averaged against noise

    @functools.cached_property
    def before(self) -> float:
        """The loss before training, over as many batches as runs average over.

        The same for every run, and not the mean of a run's own first steps: where those raise the loss, it would seem
        to fall the more afterwards.
        """
        module = LossModule(copy.deepcopy(self.model), self.loss_fn)
        batches = list(itertools.islice(_endless(self.data), self.width))
        self.forward_passes += len(batches)
        with torch.no_grad():
            return statistics.fmean(float(module(batch)[0]) for batch in batches)

    def sharpness(self, batches: int) -> tuple[float, float | None]:
        """Return the mean sharpness over batches, and GI-Adam's of the first if the optimizer is a fresh Adam.

        Preconditioned for an adaptive optimizer. Cost: for each batch a gradient and up to 100 Hessian-vector products.
        """
        found: list[float] = []
        gi_adam, hessian = None, None
        generator = torch.Generator().manual_seed(0)
        for batch in itertools.islice(self.data, batches):
            if hessian is None:
                hessian = HessianOperator(self.model, self.loss_fn, batch)
            else:
                # One export for all batches.
                hessian.refresh(batch)
            self.gradients += 1
            operators: list[SymmetricOperator] = [hessian]
            if is_adaptive(self.optimizer):
                gradients = gradients_of(hessian)
                operators = [PreconditionedOperator(hessian, threshold_preconditioner(self.optimizer, gradients))]
                # GI-Adam differs in its start only, so the comparison is for an Adam that has taken no step.
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
        """Return eta_c of the first batch, and the median over batches.

        Args:
            batches: how many to use; fewer if there are not so many.
            start: where the first search starts.

        Raises:
            ValueError: the median is 0 or infinite: the first step does not descend.
        """
        rise = rule_of(self.optimizer).rise
        found: list[CriticalLR] = []
        for batch in itertools.islice(self.data, batches):
            # Each search starts from the last batch's result, which saves passes where batches are alike.
            found.append(
                critical_learning_rate(
                    self.model, self.loss_fn, batch, self.optimizer, start=found[-1] if found else start, rise=rise
                )
            )
            self.forward_passes += found[-1].forward_passes
            self.gradients += 1
        # Not the mean: a batch on which nothing raised the loss has a value of another size, or infinity.
        median = statistics.median(c.value for c in found)
        if not 0 < median < math.inf:
            raise ValueError(f"the critical learning rate is {median}: the optimizer's first step does not descend.")
        return found[0], median

    def trend(self, kappa: float, top: float) -> Regime:
        """Warm a copy up from 0 to the threshold, tracking its sharpness.

        Args:
            kappa: of ``stability_threshold``.
            top: where the warmup ends, as a learning rate of the first group.
        """
        # Copied as a pair: only so does the copy of the optimizer hold the parameters of the copy of the model.
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        schedule = WarmupLR(optimizer, [top * ratio for ratio in self.ratios], self.steps)
        # A trend is told by limits of 0.8 and 1.2, for which 3% will do.
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
        self.on_run(f"warmup to {top:.3g}, its sharpness tracked")
        adaptive = is_adaptive(optimizer)
        curvature = [r.preconditioned_sharpness if adaptive else r.sharpness for r in records]
        return classify_regime(curvature, [r.lr for r in records], kappa, smooth=self.width)

    def targets(self, critical: float) -> list[Trial]:
        """Try targets around eta_c, first eta_c without a warmup: doubled while they hold, halved while that helps.

        A run holds only in comparison with the best one, so the halves go on until two runs hold.
        """
        trials = [self.run(critical, critical, 1)]
        recovers = bool(holding(trials))
        # Training at eta_c from the first step on did not hold: a long warmup to the same rate tells whether the jump
        # was at fault, or the rate.
        if not recovers:
            trials.append(self.run(critical, critical / 10, self.steps))
        while trials[-1] in holding(trials) and trials[-1].lr_target < 2**_DOUBLINGS * critical:
            target = 2 * trials[-1].lr_target
            trials.append(self.run(target, critical if recovers else target / 10, self.steps))
        # eta_c says what the first step can bear. What training learns most at may lie far below. Two in a row, for
        # one may be worse by the noise of its batches.
        misses = 0
        for target in (critical / 2**i for i in range(1, _HALVINGS + 1)):
            best = max(t.fall for t in trials)
            # A short warmup: a long one would leave too few steps at a rate that is slow already.
            trials.append(self.run(target, target, 1) if recovers else self.run(target, target / 10, self.steps // 4))
            misses = 0 if trials[-1].fall > best else misses + 1
            if misses > 1 and len(holding(trials)) > 1:
                break
        return trials

    def finals(self, trials: list[Trial]) -> list[Trial]:
        """Run the target that learnt most for four times as long, then its halves while they learn more.

        The rate that learns most in a short run is near the largest that trains at all: some fail, or fall behind, in
        a longer one (docs/lab/warmup.md).

        Args:
            trials: of ``targets``.
        """
        tried = {t.lr_target: t for t in trials}
        best = max(holding(trials), key=lambda t: t.fall)
        found = [self.longer(best)]
        while len(found) < _FINALS:
            last = found[-1]
            # One that was not tried gets the schedule of its double.
            half = tried.get(last.lr_target / 2) or replace(
                last, lr_target=last.lr_target / 2, lr_init=last.lr_init / 2, steps=best.steps
            )
            found.append(self.longer(half))
            # Where neither trained, a still smaller one may.
            if math.isfinite(last.fall) and found[-1].fall <= last.fall:
                break
        return found

    def longer(self, trial: Trial) -> Trial:
        """Repeat a run for four times as many steps."""
        return self.run(trial.lr_target, trial.lr_init, trial.warmup_steps, _LONGER * trial.steps)

    def warmups(self, target: float, start: float) -> list[Trial]:
        """Try ever longer warmups to a target, the longest last; one run alone where ``start`` is not below it.

        Args:
            target, start: learning rates of the first group.
        """
        if start >= target:
            return [self.run(target, target, 1)]
        return [self.run(target, start, length) for length in _lengths(self.steps)]

    def run(self, target: float, start: float, warmup: int, steps: int | None = None) -> Trial:
        """Train a copy with a linear warmup to a target.

        Args:
            target, start: learning rates of the first group; the others keep their ratio to it.
            warmup: steps until the target is reached; 1 is no warmup.
            steps: how many; None for a quarter more than the longest warmup, so that every run is at its target for a
                while.
        """
        trial = self._run(target, start, warmup, self.steps * 5 // 4 if steps is None else steps)
        self.on_run(f"warmup of {warmup} steps to {target:.3g}" + (f", {steps} steps" if steps else ""))
        return trial

    def _run(self, target: float, start: float, warmup: int, steps: int) -> Trial:
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        module, params = LossModule(model, self.loss_fn), list(trainable(model).values())
        losses: list[float] = []
        for t, batch in enumerate(itertools.islice(_endless(self.data), steps), start=1):
            lr = start + (target - start) * min(1.0, t / warmup)
            set_rates(optimizer, [lr * ratio for ratio in self.ratios])
            with torch.enable_grad():
                loss = module(batch)[0]
            losses.append(float(loss.detach()))
            self.gradients += 1
            # In absolute value, for a loss may be negative; and "not <=", so that NaN ends the run too.
            if not losses[-1] <= losses[0] + (_HOPELESS - 1) * abs(losses[0]):
                peak = losses[-1] / losses[0] if math.isfinite(losses[-1]) else math.inf
                return Trial(target, start, warmup, peak, -math.inf, steps)
            for p, g in zip(params, torch.autograd.grad(loss, params, allow_unused=True), strict=True):
                p.grad = g
            optimizer.step()
        # Running means, so that the peak is a rise that lasts and not one hard batch.
        means = [statistics.fmean(losses[i : i + self.width]) for i in range(len(losses) - self.width + 1)]
        last = statistics.fmean(losses[-max(self.width, steps // 10) :])
        # A loss may be negative, as a density's: what counts is by how much of its size it changed.
        first, size = self.before, abs(self.before)
        return Trial(target, start, warmup, 1 + (max(means) - first) / size, (first - last) / size, steps)


def most_runs(steps: int) -> int:
    """Return how many runs a suggestion takes at most: the trend, targets, those that decide, warmups.

    Args:
        steps: of the longest warmup.
    """
    return 1 + (2 + _DOUBLINGS + _HALVINGS) + _FINALS + len(_lengths(steps)) + 1


def _lengths(steps: int) -> list[int]:
    """Return lengths of warmups to try, by factors of 4 because each costs a whole run."""
    return [*(4**k for k in range(20) if 4**k < steps), steps]


def batches_of(data: Any) -> Iterable[Any]:
    """Turn data into something to go through again and again.

    Args:
        data: a ``DataLoader``, a list of batches, or one batch as a tuple or mapping.

    Raises:
        ValueError: an iterator, which can be read only once; nothing that can be iterated; or an empty list.
    """
    if isinstance(data, tuple | Mapping):
        return [data]
    # A generator would give its batches to the first measurement, and nothing to all later ones.
    if isinstance(data, Iterator):
        raise ValueError("data can be read only once: give a list of batches, a DataLoader, or one batch as a tuple.")
    if not isinstance(data, Iterable) or (not isinstance(data, DataLoader) and not any(True for _ in data)):
        raise ValueError(f"data must be a DataLoader, a list of batches, or one batch, got {type(data).__name__}.")
    return data


def _endless(data: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from data


def as_good(shorter: Trial, longer: Trial) -> bool:
    """Whether a run with a shorter warmup learnt as much, but for noise, as one with a longer warmup."""
    return shorter.fall >= _AS_GOOD * longer.fall


def holding(trials: list[Trial]) -> list[Trial]:
    """Return the runs without a spike whose loss fell at least 0.8 times as much as in the best of them.

    Without a spike: the loss stayed at or below twice the one before training.
    """
    calm = [t for t in trials if t.peak <= _SPIKE and t.fall > 0]
    # A part of the best fall: where weights are scale-invariant, as before batch norm, no rate makes the loss rise.
    return [t for t in calm if t.fall >= _LEARNS * max(c.fall for c in calm)]
