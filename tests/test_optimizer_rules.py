"""The table: which class has which rule, what is refused and why, and who reads it. The rows have their own tests."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import optimizer_twins as twins
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

import sharpkern as sk
from sharpkern.optimizers import rules
from sharpkern.optimizers.next_update import next_update
from sharpkern.optimizers.preconditioner import is_adaptive
from sharpkern.optimizers.rules import table
from sharpkern.optimizers.threshold import minibatch_thresholds

F64 = torch.float64


class TwoWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.ones(1, dtype=F64)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0] * self.a + x[:, 1] * self.b


def test_the_tracker_sees_a_group_that_is_beyond_its_edge_from_the_step_its_rate_changes() -> None:
    model, batch = TwoWeights(), (torch.eye(2, dtype=F64), torch.zeros(2, dtype=F64))  # the loss is a^2 + b^2
    optimizer = torch.optim.SGD([{"params": [model.a]}, {"params": [model.b]}], lr=0.01)
    tracker = sk.SharpnessTracker(model, lambda out, y: (out - y).square().sum(), optimizer, every=50)
    record = tracker.step(batch)
    assert record.ratio == pytest.approx(0.01) and record.preconditioned_sharpness is None
    optimizer.param_groups[1]["lr"] = 1.5
    with pytest.raises(RuntimeError, match="nothing to carry"):
        tracker.carry(1.0, 1.0)
    for _ in range(3):
        record = tracker.step(batch)
        optimizer.step()
        assert record.ratio == pytest.approx(1.5) and record.sharpness == pytest.approx(2.0)
        assert record.preconditioned_sharpness == pytest.approx(300.0)
    optimizer.param_groups[1]["lr"] = 0.01
    record = tracker.step(batch)
    assert record.ratio == pytest.approx(0.01) and record.preconditioned_sharpness is None


def test_the_trackers_ratio_weighs_each_group_by_its_own_threshold() -> None:
    model = TwoWeights()
    batch = torch.diag(torch.tensor([1.0, 3.0], dtype=F64)), torch.zeros(2, dtype=F64)  # curvatures 2 and 18
    groups = [{"params": [model.a]}, {"params": [model.b], "momentum": 0.9}]  # thresholds 2 and 3.8
    tracker = sk.SharpnessTracker(
        model, lambda out, y: (out - y).square().sum(), torch.optim.SGD(groups, lr=0.01), tol=1e-6
    )
    assert tracker.step(batch).ratio == pytest.approx(0.01 * 18 / 3.8)


def test_a_little_weight_decay_on_a_part_needs_no_second_solve() -> None:
    p, q = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    usual = torch.optim.SGD([{"params": [p], "weight_decay": 5e-4}, {"params": [q]}], lr=0.1, momentum=0.9)
    assert not is_adaptive(usual)
    impossible = torch.optim.SGD([{"params": [p], "weight_decay": 30.0}, {"params": [q]}], lr=0.1)
    with pytest.raises(ValueError, match="weight decay alone makes a group unstable"):
        is_adaptive(impossible)


class Renamed(torch.optim.Adam):
    """A subclass with options of its own, and Adam's step."""


class Signed(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        return None


class Begun(torch.optim.RMSprop):
    def _init_group(self, *args: Any) -> Any:
        return super()._init_group(*args)


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_RULES", dict(table._RULES))


def test_a_subclass_follows_its_parent_only_while_it_leaves_the_step_alone() -> None:
    params = [nn.Parameter(torch.zeros(1))]
    assert rules.rule_of(Renamed(params)) is rules.rule_of(torch.optim.Adam(params))
    assert sk.stability_threshold(Renamed(params)) == pytest.approx(38)
    for cls, what in ((Signed, "Signed overrides step of Adam"), (Begun, "Begun overrides _init_group of RMSprop")):
        for read in (sk.stability_threshold, sk.preconditioner, is_adaptive):
            with pytest.raises(TypeError, match=rf"{what}, so no rule.*register\(cls, rule\)"):
                read(cls(params))


def test_a_registered_rule_is_used_everywhere(restored: None) -> None:
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    rules.register(Signed, rules.Rule(lambda group, first: 7.0, lambda step: step.gradient * 0 + 0.5))
    optimizer = Signed([w])
    assert sk.stability_threshold(optimizer) == 7.0
    assert sk.preconditioner(optimizer, gradients="next").diagonal().tolist() == [4.0, 4.0]
    optimizer.state[w] = {"exp_avg": torch.tensor([3.0, 4.0])}
    assert sk.optimizer_norms(optimizer)["m"] == 5.0


def test_norms_find_the_moments_that_the_table_names_and_adams_for_unknown_optimizers() -> None:
    for make, m, v in (
        (torch.optim.Adamax, "exp_avg", "exp_inf"), (torch.optim.NAdam, "exp_avg", "exp_avg_sq"),
        (torch.optim.Adagrad, "", "sum"),
    ):  # fmt: skip
        p = nn.Parameter(torch.zeros(3, dtype=F64))
        p.grad = torch.randn_like(p)
        optimizer = make([p])
        optimizer.step()
        got, state = sk.optimizer_norms(optimizer), optimizer.state[p]
        assert got["m"] == pytest.approx(float(state[m].norm()) if m else 0.0)
        assert got["v"] == pytest.approx(float(state[v].norm()))


def test_a_trainers_wrapper_is_looked_through_and_another_is_not() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer, self.state, self.param_groups = optimizer, optimizer.state, optimizer.param_groups

    wrapped = Wrapper(sk.GIAdam([nn.Parameter(torch.zeros(1))]))
    with pytest.raises(TypeError, match="Wrapper; supported"):  # a Lookahead holds an optimizer too
        sk.stability_threshold(wrapped)
    Wrapper.__module__ = "accelerate.optimizer"
    assert sk.stability_threshold(wrapped) == pytest.approx(38)
    (p,) = wrapped.param_groups[0]["params"]
    P = sk.preconditioner(wrapped, gradients={p: torch.ones(1)})
    assert float(P.diagonal()) == pytest.approx(0.1 / 0.001**0.5, rel=1e-4)  # GIAdam's, not Adam's


def test_the_allowed_rise_is_ten_times_smaller_for_adaptive_optimizers() -> None:
    p = [nn.Parameter(torch.zeros(1))]
    assert rules.rule_of(torch.optim.SGD(p)).rise == 0.1
    assert {rules.rule_of(make(p)).rise for make in (torch.optim.Adam, sk.GIAdam, torch.optim.RMSprop)} == {0.01}


READERS = (sk.stability_threshold, sk.preconditioner, is_adaptive)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (torch.optim.SparseAdam, "rows that had a gradient"), (torch.optim.ASGD, "a schedule of its own"),
        (torch.optim.LBFGS, "needs a closure"), (torch.optim.Rprop, "a sign times a step size"),
    ],
)  # fmt: skip
def test_what_can_have_no_rule_is_refused_with_the_reason(make: Any, reason: str) -> None:
    optimizer = make([nn.Parameter(torch.zeros(1))])
    for read in READERS:
        with pytest.raises(TypeError, match=f"is known for {make.__name__}: .*{reason}"):
            read(optimizer)


def test_an_unknown_class_is_refused_with_those_that_are_known() -> None:
    class Unheard(torch.optim.Optimizer):
        pass

    optimizer = Unheard([nn.Parameter(torch.zeros(1))], {})
    for read in READERS:
        with pytest.raises(TypeError, match=r"for Unheard; supported: SGD, Adam, .*transformers\.optimization\.Adafac"):
            read(optimizer)


def test_lion_and_muon_have_no_p_and_the_message_names_what_they_have() -> None:
    for make in (torch.optim.Muon, twins.Lion, twins.TimmLion):
        optimizer = make([nn.Parameter(torch.zeros(2, 2))])
        assert rules.rule_of(optimizer).geometry == ("spectral" if make is torch.optim.Muon else "sign")
        for read in READERS:
            with pytest.raises(TypeError, match="no diagonal preconditioner.*update_curvature.*generalised_sharpness"):
                read(optimizer)


def test_another_version_of_a_package_is_not_taken_for_the_one_known() -> None:
    """schedulefree before 1.3 has no ``scheduled_lr``, and puts eps elsewhere."""
    optimizer = twins.AdamWScheduleFree([nn.Parameter(torch.zeros(1))])
    assert rules.rule_of(copy.deepcopy(optimizer)).kappa is not None
    del optimizer.defaults["scheduled_lr"]
    with pytest.raises(TypeError, match=r"AdamWScheduleFree has other options.*\['scheduled_lr'\]"):
        sk.stability_threshold(optimizer)
    newer = twins.Lion([nn.Parameter(torch.zeros(1))])
    newer.defaults["cautious"] = True
    with pytest.raises(TypeError, match=r"Lion has other options.*\['cautious'\]"):
        rules.rule_of(newer)


def test_a_class_of_the_same_name_elsewhere_is_not_recognised() -> None:
    class Lion(twins.Lion):
        def step(self, closure: Any = None) -> None:
            """Something else."""

    optimizer = Lion([nn.Parameter(torch.zeros(1))])
    with pytest.raises(TypeError, match="Lion overrides step of Lion"):
        rules.rule_of(optimizer)


def test_groups_that_climb_and_descend_have_no_one_threshold() -> None:
    p, q = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    saddle = torch.optim.Adam([{"params": [p], "maximize": True}, {"params": [q]}])
    with pytest.raises(ValueError, match="maximize differs between parameter groups"):
        sk.stability_threshold(saddle)


@pytest.fixture(params=[1, 2])
def ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    """A process group in which other ranks exist in name only."""
    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def test_a_sharded_optimizer_is_looked_through_on_one_rank_and_refused_on_two(ranks: int) -> None:
    params = [nn.Parameter(torch.randn(3, dtype=F64)) for _ in range(4)]
    for p in params:
        p.grad = torch.randn_like(p)
    sharded = ZeroRedundancyOptimizer(params, optimizer_class=torch.optim.AdamW, lr=0.1)
    if ranks == 2:
        for read in (*READERS, lambda o: next_update(o, {p: p.grad for p in params})):
            with pytest.raises(TypeError, match="has no state for 2 of its parameters"):
                read(sharded)
        return
    plain = torch.optim.AdamW(params, lr=0.1)
    sharded.step()
    plain.step()
    sharded.param_groups[0]["weight_decay"] = plain.param_groups[0]["weight_decay"] = 0.5  # not handed on yet
    assert sk.stability_threshold(sharded) == sk.stability_threshold(plain)
    got, want = (sk.preconditioner(o, gradients="next").diagonal() for o in (sharded, plain))
    torch.testing.assert_close(got, want)
    mine, theirs = (next_update(o, {p: p.grad for p in params}) for o in (sharded, plain))
    for p in params:
        torch.testing.assert_close(mine[p], theirs[p])


def test_the_tracker_reports_no_threshold_where_there_is_none() -> None:
    model = nn.Linear(3, 2, bias=False).double()
    batch = torch.randn(5, 3, dtype=F64), torch.randn(5, 2, dtype=F64)
    for optimizer in (torch.optim.Muon(model.parameters()), twins.Lion(model.parameters())):
        with pytest.warns(UserWarning, match="reports no threshold: "):
            tracker = sk.SharpnessTracker(model, nn.functional.mse_loss, optimizer)
        record = tracker.step(batch)
        assert record.threshold is None and record.ratio is None and record.sharpness > 0


def test_plateaus_of_the_batch_sharpness_are_known_for_sgd_only() -> None:
    params = [nn.Parameter(torch.zeros(1))]
    assert minibatch_thresholds(torch.optim.SGD(params, lr=0.1)) == (2.0, 2.0)
    assert minibatch_thresholds(torch.optim.SGD(params, lr=0.1, momentum=0.9)) == pytest.approx((0.2, 3.8))
    for other in (torch.optim.Adam(params), torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True)):
        with pytest.raises(TypeError, match="known for SGD with one momentum"):
            minibatch_thresholds(other)
