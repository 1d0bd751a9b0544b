"""When a budget measures: what it can pay, and what the last solve says of forms."""

from __future__ import annotations

import math
import random

import pytest

from sharpkern.tracking.budget import Budget


def ready(fraction: float = 0.25, operators: int = 1) -> Budget:
    budget = Budget(fraction, 0.01, operators)
    assert budget.choose(1.0, 0.0, 0.0, None) == "measured"  # the first step is free
    budget.start(matvec_seconds=2.0, form_seconds=0.7)
    return budget


def test_moving_sharpness_gets_forms_until_they_prove_useless() -> None:
    budget = ready()
    seen = []
    for _ in range(30):
        seen.append(budget.choose(1.0, 0.1, 0.0, None))
        if seen[-1] == "bounded":
            budget.spent(0.7, 0, 0.0)
    assert seen.count("bounded") == int(30 * 0.25 / 0.7) and "measured" not in seen
    budget.shortfall, budget.purse = 0.2, 0.0
    seen = [budget.choose(1.0, 0.1, 0.0, None) for _ in range(16)]
    assert seen == ["carried"] * 15 + ["measured"]  # 16 quarters of a second pay for two products


def test_forms_that_have_cost_a_whole_solve_are_followed_by_one() -> None:
    budget = ready(fraction=1.0)
    seen = []
    for _ in range(80):
        seen.append(budget.choose(0.7, 0.1, 0.0, None))  # each step pays for one form
        if seen[-1] == "measured":
            break
        if seen[-1] == "bounded":
            budget.spent(0.7, 0, 0.0)
    forms = math.ceil(8 * 2.0 / 0.7)  # eight products are a whole solve
    assert seen[:forms] == ["bounded"] * forms
    saved = math.ceil(2 * 2.0 / 0.7)  # two products are the fewest
    assert seen[forms:] == ["carried"] * (saved - 1) + ["measured"]


@pytest.mark.parametrize("operators", [1, 2])
def test_a_solve_gets_the_matvecs_that_the_purse_pays(operators: int) -> None:
    budget = ready(operators=operators)
    budget.purse = 11.0
    assert budget.matvecs == 5
    budget.purse = -3.0
    assert budget.matvecs == 2
    for _ in range(60):
        budget.spent(3.0 * 4, 4 * operators, 0.0)
    assert budget.matvec_cost == pytest.approx(3.0)  # of all operators together


def test_spending_never_exceeds_what_was_saved() -> None:
    """Whatever the needs, costs as estimated: the purse goes below zero by no more than rounding."""
    rng = random.Random()
    budget, income, spent = ready(rng.uniform(0.1, 1.0)), 0.0, 0.0
    for _ in range(500):
        own = rng.uniform(0.5, 1.5)
        income += budget.fraction * own
        status = budget.choose(own, rng.choice([0.0, 0.1]), rng.choice([0.0, 0.5]), rng.choice([None, 0.5, 0.95]))
        if status == "measured":
            products = rng.randint(1, budget.matvecs)
            budget.spent(2.0 * products, products, rng.choice([0.0, 0.3]))
            spent += 2.0 * products
        elif status == "bounded":
            budget.spent(0.7, 0, 0.0)
            spent += 0.7
        assert spent <= income + 1e-6


def test_without_need_it_saves_for_two_whole_solves() -> None:
    budget = ready()
    seen = [budget.choose(1.0, 0.0, 0.0, None) for _ in range(400)]
    assert seen.index("measured") == 2 * 8 * 2 * 4 - 1  # two solves of 8 products of 2 s, at a quarter of a second
    assert budget.matvecs == 16


def test_a_saved_budget_continues_and_keeps_its_own_options() -> None:
    budget = ready(operators=2)
    budget.purse, budget.shortfall = 3.5, 0.2
    other = Budget(0.5, 0.03)
    other.load_state_dict(budget.state_dict())
    assert (other.purse, other.shortfall, other.operators, other.matvec_cost) == (3.5, 0.2, 2, 2.0)
    assert (other.fraction, other.tol) == (0.5, 0.03)
    state = budget.state_dict()
    with pytest.raises(ValueError, match="state of Budget lacks purse"):
        other.load_state_dict({name: v for name, v in state.items() if name != "purse"})
    with pytest.raises(ValueError, match="unknown fields: product_cost"):
        other.load_state_dict(state | {"product_cost": 1.0})
    with pytest.raises(ValueError, match="must have version 1, got 7"):
        other.load_state_dict(state | {"version": 7})
