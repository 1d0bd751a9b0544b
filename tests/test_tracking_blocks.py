"""SharpnessTracker with block products: against dense matrices, with its other options, and how it chooses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from problems import dense_hessian, double, mlp

import sharpkern as sk
from sharpkern.eigen import WarmBlockLanczos, WarmLanczos


def adam_or_sgd(name: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=0.01)
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(("name", "k", "block"), [("sgd", 1, 3), ("adam", 2, 3), ("sgd", 4, 2)])
def test_records_agree_with_dense_truth_at_every_step(name: str, k: int, block: int) -> None:
    problem = double(mlp())
    optimizer = adam_or_sgd(name, problem.model)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, tol=1e-4, k=k, block=block)
    spent = 0
    for _ in range(10):
        dense = dense_hessian(problem)
        rec = tracker.step(problem.batch)
        optimizer.step()
        spent += rec.matvecs
        assert rec.measured and rec.converged
        assert rec.sharpness == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-4)
        if name == "adam":
            s = sk.preconditioner(optimizer).inv_sqrt(list(problem.model.parameters()))
            dense = s[:, None] * dense * s
        values = torch.linalg.eigvalsh(dense).flip(0)[:k].tolist()
        assert list(rec.eigenvalues) == pytest.approx(values, rel=1e-4)
    assert tracker.hessian.products == spent


class Costs:
    """Time that passes only in products, by the number of vectors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, more: float) -> None:
        self.now, self.more = 0.0, more  # seconds for each vector after the first
        product = sk.HessianOperator._product

        def slow(operator: sk.HessianOperator, block: torch.Tensor) -> torch.Tensor:
            self.now += 1 + self.more * (len(block) - 1)
            return product(operator, block)

        monkeypatch.setattr("sharpkern.tracking.block_width.time.perf_counter", lambda: self.now)
        monkeypatch.setattr(sk.HessianOperator, "_product", slow)


@pytest.mark.parametrize(("more", "width"), [(0.39, 3), (0.41, 1)])  # blocks pay up to 1.8
def test_auto_takes_blocks_where_they_pay_and_keeps_to_it(
    more: float, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = Costs(monkeypatch, more)
    problem = double(mlp())
    optimizer = adam_or_sgd("adam", problem.model)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, block="auto")
    first = tracker.step(problem.batch)
    assert first.matvecs >= 20 and first.matvecs == tracker.hessian.products
    solvers = [f.solver for f in tracker._following.followed.values()]
    assert [type(s) for s in solvers] == [WarmBlockLanczos if width == 3 else WarmLanczos] * 2
    costs.more = 0.8 - more  # a resumed run does not measure again
    other = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, block="auto")
    other.load_state_dict(tracker.state_dict())
    for _ in range(4):
        optimizer.step()
        assert tracker.step(problem.batch) == other.step(problem.batch)


def test_resumed_tracker_continues_identically(tmp_path) -> None:
    problem = mlp()
    optimizer = adam_or_sgd("adam", problem.model)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, block=3)
    for _ in range(3):
        tracker.step(problem.batch)
        optimizer.step()
    torch.save([problem.model.state_dict(), optimizer.state_dict(), tracker.state_dict()], tmp_path / "state.pt")
    first = []
    for _ in range(12):  # with a product of the chain
        first.append(tracker.step(problem.batch))
        optimizer.step()
    model_state, optimizer_state, tracker_state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = mlp().model
    other.load_state_dict(model_state)
    optimizer = adam_or_sgd("adam", other)
    optimizer.load_state_dict(optimizer_state)
    tracker = sk.SharpnessTracker(other, problem.loss_fn, optimizer, block=3)
    tracker.load_state_dict(tracker_state)
    for want in first:
        assert tracker.step(problem.batch) == want
        optimizer.step()


def test_a_copy_goes_on_identically() -> None:
    problem = double(mlp())
    optimizer = adam_or_sgd("sgd", problem.model)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, block=3)
    for _ in range(3):
        tracker.step(problem.batch)
        optimizer.step()
    copies = [copy.deepcopy(tracker), pickle.loads(pickle.dumps(tracker))]  # noqa: S301
    want = [tracker.step(problem.batch) for _ in range(10)]
    for other in copies:
        assert [other.step(problem.batch) for _ in range(10)] == want


def test_a_state_of_another_block_is_refused() -> None:
    problem = double(mlp())
    optimizer = adam_or_sgd("sgd", problem.model)
    trackers = [sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, block=b) for b in (None, 3)]
    for tracker in trackers:
        tracker.step(problem.batch)
    with pytest.raises(ValueError, match=r"blocks of 3, and this tracker's are of 1: make it with the same block="):
        trackers[0].load_state_dict(trackers[1].state_dict())


def test_a_budget_stops_blocks_short_and_certificates_bound_them() -> None:
    problem = double(mlp())
    optimizer = adam_or_sgd("sgd", problem.model)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, budget=0.5, block=3)
    tracker.step(problem.batch)
    for purse in (2.0, 4.0, 7.0):
        optimizer.step()
        tracker._following.budget.matvec_cost, tracker._following.budget.purse = 1.0, purse
        tracker._following.choose = lambda *_, **__: "measured"
        rec = tracker.step(problem.batch)
        assert rec.measured and rec.matvecs <= purse
    top = float(torch.linalg.eigvalsh(dense_hessian(problem))[-1])
    rec = tracker.step(problem.batch, certify=True)
    assert rec.sharpness == pytest.approx(top, rel=1e-2) and top <= rec.upper and rec.matvecs > 40


def test_tf32_with_blocks_reports_what_it_rounds() -> None:
    problem = double(mlp())
    optimizer = adam_or_sgd("sgd", problem.model)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, tol=0.005, tf32=True, block=3)
    for _ in range(3):
        top = float(torch.linalg.eigvalsh(dense_hessian(problem))[-1])
        assert abs(tracker.step(problem.batch).sharpness - top) <= 0.005 * top
        optimizer.step()


@pytest.mark.parametrize("block", [0, -1, "always", True, 2.0])
def test_other_blocks_are_refused(block: object) -> None:
    problem = mlp()
    with pytest.raises(ValueError, match=f"block must be 'auto', None or a number of vectors, got {block!r}"):
        sk.SharpnessTracker(problem.model, problem.loss_fn, adam_or_sgd("sgd", problem.model), block=block)
