"""Crossings, catapults and regimes in hand-made sequences and in gradient descent with a known catapult."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

import sharpkern as sk
from sharpkern.dynamics import Catapult, _smoothed

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


def test_every_stay_above_the_threshold_is_found() -> None:
    rng = np.random.default_rng()
    for _ in range(50):
        ratio = rng.uniform(0, 2, 40)
        up = [t for t in range(40) if ratio[t] > 1 and (t == 0 or ratio[t - 1] <= 1)]
        found = sk.crossings(ratio)
        assert [a for a, _ in found] == up
        for a, b in found:
            assert all(ratio[a : 40 if b is None else b] > 1)
            assert b is None or ratio[b] <= 1
    assert sk.crossings([0.5, 1.2, None, NAN, 0.9]) == [(1, 4)]
    assert sk.crossings([1.2, 3.0, 1.5], level=2.0) == [(1, 2)]
    assert sk.crossings([]) == []


def noisy_catapult(noise: float) -> tuple[np.ndarray, np.ndarray]:
    """One catapult from step 60 to about 85 in a minibatch run of 160 steps: a smooth bump and a lasting drop.

    The sharpness passes the threshold, 20, by a quarter, so that the noise decides nothing.
    """
    rng = np.random.default_rng()
    t = np.arange(160)
    bump = np.exp(-0.5 * ((t - 72) / 5) ** 2)
    loss = np.exp(-t / 120) * (1 + noise * rng.standard_normal(160)) + 1.5 * bump
    sharpness = np.interp(t, [0, 54, 60, 78], [13, 14, 25, 12])
    return loss, sharpness * (1 + noise * rng.standard_normal(160))


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_a_planted_catapult_is_found_in_minibatch_noise(noise: float) -> None:
    for _ in range(10):
        loss, sharpness = noisy_catapult(noise)
        found = sk.detect_catapults(loss, sharpness, np.full(160, 0.1), 2.0, smooth=9)
        (only,) = [c for c in found if c.loss_ratio > 1.5]
        assert len(found) <= 3
        assert 48 <= only.start <= 68
        assert abs(only.peak - 72) <= 4
        assert only.end is not None and 75 <= only.end <= 105
        assert 2.0 < only.loss_ratio < 5
        assert 0.1 < only.sharpness_drop < 0.5


def test_noise_alone_is_no_smoothed_catapult() -> None:
    """Noise about the threshold gives many catapults to the full-batch rule and none to the smoothed one."""
    rng = np.random.default_rng()
    raw = smooth = 0
    for _ in range(20):
        loss = np.exp(-np.arange(160) / 120) * (1 + 0.05 * rng.standard_normal(160))
        sharpness = 19 * (1 + 0.05 * rng.standard_normal(160))
        raw += len(sk.detect_catapults(loss, sharpness, [0.1] * 160, 2.0))
        smooth += len(sk.detect_catapults(loss, sharpness, [0.1] * 160, 2.0, smooth=9))
    assert raw > 20
    assert smooth == 0


def test_smoothing_keeps_a_divergence() -> None:
    loss = [1.0] * 10 + [2.0, 5.0, 30.0, math.inf]
    (only,) = sk.detect_catapults(loss, [30.0] * 13 + [None], [0.1] * 14, 2.0, smooth=3, min_drop=0.0)
    assert (only.end, only.loss_ratio, only.peak) == (None, math.inf, 13)
    with pytest.raises(ValueError, match="smooth must be at least 1, got 0"):
        sk.detect_catapults(loss, loss, loss, 2.0, smooth=0)
    with pytest.raises(ValueError, match="smooth must be at least 1, got 0"):
        sk.classify_regime([1.0], [1.0], 2.0, smooth=0)


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        np.array,
        lambda x: torch.tensor(x, dtype=torch.float64),
        pd.Series,
        lambda x: pd.Series(x, index=range(100, 100 + len(x))),
    ],
)
def test_columns_of_any_table_give_the_same(make) -> None:
    loss, sharpness = descend(0.65, 60)
    lr, kappa = [0.65] * 60, [2.0] * 60
    plain = sk.detect_catapults(loss, sharpness, lr, 2.0)
    assert plain
    assert sk.detect_catapults(make(loss), make(sharpness), make(lr), make(kappa)) == plain
    assert sk.classify_regime(make(sharpness), make(lr), 2.0) == sk.classify_regime(sharpness, lr, 2.0)
    ratio = [0.65 * s / 2 for s in sharpness]
    assert sk.crossings(make(ratio)) == sk.crossings(ratio)
    assert sk.edge_of_stability(make(ratio)) == sk.edge_of_stability(ratio)
    assert sk.training_outcome(make(loss)) == sk.training_outcome(loss)


def test_smoothing_lets_a_trend_be_seen_through_minibatch_noise() -> None:
    rng = np.random.default_rng()
    for name, trend in (("C1", np.linspace(1, 2, 120)), ("C2", np.linspace(1, 0.5, 120)), ("C3", np.ones(120))):
        for _ in range(10):
            noisy = trend * (1 + 0.1 * rng.standard_normal(120))
            regime = sk.classify_regime(noisy, np.linspace(0, 0.3, 120), 2.0, smooth=21)
            assert regime.name == name
            assert regime.trend == pytest.approx(trend[-1], rel=0.27)


def test_edge_of_stability_counts_what_was_planted() -> None:
    rng = np.random.default_rng()
    at, below = rng.uniform(0.82, 1.28, 70), rng.uniform(0.1, 0.7, 30)
    rest = rng.permutation(np.concatenate([at, below]))
    ratio = [*np.linspace(0.1, 0.99, 20), 1.1, *rest, None, NAN]
    found = sk.edge_of_stability(ratio)
    assert (found.fraction, found.steps) == (0.7, 100)
    assert found.above == (rest > 1).mean()
    assert found.median == np.median(rest)
    assert sk.edge_of_stability(ratio, start=0, low=0.0, high=math.inf).fraction == 1.0
    with pytest.raises(ValueError, match="no measured step from step 3 on, of 3"):
        sk.edge_of_stability([0.1, 0.2, 0.3])


def test_outcomes_that_were_planted() -> None:
    falling = [2.3 * 0.97**t for t in range(100)]
    assert sk.training_outcome(falling).name == "trained"
    for bad in (NAN, math.inf, None):
        outcome = sk.training_outcome([*falling[:40], bad, *falling[41:]])
        assert (outcome.name, outcome.step) == ("diverged", 40)
        assert "at step 40" in outcome.evidence
    assert sk.training_outcome([1.0, 2e5, 0.1], limit=1e5).step == 1
    assert sk.training_outcome([1.0, 2e5, 0.1]).name == "trained"
    stuck = [2.3, *[2.3 + 0.02 * math.sin(t) for t in range(200)]]
    assert sk.training_outcome(stuck).name == "failed"
    spike = [2.3, 1.0, 50.0, *[2.31] * 60]
    outcome = sk.training_outcome(spike)
    assert (outcome.name, outcome.step) == ("failed", None)
    assert "2.31, the mean of the last 6, and was 2.3" in outcome.evidence


def test_failure_by_accuracy_is_one_and_a_half_times_chance_over_a_window() -> None:
    rng = np.random.default_rng()
    for classes in (2, 10, 100):
        chance = 1 / classes
        for level, name in ((1.2, "failed"), (1.45, "failed"), (1.55, "trained"), (1.9, "trained")):
            accuracy = level * chance + rng.choice([-0.04, 0.04], 1) * chance * np.array([1, -1] * 25)
            got = sk.training_outcome(
                [1.0] * 50, accuracy=[*accuracy[:25], None, *accuracy[25:]], chance=chance, window=50
            )
            assert got.name == name
    # one lucky minibatch at the end does not rescue a failed run, as the last batch alone would
    assert sk.training_outcome([1.0] * 9, accuracy=[0.1] * 8 + [0.3], chance=0.1, window=9).name == "failed"
    assert sk.training_outcome([1.0] * 9, accuracy=[0.1] * 8 + [0.3], chance=0.1, window=1).name == "trained"


def test_outcomes_refuse_what_they_cannot_judge() -> None:
    with pytest.raises(ValueError, match="no loss"):
        sk.training_outcome([])
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        sk.training_outcome([1.0], window=0)
    for accuracy, chance in (([0.5], None), ([None], 0.1), ([0.5], 1.0)):
        with pytest.raises(ValueError, match="accuracy needs a measured value and a chance between 0 and 1"):
            sk.training_outcome([1.0], accuracy=accuracy, chance=chance)


def test_a_ratio_at_the_level_ends_a_stay_and_begins_none() -> None:
    assert sk.crossings([1.0, 1.2, 1.0, 1.0, 1.1]) == [(1, 2), (4, None)]


def test_a_loss_below_zero_must_fall_by_a_tenth_of_its_size() -> None:
    assert sk.training_outcome([-1.0, -1.05]).name == "failed"
    assert sk.training_outcome([-1.0, -1.15]).name == "trained"


def test_an_even_width_has_its_odd_step_ahead() -> None:
    assert _smoothed([1.0, 2.0, 4.0, 8.0], 2) == [1.5, 3.0, 6.0, 8.0]
    assert _smoothed([1.0, 2.0, 4.0, 9.0], 3) == [1.5, 7 / 3, 5.0, 6.5]
