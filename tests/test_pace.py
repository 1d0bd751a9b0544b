"""When a budget looks at a fixed probe: evenly, on an alarm at once, and never for more than it has and may borrow."""

from __future__ import annotations

import math
import random

import pytest

from sharpkern.tracking.pace import Pace

LOOK = 3.0  # seconds of a look of two products, at a second each


def ready(fraction: float = 0.25) -> Pace:
    pace = Pace(fraction)
    pace.hear(1.0)
    assert pace.choose(1.0) == "measured"  # the first step is free
    pace.start(matvec_seconds=1.0, form_seconds=0.4)
    pace.spent(0.0, 0)
    pace.unit = 1.0
    return pace


def run(pace: Pace, norms: list[float]) -> list[int]:
    """Feed gradient norms, steps of a second each; return the products of each step."""
    products = []
    for norm in norms:
        pace.hear(norm)
        products.append(pace.matvecs if pace.choose(1.0) == "measured" else 0)
        if products[-1]:
            pace.spent(products[-1] + 1.0, products[-1])
    return products


def test_without_alarms_looks_are_evenly_spaced_at_the_price() -> None:
    seen = run(ready(0.25), [1.0] * 120)
    assert seen == ([0] * 11 + [2]) * 10  # a look costs 3 seconds, which 12 steps save


@pytest.mark.parametrize("factor", [10.0, 0.1])
def test_a_jump_is_looked_at_in_the_step_in_which_it_happens(factor: float) -> None:
    rng = random.Random()
    at = rng.randrange(40, 80)
    norms = [math.exp(rng.uniform(-0.05, 0.05)) * (factor if t >= at else 1.0) for t in range(160)]
    seen = run(ready(), norms)
    assert seen[at] >= 2
    # While it is paid back, at least every other look goes on.
    gaps = [t for t, n in enumerate(seen) if n]
    assert max(b - a for a, b in zip(gaps, gaps[1:], strict=False)) <= 2 * LOOK / 0.25


def test_a_catapult_is_looked_at_on_its_way_up_and_at_its_fall_and_so_is_a_second_one() -> None:
    up = [1.5**t for t in range(8)]
    seen = run(ready(), [1.0] * 30 + up + [1.0] * 10 + up + [1.0] * 60)
    for rise, fall in ((range(31, 38), 38), (range(49, 56), 56)):
        assert seen[fall], seen
        assert sum(seen[t] > 0 for t in rise) >= 1, seen


def test_a_noisy_gradient_is_no_alarm() -> None:
    rng = random.Random()
    pace = ready()
    run(pace, [math.exp(rng.uniform(-0.3, 0.3)) for _ in range(60)])  # learns what is usual
    pace.debt = 0.0
    seen = run(pace, [math.exp(rng.uniform(-0.3, 0.3)) for _ in range(200)])
    assert sum(n == 4 for n in seen) <= 12


def test_spending_never_exceeds_what_was_saved_and_twenty_looks() -> None:
    rng = random.Random()
    pace, income, spent = ready(rng.uniform(0.05, 2.0)), 0.0, 0.0
    for _ in range(600):
        own = rng.uniform(0.5, 1.5)
        income += pace.fraction * own
        pace.hear(math.exp(rng.uniform(-3, 3)))
        if pace.choose(own) == "measured":
            products = pace.matvecs
            pace.spent(products + 1.0, products)
            spent += products + 1.0
        assert spent <= income + 20 * LOOK + 5.0 + 1e-6  # the last look on credit has four products
    assert spent >= income - 10  # nor is it left lying


def test_savings_that_every_keeps_back_buy_longer_looks() -> None:
    pace = ready(0.5)
    for _ in range(3):
        pace.hear(1.0)
        assert pace.choose(20.0) == "measured"
        assert pace.matvecs == 8  # and no more is saved
        pace.spent(9.0, 8)


def test_gradients_that_say_nothing_ring_no_alarm() -> None:
    pace = ready()
    assert run(pace, [math.nan, 0.0, math.inf, 1.0]) == [0] * 4
    assert run(pace, [5.0])[0] == 4


def test_what_a_look_costs_is_learned_for_any_number_of_operators() -> None:
    pace = ready()
    pace.operators = 2
    for _ in range(60):
        pace.spent(2.0 * 4, 2 * 3)  # three products of both operators, and the primal sweeps
    assert pace.unit == pytest.approx(2.0)


def test_a_saved_pace_continues_identically_and_keeps_its_own_fraction() -> None:
    rng = random.Random()
    norms = [math.exp(rng.uniform(-0.5, 0.5)) for _ in range(100)]
    pace, other = ready(), Pace(0.25)
    run(pace, norms[:50])
    other.load_state_dict(pace.state_dict())
    assert run(other, norms[50:]) == run(pace, norms[50:])
    state = pace.state_dict()
    with pytest.raises(ValueError, match="state of Pace lacks debt"):
        other.load_state_dict({name: v for name, v in state.items() if name != "debt"})
    with pytest.raises(ValueError, match="must have version 1, got 2"):
        other.load_state_dict(state | {"version": 2})
