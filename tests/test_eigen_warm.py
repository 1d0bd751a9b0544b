"""The warm solver on slowly turning matrices: accuracy, products, crossings, several eigenvalues, resuming."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from matrices import F64, Dense, prescribed, with_top

from sharpkern.eigen import WarmLanczos, lanczos


def turning(steps: int, angle: float = 0.02, n: int = 90, *top: float) -> Iterator[torch.Tensor]:
    """Matrices of one spectrum whose eigenvectors turn by a fixed rotation each step."""
    values = with_top(*(top or (3.0, 2.7, 2.0)), n=n)
    skew = torch.randn(n, n, dtype=F64)
    step = torch.matrix_exp(angle * (skew - skew.T) / math.sqrt(n))
    A = prescribed(values)
    for _ in range(steps):
        yield A
        A = step @ A @ step.T
        A = (A + A.T) / 2


@pytest.mark.parametrize("k", [1, 3])
def test_follows_a_turning_matrix_for_few_products(k: int) -> None:
    solver, spent = WarmLanczos(k, tol=0.01), []
    for A in turning(60):
        op = Dense(A)
        result = solver.step(op)
        truth = torch.linalg.eigvalsh(A).flip(0)[:k]
        assert result.converged
        assert bool(((result.eigenvalues - truth).abs() <= 0.01 * truth).all())
        V, theta = result.eigenvectors, result.eigenvalues
        actual = torch.linalg.vector_norm(V @ A - theta[:, None] * V, dim=1)
        assert bool(((actual - result.residual_norms).abs() <= 1e-10).all())
        assert result.matvecs == op.products
        spent.append(result.matvecs)
    cold = lanczos(Dense(A), k, tol=0.01).matvecs
    assert sum(spent[1:]) / 59 <= 0.5 * cold


def test_a_period_of_two_costs_little_more_than_standing_still() -> None:
    a, b = turning(2, 0.3, 90, 3.0, 2.0, 1.5)

    def products(*cycle: torch.Tensor) -> int:
        solver = WarmLanczos(tol=0.01)
        return sum([solver.step(Dense(cycle[t % len(cycle)])).matvecs for t in range(60)][30:])

    assert products(a, b) <= products(a) + 15


@pytest.mark.parametrize("k", [1, 2])
def test_crossing_eigenvalues_are_noticed(k: int) -> None:
    Q = torch.linalg.qr(torch.randn(80, 80, dtype=F64))[0]
    solver, late = WarmLanczos(k, tol=0.01), 0
    for t in range(80):
        values = torch.cat([torch.tensor([2.0, 1.2 + 0.03 * t], dtype=F64), 0.5 * torch.linspace(-1, 1, 78, dtype=F64)])
        theta = solver.step(Dense(Q * values @ Q.T)).eigenvalues
        late += bool((theta < 0.98 * values[:2].sort(descending=True).values[:k]).any())
    assert late <= 10  # the sentinel comes every 8 steps


def test_catapults_are_seen_in_their_own_step() -> None:
    """The top falls by 50 to 90% in one step, below the next ones or among them, while all vectors turn by some 30
    degrees: 95% of the drop is in that step's value.
    """
    seen = 0
    for _ in range(40):
        values = with_top(3.0, 1.3, 1.2, n=50)
        skew = torch.randn(50, 50, dtype=F64)
        calm, thrown = (torch.matrix_exp(angle * (skew - skew.T) / 50**0.5) for angle in (0.02, 0.35))
        A, solver = prescribed(values), WarmLanczos(tol=0.01)
        for _ in range(int(torch.randint(3, 12, ()))):
            before = float(solver.step(Dense(A)).eigenvalues[0])
            A = calm @ A @ calm.T
        theta, Q = torch.linalg.eigh(A)
        theta[-1] *= 0.1 + 0.4 * float(torch.rand(()))
        A = thrown @ (Q * theta @ Q.T) @ thrown.T
        top = float(theta.max())
        after = float(solver.step(Dense(A)).eigenvalues[0])
        assert before == pytest.approx(3.0, rel=0.01)
        seen += abs(after - top) <= 0.05 * (before - top)
    assert seen >= 38


def test_an_extra_vector_leads_out_of_the_wrong_eigenvector() -> None:
    values = with_top(2.0, 1.5, 1.0, n=80)
    Q = torch.linalg.qr(torch.randn(80, 80, dtype=F64))[0]
    solver = WarmLanczos(tol=0.01)
    solver.step(Dense(Q * values @ Q.T))
    values[40] = 2.2  # a new top, orthogonal to all the solver knows, too small a change to look like a jump
    A = Q * values @ Q.T
    assert float(solver.step(Dense(A)).eigenvalues[0]) == pytest.approx(2.0, rel=0.01)
    assert float(solver.step(Dense(A), Q[:, 40][None]).eigenvalues[0]) == pytest.approx(2.2, rel=0.01)


def test_a_top_that_no_vector_of_the_solver_sees_is_found_by_the_audit() -> None:
    """Every 32 steps a random vector is multiplied and improved, whatever the residuals say."""
    values, solver = with_top(2.0, 1.5, 1.0, n=80), WarmLanczos(tol=0.01)
    solver.step(Dense(values.diag()))
    for kept in (solver._block[0], solver._next):  # nothing of it in what the solver knows; axes mix by no rounding
        kept[40] = 0.0
    values[40] = 2.6
    found = [float(solver.step(Dense(values.diag())).eigenvalues[0]) for _ in range(33)]
    assert found[0] == pytest.approx(2.0, rel=0.01)
    assert found[-1] == pytest.approx(2.6, rel=0.02)


def test_a_negative_top_is_followed_without_a_power_step() -> None:
    """One would turn the vector towards the lower end of the spectrum."""
    A = prescribed(torch.cat([torch.tensor([-1.0], dtype=F64), -2 - 8 * torch.rand(40, dtype=F64)]))
    solver = WarmLanczos(tol=0.05)
    before = float(solver.step(Dense(A)).eigenvalues[0])
    again = solver.step(Dense(A))
    assert solver.start_value == pytest.approx(before, rel=1e-9)
    assert again.converged
    # Far from converged, where a power step would change the value much.
    A = prescribed(torch.cat([torch.tensor([-1.0], dtype=F64), -2 - 8 * torch.rand(120, dtype=F64)]))
    solver = WarmLanczos(tol=1e-6)
    before = float(solver.step(Dense(A), at_most=4).eigenvalues[0])
    solver.step(Dense(A), at_most=4)
    assert solver.start_value == pytest.approx(before, rel=1e-9)


def test_a_prediction_learns_nothing_where_the_top_vector_is_another_one() -> None:
    values, solver = with_top(3.0, 2.0, 1.5, n=60), WarmLanczos(tol=0.01)
    Q = torch.linalg.qr(torch.randn(60, 60, dtype=F64))[0]
    for _ in range(4):
        solver.step(Dense(Q * values @ Q.T))
        Q[:, :2] = Q[:, :2] @ torch.tensor([[0.995, -0.0998749], [0.0998749, 0.995]], dtype=F64)
        Q = torch.linalg.qr(Q)[0]
    fitted = solver._normal, solver._right
    assert fitted[0] > 0
    other = Q.roll(30, 1)
    solver.step(Dense(other * values @ other.T), extra=other[:, :1].T)
    assert (solver._normal, solver._right) == fitted


def test_a_vector_whose_product_is_rounding_is_kept_as_it_is() -> None:
    """A step along its product would leave it for a vector of rounding errors."""
    for _ in range(12):  # half of the Ritz values are rounded to below zero
        solver = WarmLanczos(3, tol=0.01)
        result = solver.step(
            Dense(prescribed(torch.cat([torch.tensor([2.0, 1.0], dtype=F64), torch.zeros(60).double()])))
        )
        cosines = (solver._block * result.eigenvectors).sum(1)
        assert bool((cosines > 0.99).all())


def test_a_short_step_goes_on_where_the_last_one_stopped() -> None:
    A = prescribed(with_top(3.0, 2.0, 1.5, n=80))
    solver = WarmLanczos(tol=1e-6)
    first = solver.step(Dense(A), at_most=2)
    assert first.matvecs == 2 and not first.converged and "max_matvecs=2" in first.reason
    start = solver._block[0]
    values = [float(first.eigenvalues[0])]
    for _ in range(60):
        result = solver.step(Dense(A), at_most=2)
        assert result.matvecs <= 2
        values.append(float(result.eigenvalues[0]))
        if len(values) == 2:  # the first has no change to predict from
            assert solver.start_value == pytest.approx(float(start @ A @ start), rel=1e-12)
    assert values[-1] == pytest.approx(3.0, rel=1e-6)


def test_a_sentinel_without_products_stays_due() -> None:
    Q = torch.linalg.qr(torch.randn(80, 80, dtype=F64))[0]
    values = with_top(2.0, 1.5, 1.0, n=80)
    solver = WarmLanczos(tol=0.01)
    solver.step(Dense(Q * values @ Q.T))
    for _ in range(12):
        assert solver.step(Dense(Q * values @ Q.T), at_most=1).matvecs == 1
    assert solver.step(Dense(Q * values @ Q.T)).matvecs >= 3  # the step's own, and the sentinel's two


def test_state_continues_identically() -> None:
    matrices = list(turning(50))
    whole = WarmLanczos(2, tol=0.01)
    results = [whole.step(Dense(A)) for A in matrices]
    first = WarmLanczos(2, tol=0.01)
    for A in matrices[:20]:
        first.step(Dense(A))
    second = WarmLanczos(2, tol=0.01)
    second.load_state_dict(first.state_dict())
    for A, want in zip(matrices[20:], results[20:], strict=True):
        got = second.step(Dense(A))
        assert torch.equal(got.eigenvalues, want.eigenvalues)
        assert torch.equal(got.eigenvectors, want.eigenvectors)


def test_a_state_of_another_version_or_with_other_fields_is_refused_by_name() -> None:
    solver = WarmLanczos()
    solver.step(Dense(prescribed(with_top(3.0, 2.0, n=30))))
    state, other = solver.state_dict(), WarmLanczos()
    with pytest.raises(ValueError, match="state of WarmLanczos lacks gap, theta"):
        other.load_state_dict({name: v for name, v in state.items() if name not in ("theta", "gap")})
    with pytest.raises(ValueError, match="unknown fields: momentum"):
        other.load_state_dict(state | {"momentum": 1.0})
    for version in (1, 3):
        with pytest.raises(ValueError, match=f"must have version 2, got {version}"):
            other.load_state_dict(state | {"version": version})
    with pytest.raises(ValueError, match="must have version 2, got None"):
        other.load_state_dict({name: v for name, v in state.items() if name != "version"})
    assert other._block is None  # nothing was loaded by halves


def test_budget_and_wrong_arguments() -> None:
    A = prescribed(torch.linspace(0.9, 1, 60, dtype=F64))
    result = WarmLanczos(tol=1e-8, max_matvecs=5).step(Dense(A))
    assert not result.converged
    assert result.matvecs == 5
    assert "max_matvecs=5" in result.reason and result.reason.endswith("raise max_matvecs or tol.")
    with pytest.raises(ValueError, match="got 0, 0.01 and 80"):
        WarmLanczos(0)
    with pytest.raises(ValueError, match="at most n = 3, got 4"):
        WarmLanczos(4).step(Dense(A[:3, :3]))


def test_where_two_eigenvalues_are_closer_than_the_tolerance_the_bound_is_of_both() -> None:
    solver = WarmLanczos(2, tol=0.01)
    for A in turning(6, 0.02, 60, 2.0, 1.99, 1.5):
        result = solver.step(Dense(A))
        V, theta = result.eigenvectors, result.eigenvalues
        r = torch.linalg.vector_norm(V @ A - theta[:, None] * V, dim=1)
        rounding = 100 * torch.finfo(F64).eps * float(theta[0])
        assert float(result.error_bounds[0]) == pytest.approx(math.hypot(*r.tolist()) + rounding, abs=1e-12)
        assert float(result.error_bounds[1]) == pytest.approx(float(r[1]) + rounding, abs=1e-12)


def test_the_bound_covers_an_unresolved_top_whose_residual_does_not() -> None:
    Q = torch.linalg.qr(torch.randn(60, 60, dtype=F64))[0]
    values, solver = with_top(2.0, 1.98, 1.0, n=60), WarmLanczos(tol=0.01)
    order = values.argsort(descending=True)
    (first, second), rest = Q[:, order[:2]].T, Q[:, order[2]]
    solver.step(Dense(Q * values @ Q.T))
    # the top is now half of the second Ritz vector, whose other half is below the first
    A = Q * torch.where(values > 1.0, 0.0, values) @ Q.T
    up, down = (second + rest) / 2**0.5, (second - rest) / 2**0.5
    A = (
        A
        - torch.outer(rest, A @ rest)
        + sum(v * torch.outer(u, u) for v, u in ((2.0, first), (2.01, up), (1.95, down)))
    )
    result = solver.step(Dense((A + A.T) / 2))
    missing = 2.01 - float(result.eigenvalues[0])
    assert float(result.residual_norms[0]) < 0.9 * missing
    assert missing <= float(result.error_bounds[0]) <= 0.05


def test_a_hint_shortens_the_first_step() -> None:
    hinted = plain = 0
    for _ in range(10):
        A = prescribed(with_top(3.0, 2.4, 2.0, n=90))
        vectors = torch.linalg.eigh(A)[1]
        hint = 0.3 * vectors[:, -1:].T + torch.randn(1, 90, dtype=F64) / math.sqrt(90)
        result = WarmLanczos(tol=0.01).step(Dense(A), hint=hint)
        assert float(result.eigenvalues[0]) == pytest.approx(3.0, rel=0.01)
        hinted += result.matvecs
        plain += WarmLanczos(tol=0.01).step(Dense(A)).matvecs
    assert hinted <= 0.6 * plain


def test_a_hint_at_the_second_eigenvector_does_not_hide_the_first() -> None:
    A = prescribed(with_top(3.0, 2.0, 1.5, n=90))
    hint = torch.linalg.eigh(A)[1][:, -2:-1].T
    result = WarmLanczos(tol=0.01).step(Dense(A), hint=hint)
    assert float(result.eigenvalues[0]) == pytest.approx(3.0, rel=0.01)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_hint_without_a_length_counts_as_none(bad: float) -> None:
    A = prescribed(with_top(3.0, 2.4, 2.0, n=90))
    hint = torch.full((1, 90), bad, dtype=F64)
    with_hint, without = (WarmLanczos(tol=0.01).step(Dense(A), hint=h) for h in (hint, None))
    assert with_hint.matvecs == without.matvecs
    assert torch.equal(with_hint.eigenvalues, without.eigenvalues)


def test_a_hint_plays_no_part_for_several_eigenvalues() -> None:
    A = prescribed(with_top(3.0, 2.4, 2.0, n=90))
    hinted, plain = (WarmLanczos(2, tol=0.01).step(Dense(A), hint=h) for h in (torch.ones(1, 90, dtype=F64), None))
    assert hinted.matvecs == plain.matvecs
    assert torch.equal(hinted.eigenvalues, plain.eigenvalues)
