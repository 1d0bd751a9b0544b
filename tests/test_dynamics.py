"""Crossings, catapults and regimes in hand-made sequences and in gradient descent with a known catapult."""

from __future__ import annotations

import math

import pytest
import torch

import sharpkern as sk
from sharpkern.dynamics import Catapult

NAN = float("nan")


def test_first_crossing_is_the_first_ratio_above_the_level() -> None:
    assert sk.first_crossing([0.2, 0.9, 1.0, 1.01, 0.5, 2.0]) == 3
    assert sk.first_crossing([0.2, None, NAN, 0.7, 1.5], level=0.6) == 3
    assert sk.first_crossing([None, math.inf]) == 1
    assert sk.first_crossing([0.2, None, 1.0]) is None
    assert sk.first_crossing([]) is None


def test_two_catapults_are_told_apart() -> None:
    loss = [1.0, 0.9, 0.8, 1.4, 2.0, 1.1, 0.7, 0.65, 0.6, 0.5, 0.8, 0.4]
    sharpness = [10.0, 18.0, 25.0, 24.0, 20.0, 15.0, 14.0, 21.0, 19.0, 24.0, 21.0, 18.0]
    first, second = sk.detect_catapults(loss, sharpness, [0.1] * 12, 2.0)
    assert (first.start, first.peak, first.end) == (2, 4, 6)
    assert first.loss_ratio == pytest.approx(2.0 / 0.8)
    assert first.sharpness_drop == pytest.approx(1 - 14 / 25)
    assert second == Catapult(9, 10, 11, pytest.approx(1.6), pytest.approx(0.25))


def test_a_crossing_whose_loss_falls_is_no_catapult() -> None:
    assert sk.detect_catapults([1.0, 0.9, 0.8, 0.7], [25.0, 26.0, 27.0, 15.0], [0.1] * 4, 2.0) == []


def test_a_loss_that_rises_below_the_threshold_is_no_catapult() -> None:
    assert sk.detect_catapults([1.0, 1.2, 0.8], [15.0, 16.0, 15.0], [0.1] * 3, 2.0) == []


def test_a_catapult_lasts_until_both_loss_and_sharpness_are_back() -> None:
    loss = [1.0, 1.5, 0.9, 0.8, 0.7]
    (only,) = sk.detect_catapults(loss, [25.0, 24.0, 23.0, 22.0, 15.0], [0.1] * 5, 2.0)
    assert (only.start, only.peak, only.end) == (0, 1, 4)
    (only,) = sk.detect_catapults([1.0, 1.5, 1.4, 1.2, 0.7], [25.0, 15.0, 15.0, 15.0, 15.0], [0.1] * 5, 2.0)
    assert (only.start, only.peak, only.end) == (0, 1, 4)


def test_the_threshold_may_change_from_step_to_step() -> None:
    loss, sharpness = [1.0, 1.5, 0.9], [25.0, 25.0, 15.0]
    assert len(sk.detect_catapults(loss, sharpness, [0.1] * 3, [2.0] * 3)) == 1
    assert sk.detect_catapults(loss, sharpness, [0.1] * 3, [2.6, 2.0, 2.0]) == []
    assert sk.detect_catapults(loss, sharpness, [0.07, 0.1, 0.1], 2.0) == []


@pytest.mark.parametrize("gap", [None, NAN])
def test_unmeasured_steps_keep_the_last_value(gap: float | None) -> None:
    loss = [1.0, 1.5, 0.9, 0.8, 0.7]
    (only,) = sk.detect_catapults(loss, [25.0, gap, gap, 15.0, gap], [0.1] * 5, 2.0)
    assert (only.start, only.end) == (0, 3)
    assert only.sharpness_drop == pytest.approx(0.4)
    assert sk.detect_catapults(loss, [gap, gap, 25.0, gap, 15.0], [0.1] * 5, 2.0) == []
    assert sk.detect_catapults(loss, [gap] * 5, [0.1] * 5, 2.0) == []


def test_min_drop_filters_oscillations() -> None:
    loss, lr = [1.0, 1.5, 0.9], [0.1, 0.1, 0.09]
    for drop, found in ((0.03, 1), (0.1, 0)):
        assert len(sk.detect_catapults(loss, [21.0, 21.0, 20.0], lr, 2.0, min_drop=drop)) == found


@pytest.mark.parametrize("bad", [math.inf, NAN, None])
def test_divergence_is_an_unfinished_catapult_of_infinite_height(bad: float | None) -> None:
    (only,) = sk.detect_catapults([1.0, 0.5, 7.0, bad], [25.0, 30.0, 60.0, None], [0.1] * 4, 2.0)
    assert (only.start, only.peak, only.end, only.loss_ratio) == (1, 3, None, math.inf)
    assert only.sharpness_drop == pytest.approx(-1.0)
    assert sk.detect_catapults([1.0, 0.5, 7.0, bad], [25.0, 30.0, 60.0, None], [0.1] * 4, 2.0, min_drop=0.1) == []


def test_empty_and_single_steps_have_no_catapults() -> None:
    assert sk.detect_catapults([], [], [], 2.0) == []
    assert sk.detect_catapults([1.0], [99.0], [1.0], 2.0) == []


def test_sequences_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="'loss': 2, 'sharpness': 3, 'lr': 2"):
        sk.detect_catapults([1.0, 2.0], [1.0] * 3, [1.0] * 2, 2.0)
    with pytest.raises(ValueError, match="'threshold': 1"):
        sk.classify_regime([1.0, 2.0], [0.1] * 2, [2.0])


def test_the_three_regimes() -> None:
    steps = 40
    warmup = [2 * (t + 1) / steps for t in range(steps)]  # crosses kappa = 2 where sharpness > 1 / fraction
    rising = [1 + 2 * t / steps for t in range(steps)]
    regime = sk.classify_regime(rising, warmup, 2.0)
    crossing = next(t for t in range(steps) if warmup[t] * rising[t] > 2)
    assert (regime.name, regime.crossing) == ("C1", crossing)
    assert regime.trend == pytest.approx(rising[crossing])
    assert regime.confident
    falling = [8 * (1 - t / steps) for t in range(steps)]
    regime = sk.classify_regime(falling, [x * 0.6 for x in warmup], 2.0)
    crossing = next(t for t in range(steps) if 0.6 * warmup[t] * falling[t] > 2)
    assert (regime.name, regime.crossing) == ("C2", crossing)
    assert regime.trend == pytest.approx(1 - crossing / steps)
    regime = sk.classify_regime([3.0 + 0.1 * math.sin(t) for t in range(steps)], warmup, 2.0)
    assert regime.name == "C3"
    assert 0.9 < regime.trend < 1.1


def test_an_initial_dip_does_not_mislead() -> None:
    dip = [1.0, 0.95, 0.9, 0.86, 0.86, 0.88, 0.95, 1.1, 1.4, 1.9, 2.2, 2.1]
    lr = [0.1 * (t + 1) for t in range(12)]
    regime = sk.classify_regime(dip, lr, 2.0)
    assert (regime.name, regime.crossing) == ("C1", 10)
    assert regime.trend == pytest.approx(2.2)


def test_persistence_is_the_share_of_later_steps_near_the_threshold() -> None:
    sharpness = [1.0] * 9 + [2.5, 2.0, 2.7, None, 1.0, 1.7]
    regime = sk.classify_regime(sharpness, [1.0] * 15, 2.0)
    assert regime.crossing == 9
    assert regime.persistence == pytest.approx(2 / 4)  # of 1.0, 1.35, 0.5, 0.85
    assert "50% of later steps near the threshold" in regime.evidence
    assert sk.classify_regime([1.0] * 9, [1.0] * 9, 2.0).persistence is None


def test_an_early_crossing_is_not_confident() -> None:
    regime = sk.classify_regime([5.0, 4.5, 4.0], [0.1, 0.5, 0.5], 2.0)
    assert (regime.crossing, regime.confident) == (1, False)
    assert "only 1 measured steps before it: use a slower warmup" in regime.evidence
    assert "step 1" in regime.evidence


def test_gaps_are_skipped_and_nothing_measured_is_an_error() -> None:
    regime = sk.classify_regime([None, 2.0, NAN, None, 3.0, None], [0.1] * 6, 2.0)
    assert (regime.name, regime.trend, regime.crossing) == ("C1", 1.5, None)
    assert "at the end (no crossing)" in regime.evidence
    for nothing in ([None, NAN], [], [0.0, 1.0]):
        with pytest.raises(ValueError, match="must be positive, got"):
            sk.classify_regime(nothing, [0.1] * len(nothing), 2.0)


def descend(lr: float, steps: int) -> tuple[list[float], list[float]]:
    """Gradient descent on ``(u v)^2 / 2``: loss and exact sharpness of each step.

    Beyond ``lr * sharpness = 2`` and below about 4 it catapults: the loss grows, then ``u^2 + v^2`` shrinks.
    """
    theta = torch.tensor([2.0, 0.05], dtype=torch.float64)
    loss, sharpness = [], []
    for _ in range(steps):
        u, v = theta.tolist()
        hessian = torch.tensor([[v * v, 2 * u * v], [2 * u * v, u * u]], dtype=torch.float64)
        loss.append(0.5 * (u * v) ** 2)
        sharpness.append(float(torch.linalg.eigvalsh(hessian)[-1]))
        theta = theta - lr * torch.tensor([u * v * v, u * u * v], dtype=torch.float64)
    return loss, sharpness


def test_gradient_descent_beyond_the_edge_catapults_once() -> None:
    lr, steps = 0.65, 80  # initial sharpness 4, so lr * sharpness is 2.6
    loss, sharpness = descend(lr, steps)
    (only,) = sk.detect_catapults(loss, sharpness, [lr] * steps, 2.0)
    assert only.start == 0
    assert only.peak == max(range(steps), key=loss.__getitem__)
    assert only.loss_ratio > 5
    assert only.sharpness_drop > 0.2
    assert lr * sharpness[only.end] <= 2 < lr * sharpness[0]
    assert loss[only.end] <= loss[0]
    assert all(loss[t] > loss[0] or lr * sharpness[t] > 2 for t in range(1, only.end))


def test_gradient_descent_below_the_edge_does_not_catapult() -> None:
    loss, sharpness = descend(0.45, 80)
    assert sk.detect_catapults(loss, sharpness, [0.45] * 80, 2.0) == []
    regime = sk.classify_regime(sharpness, [0.45] * 80, 2.0)
    assert (regime.name, regime.crossing) == ("C3", None)
