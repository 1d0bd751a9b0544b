"""``probe="auto"``: which examples it takes and how many, what its records say, and that training does not notice."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import Problem, dense_hessian, double, mlp
from torch import Tensor, nn

import sharpkern as sk
from sharpkern.tracking import probe as probe_module
from sharpkern.tracking.probe import fitted_probe


class Clock:
    """Time that passes where the package works: so much for any batch, and so much for each example."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, once: float = 0.2, each: float = 0.05) -> None:
        self.now, self.once, self.each = 0.0, once, each
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        for owner, name in ((sk.HessianOperator, "refresh"), (sk.HessianOperator, "_product")):
            monkeypatch.setattr(owner, name, self._slow(getattr(owner, name), name))

    def _slow(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(operator: Any, *args: Any, **kwargs: Any) -> Any:
            batch = args[0] if name == "refresh" and args and args[0] is not None else operator.batch
            self.now += self.once + self.each * len(batch[0])
            return method(operator, *args, **kwargs)

        return run


def data(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 5).double(), torch.randn(rows, 3).double()


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def tracker_of(model: nn.Module, fraction: float = 0.5, **options: Any) -> tuple[sk.SharpnessTracker, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    options = {"budget": fraction, "probe": "auto", **options}
    return sk.SharpnessTracker(model, nn.MSELoss(), optimizer, **options), optimizer


@pytest.mark.parametrize("fraction", [0.1, 0.3, 1.1, 4.0])
@pytest.mark.parametrize("operators", [1, 2])
def test_the_probe_is_the_largest_that_every_fourth_step_pays_for(
    fraction: float, operators: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    model, batch = small(), data(200)
    make = lambda b: sk.HessianOperator(model, nn.MSELoss(), b)  # noqa: E731
    x, y = fitted_probe(make, batch, fraction=fraction, operators=operators, beside=False, chunk=None)
    cost = lambda m: (1 + 2 * operators) * (0.2 + 0.05 * m)  # noqa: E731  # primal sweeps, two products of each
    paid = [m for m in (16, 32, 64, 128, 200) if cost(m) <= 4 * fraction * (0.2 + 0.05 * 200) + 1e-9]
    m = max(paid, default=16)
    assert len(x) == m and torch.equal(x, batch[0][:m]) and torch.equal(y, batch[1][:m])
    batch[0].zero_()
    assert float(x.abs().min()) > 0  # a copy


def test_beside_a_loop_a_look_costs_the_batchs_own_gradient_too(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    model, batch = small(), data(200)
    options: dict[str, Any] = {"fraction": 0.5, "operators": 1, "chunk": None}
    make = lambda b: sk.HessianOperator(model, nn.MSELoss(), b)  # noqa: E731
    sizes = [len(fitted_probe(make, batch, beside=beside, **options)[0]) for beside in (False, True)]
    assert sizes == [128, 64]  # 20.4 and 10.2 seconds are paid; looks cost 0.6 + 0.15 m


def test_small_batches_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    model = small()
    made: list[int] = []

    def make(batch: Any) -> sk.HessianOperator:
        made.append(len(batch[0]))
        return sk.HessianOperator(model, nn.MSELoss(), batch)

    options: dict[str, Any] = {"fraction": 0.3, "operators": 1, "beside": False}
    assert len(fitted_probe(make, data(9), chunk=None, **options)[0]) == 9 and not made
    fitted_probe(make, data(100), chunk=8, **options)
    assert made == [8]  # nothing larger is run
    parts = sk.MicroBatches([data(40), data(40)])
    assert torch.equal(fitted_probe(make, parts, chunk=None, **options)[0], parts.batches[0][0][:16])


def test_batches_of_other_forms() -> None:
    ids, mask = torch.arange(60).view(20, 3), torch.ones(20, 3)
    for batch in (
        {"ids": ids, "more": (mask, None), "scale": 2.0, "temperature": torch.tensor(1.0)},
        ((ids, mask), (mask, ids)),
        UserDict({"ids": ids}),
    ):
        head = probe_module._head(dict(batch) if isinstance(batch, UserDict) else batch, 16)
        if isinstance(batch, tuple):
            assert torch.equal(head[0][0], ids[:16]) and torch.equal(head[1][1], ids[:16])
        else:
            assert torch.equal(head["ids"], ids[:16]) and head.get("scale", 2.0) == 2.0
    with pytest.raises(ValueError, match=r"tensors have lengths \[20, 3\]: they must have one row per example"):
        fitted_probe(lambda _: None, (ids, ids[:3]), fraction=0.3, operators=1, beside=False, chunk=None)


def test_records_are_of_the_probe_and_a_catapult_is_seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    model = small()
    x, y = data(400)
    tracker, optimizer = tracker_of(model, 0.2)
    seen, own, start = [], 0.0, 0.0
    for t in range(90):
        if t == 60:  # as a catapult does: another loss, other gradients, another sharpness
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(3.0)
        rows = torch.randperm(400)[:128]
        record = tracker.step((x[rows], y[rows]))
        probe = Problem(model, nn.MSELoss(), tracker.probe)
        if record.measured:
            values = torch.linalg.eigvalsh(dense_hessian(probe))
            assert float((values - record.sharpness).abs().min()) <= record.sharpness_error * (1 + 1e-6)
            assert record.sharpness <= float(values[-1]) * (1 + 1e-9)
        else:
            assert record.status == "carried" and record.matvecs == 0 and record.sharpness == seen[-1].sharpness
        seen.append(record)
        optimizer.step()
        if t == 0:
            start = clock.now
        own += (0.2 + 0.05 * 128) * (t > 0)
    assert seen[0].measured and seen[60].measured
    assert sum(r.measured for r in seen) < 60
    look = 5 * (0.2 + 0.05 * len(tracker.probe[0]))  # one on credit has four products
    assert clock.now - start - own <= 0.2 * own + 20 * look


@pytest.mark.parametrize("kind", ["dropout", "batch norm"])
def test_training_is_as_without_a_tracker(kind: str) -> None:
    layer = nn.Dropout(0.3) if kind == "dropout" else nn.BatchNorm1d(6)
    model = nn.Sequential(nn.Linear(5, 6), layer, nn.Tanh(), nn.Linear(6, 3)).double()
    plain = copy.deepcopy(model)
    x, y = data(80)
    tracker, optimizer = tracker_of(model, 2.0)
    other = torch.optim.SGD(plain.parameters(), lr=0.05)
    torch.manual_seed(5)
    for t in range(12):
        rows = slice(40) if t % 2 else slice(40, 80)
        tracker.step((x[rows], y[rows]), certify=t == 6)
        optimizer.step()
    after = torch.rand(1)
    torch.manual_seed(5)
    for t in range(12):
        rows = slice(40) if t % 2 else slice(40, 80)
        other.zero_grad()
        nn.functional.mse_loss(plain(x[rows]), y[rows]).backward()
        other.step()
    assert torch.equal(after, torch.rand(1))
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-12)


def test_a_probe_of_a_model_with_dropout_is_one_function() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)).double()
    probe, batch = data(10), data(20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    tracker = sk.SharpnessTracker(model, nn.MSELoss(), optimizer, probe=probe, tol=1e-6)
    found = [tracker.step(batch).sharpness for _ in range(5)]
    assert found == pytest.approx([found[0]] * 5, rel=1e-6)


def test_a_resumed_tracker_keeps_the_probe_and_continues_identically(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    model = small()
    x, y = data(200)
    tracker, optimizer = tracker_of(model, 0.4)

    def train(tracker: sk.SharpnessTracker, optimizer: Any, steps: range) -> list[sk.Record]:
        records = []
        for t in steps:
            rows = torch.arange(100) + (37 * t) % 100
            records.append(tracker.step((x[rows], y[rows])))
            optimizer.step()
        return records

    train(tracker, optimizer, range(20))
    torch.save({"tracker": tracker.state_dict(), "model": model.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = small()
    other.load_state_dict(state["model"])
    resumed, its = tracker_of(other, 0.4)
    resumed.load_state_dict(state["tracker"])
    assert torch.equal(resumed.probe[0], x[: len(resumed.probe[0])])
    tracker._left_at = None  # the resumed one does not know what the last step took
    assert train(resumed, its, range(20, 45)) == train(tracker, optimizer, range(20, 45))
    fixed = tracker_of(other, 0.4, probe=(x[:16], y[:16]))[0]
    with pytest.raises(ValueError, match="unknown fields: probe"):
        fixed.load_state_dict(state["tracker"])
    with pytest.raises(ValueError, match="lacks probe"):
        resumed.load_state_dict(fixed.state_dict())


def test_beside_a_loop_the_alarm_comes_from_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    model = small()
    x, y = data(64)
    tracker, optimizer = tracker_of(model, 0.05)
    statuses = []
    for t in range(30):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y * (9.0 if t >= 25 else 1.0)).backward()
        statuses.append(tracker.observe((x, y * (9.0 if t >= 25 else 1.0))).status)
        optimizer.step()
    assert statuses[25] == "measured" and "carried" in statuses[1:25]


def test_user_given_probes_are_paced_and_other_operators_are_not() -> None:
    x, y = data(40)
    kinds = {
        "probe": {"probe": (x[:16], y[:16])},
        "own": {"probe": None},
        "loader": {"probe": None, "loader": [(x, y)]},
    }
    found = {name: type(tracker_of(small(), **o)[0]._following.budget).__name__ for name, o in kinds.items()}
    assert found == {"probe": "Pace", "own": "Budget", "loader": "Budget"}


def test_adam_and_several_eigenvalues() -> None:
    for k in (1, 3):
        problem = double(mlp())
        optimizer = torch.optim.Adam(problem.model.parameters(), lr=1e-3)
        tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, budget=3.0, probe="auto", k=k)
        for _ in range(8):
            record = tracker.step(problem.batch)
            optimizer.step()
            assert record.preconditioned_sharpness is not None and len(record.eigenvalues) == k


def test_refusals() -> None:
    with pytest.raises(ValueError, match="probe must be a batch, None, or with budget= \"auto\", got 'auto'"):
        tracker_of(small(), budget=None)
    with pytest.raises(ValueError, match="got 'first' with budget=0.5"):
        tracker_of(small(), probe="first")
    tracker, _ = tracker_of(small())
    with pytest.raises(ValueError, match="ask after that step"):
        tracker.cost(data(20))
    tracker.step(data(20))
    assert tracker.cost().product.seconds > 0
