"""What a run's records say: crossings of the stability threshold, catapults, regimes. Pure functions of
sequences.

Steps are indices into the sequences, from 0. None (or NaN) in a curvature sequence is a step without a
measurement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Measured = Sequence[float | None]


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
        name: "C1" progressive sharpening, "C2" sharpness reduction, "C3" nearly constant sharpness.
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


def first_crossing(ratio: Measured, level: float = 1.0) -> int | None:
    """Return the first step whose ratio is above a level, None if there is none.

    Args:
        ratio: ``lr * sharpness / kappa`` of each step, as in ``Record.ratio``; None where unmeasured.
        level: what counts as crossed.

    >>> first_crossing([0.5, None, 1.2, 0.9])
    2
    """
    return next((t for t, r in enumerate(ratio) if r is not None and r > level), None)


def detect_catapults(
    loss: Measured,
    sharpness: Measured,
    lr: Sequence[float],
    threshold: float | Sequence[float],
    *,
    min_drop: float = 0.0,
) -> list[Catapult]:
    """Find the catapults of a full-batch run.

    A catapult starts at a step t with ``lr_t * sharpness_t > kappa`` and ``loss_{t+1} > loss_t``, and ends at
    the first later step with ``lr * sharpness <= kappa`` and a loss not above ``loss_t``. Between
    measurements the last measured sharpness stands, so an end can only be seen at a measured step.

    Args:
        loss: of each step, before its update; None, NaN and infinity are a loss that is not finite.
        sharpness: likewise; the preconditioned one for Adam; None where unmeasured.
        lr: of each step.
        threshold: kappa from ``stability_threshold`` (not divided by lr), one number or one per step.
        min_drop: the smallest ``sharpness_drop`` that counts. With momentum or minibatches the loss also
            rises for other reasons: use 0.1, and smooth a minibatch loss first.

    Returns:
        Catapults in order; they do not overlap. The last may be unfinished (``end`` None): it may be a
        divergence.

    Raises:
        ValueError: the sequences differ in length.

    Source: after the self-stabilisation cycle of Kalra and Barkeshli, Why warmup the learning rate? (2024),
    section 4, which gives no numeric definition.

    >>> detect_catapults([1.0, 1.5, 0.9], [30.0, 25.0, 15.0], [0.1, 0.1, 0.1], 2.0)
    [Catapult(start=0, peak=1, end=2, loss_ratio=1.5, sharpness_drop=0.5)]
    """
    kappa = _kappa(threshold, loss=loss, sharpness=sharpness, lr=lr)
    held = _hold(sharpness)
    height = [x if x is not None and math.isfinite(x) else math.inf for x in loss]
    found: list[Catapult] = []
    t, steps = 0, len(height)
    while t < steps - 1:
        if not (lr[t] * held[t] > kappa[t] and height[t + 1] > height[t]):
            t += 1
            continue
        later = range(t + 1, steps)
        end = next((s for s in later if lr[s] * held[s] <= kappa[s] and height[s] <= height[t]), None)
        last = steps - 1 if end is None else end
        peak = max(range(t, last + 1), key=height.__getitem__)
        ratio = height[peak] / height[t] if height[t] > 0 else math.inf
        drop = 1 - held[last] / held[t]
        if drop >= min_drop or (end is None and min_drop == 0):
            found.append(Catapult(t, peak, end, ratio, drop))
        t = last
    return found


def classify_regime(sharpness: Measured, lr: Sequence[float], threshold: float | Sequence[float]) -> Regime:
    """Tell whether training sharpens or flattens before it meets the stability threshold.

        trend = sharpness at the first step with lr * sharpness > kappa (at the end without one) / first
        sharpness C1: trend > 1.2        C2: trend < 0.8        C3: between

    The early slope would mislead: runs that sharpen later often dip first. Use a slow warmup, or the crossing
    comes before the trend shows.

    Args:
        sharpness: of each step; the preconditioned one for Adam; None where unmeasured.
        lr: of each step.
        threshold: kappa from ``stability_threshold``, one number or one per step.

    Returns:
        A ``Regime``.

    Raises:
        ValueError: the sequences differ in length, or the first measured sharpness is missing or not
            positive.

    Source: the regimes of Kalra and Barkeshli, Why warmup the learning rate? (2024); the limits 1.2 and 0.8
    are ours.

    >>> classify_regime([1.0, 2.0, 3.0], [0.1, 0.4, 0.8], 2.0).name
    'C1'
    """
    kappa = _kappa(threshold, sharpness=sharpness, lr=lr)
    values = {t: s for t, s in enumerate(sharpness) if s is not None and not math.isnan(s)}
    first = next(iter(values.values()), None)
    if first is None or first <= 0:
        raise ValueError(f"the first measured sharpness must be positive, got {first}.")
    ratio = {t: lr[t] * s / kappa[t] for t, s in values.items()}
    crossing = next((t for t, r in ratio.items() if r > 1), None)
    at = max(values) if crossing is None else crossing
    trend = values[at] / first
    persistence = None
    if crossing is not None:
        after = [r for t, r in ratio.items() if t > crossing]
        persistence = sum(0.8 <= r <= 1.3 for r in after) / len(after) if after else None
    before = sum(t < at for t in values)
    confident = before >= 8
    name: Literal["C1", "C2", "C3"] = "C1" if trend > 1.2 else "C2" if trend < 0.8 else "C3"
    where = "at the end (no crossing)" if crossing is None else f"at the first crossing (step {crossing})"
    evidence = f"sharpness {values[at]:.4g} {where} is {trend:.2f} of the first, {first:.4g}"
    if persistence is not None:
        evidence += f"; {persistence:.0%} of later steps near the threshold"
    if not confident:
        evidence += f"; only {before} measured steps before it: use a slower warmup"
    return Regime(name, trend, crossing, persistence, confident, evidence + ".")


def _kappa(threshold: float | Sequence[float], **sequences: Sequence[float | None]) -> list[float]:
    """Check that the sequences have one length, and spread the threshold over it."""
    lengths = {name: len(values) for name, values in sequences.items()}
    if isinstance(threshold, Sequence):
        lengths["threshold"] = len(threshold)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"one value per step is needed in each sequence, got lengths {lengths}.")
    steps = next(iter(lengths.values()))
    return list(threshold) if isinstance(threshold, Sequence) else [threshold] * steps


def _hold(values: Measured) -> list[float]:
    """Fill unmeasured steps with the last measured value; NaN, which crosses nothing, before the first."""
    held: list[float] = []
    for value in values:
        missing = value is None or math.isnan(value)
        held.append((held[-1] if held else math.nan) if missing else float(value))  # type: ignore[arg-type]
    return held
