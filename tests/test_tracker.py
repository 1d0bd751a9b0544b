"""SharpnessTracker against dense matrices, along real training runs."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import Problem, dense_hessian, double, loss_and_gradient, mlp
from problems import relative as error
from torch import nn

import sharpkern as sk
from sharpkern.kernels.precision import within_tf32_products


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    return {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.3),
        "momentum": lambda: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "adam": lambda: torch.optim.Adam(model.parameters(), lr=0.01),
        "gi-adam": lambda: sk.GIAdam(model.parameters(), lr=0.01),
    }[name]()


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "gi-adam"])
def test_records_agree_with_dense_truth_at_every_step(name: str) -> None:
    problem = double(mlp())
    optimizer = optimizer_of(name, problem.model)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, tol=1e-4)
    for step in range(1, 9):
        loss, gradient = loss_and_gradient(problem)
        dense = dense_hessian(problem)
        rec = tracker.step(problem.batch)
        assert rec.step == step and rec.measured and rec.converged
        assert abs(rec.loss - float(loss)) <= 1e-10 * abs(rec.loss)
        assert abs(rec.grad_norm - float(gradient.detach().norm())) <= 1e-10 * rec.grad_norm
        got = torch.cat([p.grad.flatten() for p in problem.model.parameters()])
        assert error(got, gradient.detach()) <= 1e-10
        top = float(torch.linalg.eigvalsh(dense)[-1])
        assert abs(rec.sharpness - top) <= 1e-4 * top
        optimizer.step()
        if name in ("adam", "gi-adam"):  # P of the step just taken is in the optimizer's state now
            s = sk.preconditioner(optimizer).inv_sqrt(list(problem.model.parameters()))
            top = float(torch.linalg.eigvalsh(s[:, None] * dense * s)[-1])
            assert abs(rec.preconditioned_sharpness - top) <= 1e-4 * top
        else:
            assert rec.preconditioned_sharpness is None
        kappa = {"sgd": 2.0, "momentum": 3.8, "adam": 38.0, "gi-adam": 38.0}[name]
        assert rec.threshold == pytest.approx(kappa / rec.lr)
        assert rec.ratio == pytest.approx(rec.lr * top / kappa, rel=2e-4)


def test_training_with_the_tracker_equals_training_without() -> None:
    tracked = double(mlp())
    plain = Problem(copy.deepcopy(tracked.model), tracked.loss_fn, tracked.batch)
    first, second = optimizer_of("adam", tracked.model), optimizer_of("adam", plain.model)
    tracker = sk.SharpnessTracker(tracked.model, tracked.loss_fn, first)
    for _ in range(6):
        tracker.step(tracked.batch)
        first.step()
        second.zero_grad()
        plain.loss_fn(plain.model(plain.batch[0]), plain.batch[1]).backward()
        second.step()
    for p, q in zip(tracked.model.parameters(), plain.model.parameters(), strict=True):
        assert error(p.detach(), q.detach()) <= 1e-9


def test_warm_start_spends_fewer_products_than_a_cold_one() -> None:
    problem = double(mlp())
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.05)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, tol=0.01)
    warm = []
    for _ in range(10):
        warm.append(tracker.step(problem.batch).matvecs)
        optimizer.step()
    cold = sk.sharpness(problem.model, problem.loss_fn, problem.batch, tol=0.01).matvecs
    assert sum(warm[1:]) / 9 <= 0.7 * cold
    assert tracker.hessian.products == sum(warm)


def test_every_skips_steps_and_carries_the_value() -> None:
    problem = double(mlp())
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, every=3)
    records = []
    for _ in range(7):
        records.append(tracker.step(problem.batch))
        optimizer.step()
    assert [r.measured for r in records] == [True, False, False, True, False, False, True]
    assert [r.matvecs > 0 for r in records] == [r.measured for r in records]
    assert records[1].sharpness == records[0].sharpness != records[3].sharpness
    assert records[1].loss != records[0].loss


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_several_eigenvalues_and_the_overlaps_of_their_vectors(name: str) -> None:
    problem = double(mlp())
    optimizer = optimizer_of(name, problem.model)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, tol=1e-5, k=4)
    before = None
    for _ in range(5):
        dense = dense_hessian(problem)
        rec = tracker.step(problem.batch)
        optimizer.step()
        if name == "adam":
            s = sk.preconditioner(optimizer).inv_sqrt(list(problem.model.parameters()))
            dense = s[:, None] * dense * s
        values, vectors = (t.flip(-1) for t in torch.linalg.eigh(dense))
        assert error(torch.tensor(rec.eigenvalues, dtype=torch.float64), values[:4]) <= 1e-5
        assert rec.eigenvalues[0] == (rec.sharpness if name == "sgd" else rec.preconditioned_sharpness)
        if before is None:
            assert rec.overlaps is None
        elif float((values[:4] / values[1:5]).min()) > 1.05:  # the vectors are well defined
            want = torch.linalg.vector_norm(vectors[:, :4].T @ before, dim=1)
            assert torch.tensor(rec.overlaps, dtype=torch.float64).sub(want).abs().max() <= 0.02
        before = vectors[:, :4]


def test_probe_and_loader_are_measured_instead_of_the_steps_batch() -> None:
    problem = double(mlp())
    x, y = problem.batch
    parts = [(x[:5], y[:5]), (x[5:], y[5:])]
    probe = (x[:7], y[:7])
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=0.01)
    on_probe = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, tol=1e-5, probe=probe)
    on_all = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, tol=1e-5, loader=parts)
    for part in parts * 2:
        dense = [dense_hessian(Problem(problem.model, problem.loss_fn, b)) for b in (probe, problem.batch)]
        loss, gradient = loss_and_gradient(Problem(problem.model, problem.loss_fn, part))
        records = [tracker.step(part) for tracker in (on_probe, on_all)]
        optimizer.step()
        s = sk.preconditioner(optimizer).inv_sqrt(list(problem.model.parameters()))
        for rec, H in zip(records, dense, strict=True):
            assert rec.loss == pytest.approx(float(loss), rel=1e-10)
            assert rec.grad_norm == pytest.approx(float(gradient.detach().norm()), rel=1e-10)
            assert rec.sharpness == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-5)
            top = float(torch.linalg.eigvalsh(s[:, None] * H * s)[-1])
            assert rec.preconditioned_sharpness == pytest.approx(top, rel=1e-5)


def test_certified_step_bounds_the_sharpness_and_spends_forty_products_more() -> None:
    problem = double(mlp())
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.05)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, every=4)
    for step in range(1, 7):
        top = float(torch.linalg.eigvalsh(dense_hessian(problem))[-1])
        rec = tracker.step(problem.batch, certify=step == 3)
        optimizer.step()
        assert (rec.upper is not None) == (step == 3)
        if step == 3:
            assert rec.measured and rec.matvecs > 40
            assert rec.sharpness <= top * (1 + 1e-9) and top <= rec.upper


def test_certifying_leads_out_of_a_wrong_eigenvector() -> None:
    x = torch.diag(torch.tensor([3.0, 2.8, 1.0, 0.5, 0.1])).double()
    model = nn.Linear(5, 1, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    tracker = sk.SharpnessTracker(model, nn.MSELoss(), optimizer, tol=0.1)
    y = torch.randn(5, 1).double()
    tracker.step((x, y))
    curvature = tracker._following.followed["sharpness"]
    state = curvature.solver.state_dict()
    second = torch.eye(5, dtype=torch.float64)[1:2]
    curvature.solver.load_state_dict(state | {"block": second, "next": second[0], "theta": 2 / 5 * 2.8**2})
    assert tracker.step((x, y)).sharpness == pytest.approx(2 / 5 * 2.8**2)  # locked, with a residual of zero
    assert tracker.step((x, y), certify=True).sharpness == pytest.approx(2 / 5 * 9)
    assert tracker.step((x, y)).sharpness == pytest.approx(2 / 5 * 9)


def test_skipped_steps_doubt_the_carried_value() -> None:
    problem = double(mlp())
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.3)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, every=5)
    records = []
    for _ in range(20):
        records.append(tracker.step(problem.batch))
        optimizer.step()
    for before, after in zip(records[5:], records[6:], strict=False):
        if after.status == "carried":
            assert after.sharpness == before.sharpness and after.sharpness_error > before.sharpness_error


class Clock:
    """Time that passes only where the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("sharpkern.tracking.tracker.time.perf_counter", lambda: self.now)
        for owner, name, seconds in (
            (sk.HessianOperator, "refresh", 1.0),
            (sk.HessianOperator, "_product", 1.7),
            (sk.HessianOperator, "form_rows", 0.8),
        ):
            monkeypatch.setattr(owner, name, self._slow(getattr(owner, name), seconds))

    def _slow(self, method, seconds):
        def run(*args, **kwargs):
            self.now += seconds
            return method(*args, **kwargs)

        return run


@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_budget_is_kept_and_spent_where_the_sharpness_moves(fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    problem = double(mlp())
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.02)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, budget=fraction)
    tracker.step(problem.batch)
    start, records = clock.now, []
    for _ in range(240):
        records.append(tracker.step(problem.batch))
        optimizer.step()
        clock.now += 0.2
    own = 240 * 1.2
    assert clock.now - start <= own * (1 + 1.15 * fraction)
    seen = [r.status for r in records]
    assert {"measured", "bounded", "carried"} <= set(seen)
    assert all((r.matvecs > 0) == r.measured for r in records)
    assert clock.now - start >= own * (1 + 0.7 * fraction)  # nor is it left lying


def test_bounded_steps_report_the_rayleigh_quotient_of_the_last_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    problem = double(mlp())
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, budget=0.6)
    vector, bounded = None, 0
    for _ in range(60):
        dense = dense_hessian(problem)
        rec = tracker.step(problem.batch)
        optimizer.step()
        if rec.status == "bounded":
            bounded += 1
            assert rec.sharpness == pytest.approx(float(vector @ dense @ vector), rel=1e-9)
            assert rec.sharpness <= float(torch.linalg.eigvalsh(dense)[-1]) * (1 + 1e-9)
        vector = tracker._following.followed["sharpness"].vectors[0]
    assert bounded >= 5


def test_a_printed_record_is_short_and_its_repr_is_whole() -> None:
    record = sk.Record(
        step=3, loss=1 / 3, lr=0.1, grad_norm=2 / 3, sharpness=20000 / 3, sharpness_error=1e-9 / 3,
        preconditioned_sharpness=None, preconditioned_sharpness_error=None, threshold=20.0, ratio=float("nan"),
        matvecs=5, status="failed", converged=False, eigenvalues=(200 / 3, 1.0), overlaps=None, upper=None,
    )  # fmt: skip
    assert str(record) == (
        "Record(step=3, loss=0.3333, lr=0.1, grad_norm=0.6667, sharpness=6667, sharpness_error=3.333e-10, "
        "threshold=20, ratio=nan, matvecs=5, status=failed, converged=False, eigenvalues=[66.67, 1], seconds=0, "
        "gradients=nan)"
    )
    assert "loss=0.3333333333333333, " in repr(record)
    assert "upper=None" in repr(record)


def test_resumed_tracker_continues_identically(tmp_path) -> None:
    problem = mlp()
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=0.01)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer)
    for _ in range(3):
        tracker.step(problem.batch)
        optimizer.step()
    torch.save([problem.model.state_dict(), optimizer.state_dict(), tracker.state_dict()], tmp_path / "state.pt")
    first = []
    for _ in range(3):
        first.append(tracker.step(problem.batch))
        optimizer.step()
    model_state, optimizer_state, tracker_state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = mlp().model
    other.load_state_dict(model_state)
    optimizer = torch.optim.Adam(other.parameters(), lr=0.01)
    optimizer.load_state_dict(optimizer_state)
    tracker = sk.SharpnessTracker(other, problem.loss_fn, optimizer)
    tracker.load_state_dict(tracker_state)
    for want in first:
        assert tracker.step(problem.batch) == want
        optimizer.step()


def test_a_second_operator_does_not_change_what_is_found_of_the_first() -> None:
    problem, found = double(mlp()), []
    for make in (torch.optim.Adam, torch.optim.SGD):  # with and without P^-1 H besides the Hessian
        tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, make(problem.model.parameters()))
        found.append([tracker.step(problem.batch).sharpness for _ in range(40)])  # with an audit, which is random
    assert found[0] == found[1]


def test_a_state_of_another_version_or_with_other_fields_is_refused_by_name() -> None:
    problem = double(mlp())
    optimizer = optimizer_of("sgd", problem.model)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer)
    tracker.step(problem.batch)
    state = tracker.state_dict()
    with pytest.raises(ValueError, match="state of SharpnessTracker lacks budget"):
        tracker.load_state_dict({name: v for name, v in state.items() if name != "budget"})
    with pytest.raises(ValueError, match="version 2, got 3"):
        tracker.load_state_dict(state | {"version": 3})
    one = state["followed"]["sharpness"]
    for part, match in (
        ({name: v for name, v in one.items() if name != "speed"}, "state of a tracked operator lacks speed"),
        (one | {"pace": 1.0}, "unknown fields: pace"),
        (one | {"solver": one["solver"] | {"version": 0}}, "state of WarmLanczos must have version 2, got 0"),
    ):
        with pytest.raises(ValueError, match=match):
            tracker.load_state_dict(state | {"followed": {"sharpness": part}})


def test_batch_norm_statistics_advance_once_per_step() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = sk.SharpnessTracker(model, nn.MSELoss(), optimizer)
    batch = torch.randn(8, 4).double(), torch.randn(8, 2).double()
    for step in range(3):
        tracker.step(batch)
        optimizer.step()
        assert int(model[1].num_batches_tracked) == step + 1


def test_non_finite_loss_names_the_step_and_touches_nothing() -> None:
    model, loss_fn, (x, y) = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = sk.SharpnessTracker(model, loss_fn, optimizer)
    tracker.step((x, y))
    before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    with pytest.raises(sk.NonFiniteLossError, match="nan at step 2") as caught:
        tracker.step((x * float("nan"), y))
    assert caught.value.step == 2
    for p, (value, grad) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value) and torch.equal(p.grad, grad)


def test_zero_learning_rate_has_an_infinite_threshold() -> None:
    model, loss_fn, batch = mlp()
    tracker = sk.SharpnessTracker(model, loss_fn, torch.optim.SGD(model.parameters(), lr=0.0))
    rec = tracker.step(batch)
    assert rec.threshold == float("inf") and rec.ratio == 0.0


def test_optimizer_without_a_known_threshold_is_tracked_without_one() -> None:
    model, loss_fn, batch = mlp()
    with pytest.warns(UserWarning, match="Rprop"):
        tracker = sk.SharpnessTracker(model, loss_fn, torch.optim.Rprop(model.parameters()))
    rec = tracker.step(batch)
    assert rec.threshold is None and rec.ratio is None and rec.sharpness > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": 0.0}, "tol must lie between 0 and 1, got 0.0"),
        ({"tol": 1.0}, "tol must lie between 0 and 1, got 1.0"),
        ({"chunk": 0}, "chunk must be at least 1 example, got 0"),
        ({"every": 0}, "got 0, 1 and 80"),
        ({"k": 3, "max_matvecs": 2}, "got 1, 3 and 2"),
        ({"budget": 0.0}, "positive fraction of a step's time, got 0.0"),
        ({"probe": (torch.ones(1),), "loader": []}, "not both"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    model, loss_fn, _ = mlp()
    with pytest.raises(ValueError, match=message):
        sk.SharpnessTracker(model, loss_fn, torch.optim.SGD(model.parameters(), lr=0.1), **options)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_twin_adopts_a_step_and_carries_the_next_like_a_tracker_of_its_own(name: str) -> None:
    problem = double(mlp())
    first, second = (optimizer_of(name, problem.model) for _ in range(2))
    second.param_groups[0]["lr"] *= 0.37
    trackers = [
        sk.SharpnessTracker(problem.model, problem.loss_fn, o, every=5) for o in (first, second, second)
    ]  # fmt: skip
    with pytest.raises(RuntimeError, match="nothing to carry"):
        trackers[1].carry(1.0, 1.0)
    record, own = trackers[0].step(problem.batch), trackers[2].step(problem.batch)
    assert trackers[1].adopt(trackers[0], record) == own != record
    second.step()
    own = trackers[2].step(problem.batch)
    assert own.status == "carried"
    assert trackers[1].carry(own.loss, own.grad_norm) == own


def rounded_to_tf32(t: torch.Tensor) -> torch.Tensor:
    """Keep ten bits after the point, as TF32 does."""
    return ((t.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).to(t.dtype)


def test_tf32_rounding_is_measured_and_part_of_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that rounds its vector where a GPU would round all factors."""
    problem = double(mlp())
    product, modes = sk.HessianOperator._product, []

    def rounding(self: sk.HessianOperator, block: torch.Tensor) -> torch.Tensor:
        modes[-1] += ("T" if within_tf32_products() else "f") * len(block)
        return product(self, rounded_to_tf32(block) if within_tf32_products() else block)

    monkeypatch.setattr(sk.HessianOperator, "_product", rounding)
    optimizer = optimizer_of("sgd", problem.model)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, tol=0.005, tf32=True)
    for step in range(1, 37):
        modes.append("")
        dense = dense_hessian(problem) if step in (1, 2, 20, 33, 36) else None
        rec = tracker.step(problem.batch)
        assert rec.matvecs == len(modes[-1])
        # all of the first solve is exact; a comparison ends the first step and the 33rd
        assert modes[-1].strip("f") == "T" if step == 1 else modes[-1].count("f") == (step == 33)
        (curvature,) = tracker._following.followed.values()
        if dense is not None:
            assert abs(rec.sharpness - float(torch.linalg.eigvalsh(dense)[-1])) <= rec.sharpness_error
        if step in (1, 33):
            v = curvature.vectors[0]
            rounding_error = float((dense @ (rounded_to_tf32(v) - v)).norm())
            assert curvature.rounding * rec.sharpness == pytest.approx(rounding_error, rel=1e-6)
            measured = curvature.rounding
        # Between two comparisons the last one holds. How large it is, is a matter of the vector and of H.
        assert curvature.rounding == measured > 0
        whole = curvature.error_bound + curvature.rounding * rec.sharpness
        assert rec.sharpness_error == pytest.approx(whole, rel=1e-9)
        optimizer.step()


def test_tf32_needs_a_tolerance_above_its_rounding() -> None:
    problem = double(mlp())
    with pytest.raises(ValueError, match=r"tol must be at least 0.005 with tf32=True.*got 0.001"):
        sk.SharpnessTracker(*problem[:2], optimizer_of("sgd", problem.model), tol=0.001, tf32=True)
    sk.SharpnessTracker(*problem[:2], optimizer_of("sgd", problem.model), tol=0.005, tf32=True)
