"""What happened in a run: crossings of the stability threshold, catapults, and the natural trend of the sharpness.

Pure functions of a run's rows (one entry a step; None where a step was not measured), usable on anyone's logs. Steps
are indices into the sequences, from 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Series = Sequence[float | None]


@dataclass(frozen=True)
class Catapult:
    """One excursion beyond the threshold that raised the loss and came back.

    Attributes:
        start: first step beyond the threshold from which the loss rose.
        peak: step of the highest loss.
        end: first step back below the threshold with the loss no higher than at the start; None if the run ended first.
        loss_ratio: peak loss / loss at the start.
        sharpness_drop: 1 - sharpness at the end (or the run's last) / sharpness at the start.
    """

    start: int
    peak: int
    end: int | None
    loss_ratio: float
    sharpness_drop: float


@dataclass(frozen=True)
class Regime:
    """The natural trend of the sharpness before the first crossing.

    Attributes:
        name: "C1" progressive sharpening, "C2" sharpness reduction, "C3" constant.
        trend: sharpness at the first crossing (or the last value) / initial sharpness.
        crossing: first step beyond the threshold, or None.
        persistence: share of the later steps with sharpness within 0.8 to 1.3 of the threshold; None if none crossed.
    """

    name: str
    trend: float
    crossing: int | None
    persistence: float | None


def first_crossing(ratio: Series) -> int | None:
    """Return the first step whose ratio ``lr * sharpness / kappa`` exceeds 1, or None."""
    return next((t for t, r in enumerate(ratio) if r is not None and r > 1), None)


def detect_catapults(
    loss: Series, sharpness: Series, ratio: Series, *, min_rise: float = 0.0, min_drop: float = 0.0
) -> list[Catapult]:
    """Find catapults in a full-batch run.

    A catapult starts at a step beyond the threshold (ratio > 1) whose next loss is higher, and ends when the ratio is
    back below 1 and the loss no higher than at the start. For mini-batches, smooth the loss first and ask for a rise
    and a drop.

    Args:
        loss: of each step; NaN and infinity count as a rise.
        sharpness: of each step; the preconditioned one for an adaptive optimizer.
        ratio: ``lr * sharpness / kappa`` of each step.
        min_rise: the least relative rise of the loss that counts.
        min_drop: the least relative drop of the sharpness that counts.

    Raises:
        ValueError: the sequences differ in length.

    Source: Lewkowycz et al., The large learning rate phase (2020); Kalra and Barkeshli (2024), section 3.
    """
    if not len(loss) == len(sharpness) == len(ratio):
        raise ValueError(f"the sequences differ in length: {len(loss)}, {len(sharpness)}, {len(ratio)}.")
    height = [math.inf if x is None or math.isnan(x) else x for x in loss]
    known, beyond = _filled(sharpness), [r is not None and r > 1 for r in ratio]
    found: list[Catapult] = []
    t = 0
    while t + 1 < len(height):
        if not (beyond[t] and height[t + 1] > height[t]):
            t += 1
            continue
        end = next((s for s in range(t + 1, len(height)) if not beyond[s] and height[s] <= height[t]), None)
        last = len(height) - 1 if end is None else end
        peak = max(range(t, last + 1), key=height.__getitem__)
        rise = height[peak] / height[t] if height[t] > 0 else math.inf
        before, after = known[t], known[last]
        drop = 1 - after / before if before and after is not None else 0.0
        if rise >= 1 + min_rise and drop >= min_drop:
            found.append(Catapult(t, peak, end, rise, drop))
        t = last
    return found


def classify_regime(sharpness: Series, ratio: Series) -> Regime:
    """Classify the natural trend of the sharpness by its value at the first crossing of the threshold.

    C1 if it rose by more than 20%, C2 if it fell by more than 20%, else C3. The initial slope says little: runs that
    sharpen later often dip first. A fast warmup crosses early and hides the trend.

    Args:
        sharpness: of each step.
        ratio: ``lr * sharpness / kappa`` of each step.

    Raises:
        ValueError: no sharpness was measured.

    Source: Kalra and Barkeshli (2024), section 4; the limits of 20% and the persistence are this package's.
    """
    known = [s for s in _filled(sharpness) if s is not None]
    if not known:
        raise ValueError("no sharpness was measured: every entry is None.")
    crossing = first_crossing(ratio)
    at = known[-1] if crossing is None else known[min(crossing, len(known) - 1)]
    trend = at / known[0] if known[0] else math.inf
    name = "C1" if trend > 1.2 else "C2" if trend < 0.8 else "C3"
    persistence = None
    if crossing is not None:
        later = [r for r in ratio[crossing:] if r is not None]
        persistence = sum(0.8 <= r <= 1.3 for r in later) / len(later)
    return Regime(name, trend, crossing, persistence)


def _filled(series: Series) -> list[float | None]:
    """Carry the last known value over gaps."""
    result: list[float | None] = []
    for x in series:
        result.append(x if x is not None or not result else result[-1])
    return result
