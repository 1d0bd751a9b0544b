"""What a run's records say: crossings of the stability threshold, catapults, regimes, divergence and failure.

Pure functions of the columns of a metrics table, anyone's: lists, arrays, tensors or columns of a data frame. Steps are
positions in the columns, from 0. None (or NaN) in a curvature column is a step without a measurement.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Measured = Sequence[float | None] | Iterable[Any]
TRENDS = {"C1": "progressive sharpening", "C2": "sharpness reduction", "C3": "nearly constant sharpness"}


@dataclass(frozen=True)
class Catapult:
    """One catapult: the learning rate passes the threshold, the loss jumps, the sharpness falls, the loss
    returns.

    Attributes:
        start: the step beyond the threshold at which the loss begins to rise.
        peak: the step of the largest loss.
        end: the first step below the threshold with the loss back at its start value; None if the run ends
            first.
        loss_ratio: loss at the peak over loss at the start; infinite for a loss that is not finite.
        sharpness_drop: ``1 - sharpness at the end / at the start``: 0.25 is a fall by a quarter.
    """

    start: int
    peak: int
    end: int | None
    loss_ratio: float
    sharpness_drop: float


@dataclass(frozen=True)
class Regime:
    """How the sharpness meets the stability threshold.

    Attributes:
        name: "C1", "C2" or "C3"; ``TRENDS`` has them in words.
        trend: sharpness at the first crossing (or at the end, if none) over the first measured sharpness.
        crossing: the first step beyond the threshold; None if there is none.
        persistence: the share of measured steps after the crossing with ``lr * sharpness`` within 0.8 to 1.3
            times the threshold; None without a crossing or without a step after it.
        confident: False if the crossing came within the first eight measured steps: too early to show a
            trend.
        evidence: the figures in a sentence.
    """

    name: Literal["C1", "C2", "C3"]
    trend: float
    crossing: int | None
    persistence: float | None
    confident: bool
    evidence: str


@dataclass(frozen=True)
class EdgeOfStability:
    """How much of a run was spent at the stability threshold.

    Attributes:
        fraction: share of the measured steps with a ratio from ``low`` to ``high``.
        above: share with a ratio above 1.
        median: of the ratio: the factor by which minibatches or a loss that is not quadratic shift the threshold.
        steps: measured steps counted.
    """

    fraction: float
    above: float
    median: float
    steps: int


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        name: "trained", "diverged" (a loss that is not finite) or "failed" (finite, but nothing learnt at the end).
        step: the first diverged step; None otherwise.
        evidence: the figures in a sentence.
    """

    name: Literal["trained", "diverged", "failed"]
    step: int | None
    evidence: str


def first_crossing(ratio: Measured, level: float = 1.0) -> int | None:
    """Return the first step whose ratio is above a level, None if there is none.

    Args:
        ratio: ``lr * sharpness / kappa`` of each step, as in ``Record.ratio``; None where unmeasured.
        level: what counts as crossed.

    >>> first_crossing([0.5, None, 1.2, 0.9])
    2
    """
    # A NaN is above nothing, so unmeasured steps of either spelling are passed over.
    return next((t for t, r in enumerate(ratio) if r is not None and r > level), None)


def crossings(ratio: Measured, level: float = 1.0) -> list[tuple[int, int | None]]:
    """Return every stay above a level: its first step, and the first measured step at or below the level again.

    Args:
        ratio: ``lr * sharpness / kappa`` of each step; None or NaN where unmeasured.
        level: what counts as crossed.

    Returns:
        ``(up, down)`` in order; down is None if the run ends above.

    >>> crossings([0.5, 1.2, 1.1, 0.9, 1.3])
    [(1, 3), (4, None)]
    """
    found: list[tuple[int, int | None]] = []
    up = None
    for t, r in enumerate(_column(ratio)):
        # NaN compares as False with everything: an unmeasured step neither begins a stay nor ends one.
        if up is None and r > level:
            up = t
        elif up is not None and r <= level:
            found.append((up, t))
            up = None
    return found if up is None else [*found, (up, None)]


def edge_of_stability(
    ratio: Measured, *, start: int | None = None, low: float = 0.8, high: float = 1.3
) -> EdgeOfStability:
    """Return how much of a run was spent at the stability threshold.

    Args:
        ratio: ``lr * sharpness / kappa`` of each step; None or NaN where unmeasured.
        start: the first step counted; None for the one after the first crossing.
        low, high: what counts as at the threshold.

    Raises:
        ValueError: no measured step is left: the run never crosses (give ``start``), or nothing was measured.

    Source: Cohen et al., Gradient descent on neural networks typically occurs at the edge of stability (2021); the
    limits 0.8 and 1.3 are ours.

    >>> edge_of_stability([0.4, 1.1, 0.9, 1.0, 1.5])
    EdgeOfStability(fraction=0.6666666666666666, above=0.3333333333333333, median=1.0, steps=3)
    """
    values = _column(ratio)
    if start is None:
        crossing = next((t for t, r in enumerate(values) if r > 1), None)
        # After the crossing: the way up to the threshold is not time spent at it.
        start = len(values) if crossing is None else crossing + 1
    counted = [r for r in values[start:] if not math.isnan(r)]
    if not counted:
        raise ValueError(f"no measured step from step {start} on, of {len(values)}: nothing to count; give start.")
    share = sum(low <= r <= high for r in counted) / len(counted)
    return EdgeOfStability(share, sum(r > 1 for r in counted) / len(counted), statistics.median(counted), len(counted))


def training_outcome(
    loss: Measured,
    *,
    accuracy: Measured | None = None,
    chance: float | None = None,
    window: int | None = None,
    limit: float = math.inf,
) -> Outcome:
    """Tell whether a run trained, diverged or failed.

        diverged    a loss that is NaN, infinite or missing, or above ``limit``
        failed      mean training accuracy of the last window < 1.5 chance
                    (without accuracies: mean loss of the last window > 0.9 of the first loss)

    SGD beyond its largest learning rate diverges; Adam does not, it fails. The mean over a window replaces the last
    minibatch of the paper's code, which is one noisy number.

    Args:
        loss: training loss of each step.
        accuracy: training accuracy, 0 to 1, in steps or evaluations of its own; None and NaN are skipped.
        chance: accuracy of guessing, 0.1 for ten equal classes; needed with ``accuracy``.
        window: steps (or evaluations) averaged at the end, an epoch is natural; None for the last tenth, 1 at least.
        limit: a larger loss counts as diverged; 1e5 is used for short runs in the literature.

    Returns:
        An ``Outcome``.

    Raises:
        ValueError: no loss; accuracies without chance, or with none measured; window below 1.

    Source: Kalra and Barkeshli, Why warmup the learning rate? (2024): 1.5 chance; for language models "no significant
    improvement over the initial loss", where 0.9 is ours.

    >>> training_outcome([2.3, 1.0, float("nan")]).name, training_outcome([2.3, 9.0, 2.29]).name
    ('diverged', 'failed')
    """
    losses = _column(loss)
    if not losses:
        raise ValueError("the run has no loss.")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}.")
    # "not <=" and not ">", so that NaN is bad.
    bad = next((t for t, x in enumerate(losses) if not (math.isfinite(x) and x <= limit)), None)
    if bad is not None:
        return Outcome("diverged", bad, f"the loss is {losses[bad]:.4g} at step {bad}.")
    if accuracy is None:
        last, of = _last_mean(losses, window)
        # A tenth of its absolute value, as a loss may be negative.
        failed = last > losses[0] - 0.1 * abs(losses[0])
        evidence = f"the loss is {last:.4g}, the mean of the last {of}, and was {losses[0]:.4g} at first."
        return Outcome("failed" if failed else "trained", None, evidence)
    measured = [x for x in _column(accuracy) if not math.isnan(x)]
    if chance is None or not 0 < chance < 1 or not measured:
        raise ValueError(
            f"accuracy needs a measured value and a chance between 0 and 1, got {len(measured)} and {chance}."
        )
    last, of = _last_mean(measured, window)
    evidence = f"training accuracy is {last:.1%}, the mean of the last {of}; 1.5 times chance is {1.5 * chance:.1%}."
    return Outcome("failed" if last < 1.5 * chance else "trained", None, evidence)


def _last_mean(values: list[float], window: int | None) -> tuple[float, int]:
    count = min(len(values), max(1, len(values) // 10) if window is None else window)
    return statistics.fmean(values[-count:]), count


def detect_catapults(
    loss: Measured,
    sharpness: Measured,
    lr: Measured,
    threshold: float | Measured,
    *,
    min_drop: float | None = None,
    smooth: int = 1,
) -> list[Catapult]:
    """Find the catapults of a run.

    A catapult starts at a step t with ``lr_t * sharpness_t > kappa`` and ``loss_{t+1} > loss_t``, and ends at
    the first later step with ``lr * sharpness <= kappa`` and a loss not above ``loss_t``. Between
    measurements the last measured sharpness stands, so an end can only be seen at a measured step.

    Minibatch noise raises and lowers both from step to step. ``smooth=w`` replaces loss and sharpness by their means
    over the w steps around each step first, and asks for a drop of the sharpness; w should be longer than the noise,
    and shorter than a catapult. Minibatches also lower the true threshold: give kappa times the factor that
    ``edge_of_stability`` measured.

    Args:
        loss: of each step, before its update; None, NaN and infinity are a loss that is not finite.
        sharpness: likewise; the preconditioned one for Adam; None where unmeasured.
        lr: of each step.
        threshold: kappa from ``stability_threshold`` (not divided by lr), one number or one per step.
        min_drop: the smallest ``sharpness_drop`` that counts. With momentum the loss also rises for other reasons: use
            0.1. None is 0.1 with smoothing, 0 without.
        smooth: steps averaged; 1 is a full-batch run as it is.

    Returns:
        Catapults in order; they do not overlap. The last may be unfinished (``end`` None): it may be a
        divergence.

    Raises:
        ValueError: the columns differ in length; smooth is below 1.

    Source: after the self-stabilisation cycle of Kalra and Barkeshli, Why warmup the learning rate? (2024),
    section 4, which gives no numeric definition.

    >>> detect_catapults([1.0, 1.5, 0.9], [30.0, 25.0, 15.0], [0.1, 0.1, 0.1], 2.0)
    [Catapult(start=0, peak=1, end=2, loss_ratio=1.5, sharpness_drop=0.5)]
    """
    if smooth < 1:
        raise ValueError(f"smooth must be at least 1, got {smooth}.")
    losses, measured, rates, kappa = _columns(threshold, loss=loss, sharpness=sharpness, lr=lr)
    min_drop = (0.1 if smooth > 1 else 0.0) if min_drop is None else min_drop
    # Held first: a mean over measured steps alone would have holes where the condition below is asked.
    held = _smoothed(_hold(measured), smooth)
    # A loss that is NaN is higher than any other: the run did not come back from there.
    height = _smoothed([x if math.isfinite(x) else math.inf for x in losses], smooth)
    found: list[Catapult] = []
    t, steps = 0, len(height)
    while t < steps - 1:
        if not (rates[t] * held[t] > kappa[t] and height[t + 1] > height[t]):
            t += 1
            continue
        later = range(t + 1, steps)
        # Both conditions: below the threshold with a high loss the model is still on its way back, and a low loss above
        # the threshold is about to rise again.
        end = next((s for s in later if rates[s] * held[s] <= kappa[s] and height[s] <= height[t]), None)
        last = steps - 1 if end is None else end
        peak = max(range(t, last + 1), key=height.__getitem__)
        ratio = height[peak] / height[t] if height[t] > 0 else math.inf
        # At the end and not at the peak: the sharpness goes on falling while the loss comes back.
        drop = 1 - held[last] / held[t]
        # One that is not over has no final drop yet: it counts unless a least drop is asked for.
        if drop >= min_drop or (end is None and min_drop == 0):
            found.append(Catapult(t, peak, end, ratio, drop))
        # From its end, at which the next one may begin: catapults follow each other at the edge of stability.
        t = last
    return found


def classify_regime(sharpness: Measured, lr: Measured, threshold: float | Measured, *, smooth: int = 1) -> Regime:
    """Tell whether training sharpens or flattens before it meets the stability threshold.

        trend = sharpness at the first step with lr * sharpness > kappa (at the end without one) / first sharpness
        C1: trend > 1.2        C2: trend < 0.8        C3: between

    The early slope would mislead: runs that sharpen later often dip first. Use a slow warmup, or the crossing
    comes before the trend shows. With cross-entropy look at a run before its accuracy nears 1: the sharpness then
    falls whatever the regime.

    Args:
        sharpness: of each step; the preconditioned one for Adam; None where unmeasured.
        lr: of each step.
        threshold: kappa from ``stability_threshold``, one number or one per step.
        smooth: replace the sharpness by its mean over so many steps, for minibatches.

    Returns:
        A ``Regime``.

    Raises:
        ValueError: the columns differ in length, the first measured sharpness is missing or not positive, or smooth
            is below 1.

    Source: the regimes of Kalra and Barkeshli, Why warmup the learning rate? (2024); the limits 1.2 and 0.8
    are ours.

    >>> classify_regime([1.0, 2.0, 3.0], [0.1, 0.4, 0.8], 2.0).name
    'C1'
    """
    if smooth < 1:
        raise ValueError(f"smooth must be at least 1, got {smooth}.")
    measured, rates, kappa = _columns(threshold, sharpness=sharpness, lr=lr)
    # Not held here: a carried value would say that the sharpness kept still.
    values = {t: s for t, s in enumerate(_smoothed(measured, smooth)) if not math.isnan(measured[t])}
    first = next(iter(values.values()), None)
    if first is None or first <= 0:
        raise ValueError(f"the first measured sharpness must be positive, got {first}.")
    ratio = {t: rates[t] * s / kappa[t] for t, s in values.items()}
    crossing = next((t for t, r in ratio.items() if r > 1), None)
    at = max(values) if crossing is None else crossing
    trend = values[at] / first
    persistence = None
    if crossing is not None:
        after = [r for t, r in ratio.items() if t > crossing]
        # As ``edge_of_stability``'s default limits.
        persistence = sum(0.8 <= r <= 1.3 for r in after) / len(after) if after else None
    before = sum(t < at for t in values)
    # Fewer may all lie in the dip with which runs that sharpen later often begin.
    confident = before >= 8
    name: Literal["C1", "C2", "C3"] = "C1" if trend > 1.2 else "C2" if trend < 0.8 else "C3"
    where = "at the end (no crossing)" if crossing is None else f"at the first crossing (step {crossing})"
    evidence = f"sharpness {values[at]:.4g} {where} is {trend:.2f} of the first, {first:.4g}"
    if persistence is not None:
        evidence += f"; {persistence:.0%} of later steps near the threshold"
    if not confident:
        evidence += f"; only {before} measured steps before it: use a slower warmup"
    return Regime(name, trend, crossing, persistence, confident, evidence + ".")


def _columns(threshold: float | Measured, **columns: Measured) -> list[list[float]]:
    """Turn columns to floats, check that they have one length, and add the threshold spread over it."""
    found = {name: _column(values) for name, values in columns.items()}
    # A 0-d tensor or array is one number, although its class can be iterated.
    many = isinstance(threshold, Iterable) and getattr(threshold, "ndim", 1) > 0
    if many:
        found["threshold"] = _column(threshold)  # type: ignore[arg-type]
    lengths = {name: len(values) for name, values in found.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"one value per step is needed in each sequence, got lengths {lengths}.")
    if not many:
        found["threshold"] = [float(threshold)] * next(iter(lengths.values()))  # type: ignore[arg-type]
    return list(found.values())


def _column(values: Measured) -> list[float]:
    """Return a column as floats, NaN for None."""
    return [math.nan if x is None else float(x) for x in values]


def _hold(values: list[float]) -> list[float]:
    """Fill unmeasured steps with the last measured value; NaN, which crosses nothing, before the first."""
    held: list[float] = []
    for value in values:
        held.append((held[-1] if held else math.nan) if math.isnan(value) else value)
    return held


def _smoothed(values: list[float], width: int) -> list[float]:
    """Return the mean of the finite values around each step; what is not finite stays so."""
    if width == 1:
        return values
    # An even width has its odd step ahead.
    back, ahead = (width - 1) // 2, width // 2
    around = (values[max(0, t - back) : t + ahead + 1] for t in range(len(values)))
    means = (statistics.fmean(finite) if (finite := [x for x in w if math.isfinite(x)]) else math.nan for w in around)
    return [mean if math.isfinite(x) else x for x, mean in zip(values, means, strict=True)]
