"""What tracking costs: measured before the training without a trace, and told by every record."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import mlp, randomise
from torch import nn
from torch.profiler import ProfilerActivity, profile

import sharpkern as sk
from sharpkern.curvature.memory import memory_of
from sharpkern.rop import ReplayedProgram
from sharpkern.tracking import cost as cost_module


def noisy() -> nn.Module:
    """Batch norm and dropout: buffers that move, and masks that are drawn."""
    return randomise(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)))


def train(options: dict[str, Any], costs_at: set[int], seed: int) -> tuple[list[sk.Record], dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    model = noisy()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    tracker = sk.SharpnessTracker(model, F.cross_entropy, optimizer, **options)
    batches = [(torch.randn(12, 6), torch.randint(0, 3, (12,))) for _ in range(4)]
    records = []
    for step, batch in enumerate(batches):
        if step in costs_at:
            tracker.cost(batch if step == 0 else None)
        records.append(tracker.step(batch))
        optimizer.step()
    return records, {**model.state_dict(), "noise": torch.rand(3)}


@pytest.mark.parametrize("options", [{}, {"chunk": 5}], ids=["plain", "chunk"])
def test_a_run_is_the_same_to_the_bit_with_costs_asked_for(options: dict[str, Any], seed: int) -> None:
    python, numpy = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    without, with_costs = (train(options, at, seed) for at in (set[int](), {0, 2}))
    rows = [[{k: repr(v) for k, v in r.row().items()} for r in records] for records, _ in (without, with_costs)]
    assert rows[0] == rows[1]
    assert all(torch.equal(value, with_costs[1][name]) for name, value in without[1].items())
    assert random.getstate() == python and np.random.get_state()[1].tolist() == numpy  # noqa: NPY002


def test_cost_leaves_gradients_buffers_and_the_tracker_alone() -> None:
    model = noisy()
    tracker = sk.SharpnessTracker(model, F.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1))
    state, before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    versions = [t._version for t in (*model.parameters(), *model.buffers())]
    cost = tracker.cost((torch.randn(12, 6, generator=torch.Generator()), torch.zeros(12, dtype=torch.long)))
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert versions == [t._version for t in (*model.parameters(), *model.buffers())]
    assert torch.equal(torch.get_rng_state(), state)
    assert tracker.hessian is None and tracker.state_dict()["steps"] == 0
    assert cost.gradient.gradients == cost.gradient.memory == 1
    for part in (cost.gradient, cost.primal, cost.form, cost.product, cost.block):
        assert part.seconds > 0 and part.bytes > 0
        assert part.memory == part.bytes / cost.gradient.bytes
    assert cost.step(4) == cost.primal.gradients + cost.form.gradients + 4 * cost.product.gradients
    assert cost.step(0, beside=True) == pytest.approx(cost.step(0) + 1)
    lines = str(cost).splitlines()
    assert [line.split("  ")[0] for line in lines[1:6]] == [
        "forward and backward", "primal sweeps", "quadratic form", "product", "block of 3",
    ]  # fmt: skip
    assert f"{cost.product.gradients:.2f}" in lines[4]


@pytest.mark.parametrize(("took", "rounds"), [(5.0, 3), (0.25, 5), (0.0, 15)])
def test_rounds_are_few_where_they_are_long_and_the_first_two_do_not_count(took: float, rounds: int) -> None:
    """Two calls in a round, until two seconds are over: at least 3 rounds, at most 15, after two untimed ones."""
    calls: list[str] = []

    def call(name: str) -> float:
        calls.append(name)
        return 100.0 if len(calls) <= 4 else took  # what is recorded takes long

    seconds = cost_module._interleaved({name: lambda name=name: call(name) for name in "ab"})
    assert seconds == {"a": [took] * rounds, "b": [took] * rounds}
    assert calls == ["a", "b"] * (rounds + 2)


@pytest.mark.parametrize("where", ["probe", "loader"])
def test_products_of_a_probe_or_loader_are_what_is_priced(where: str) -> None:
    """The loader's product runs through ten batches of the step's size, gradients included."""
    problem = mlp()
    given = problem.batch if where == "probe" else [problem.batch] * 10
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, **{where: given})
    x, y = problem.batch
    cost = tracker.cost((x[:4], y[:4]))
    assert cost.product.gradients > (5 if where == "loader" else 0)


def test_what_cannot_be_priced_is_refused() -> None:
    problem = mlp()
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, torch.optim.SGD(problem.model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="pass one"):
        tracker.cost()
    x, y = problem.batch
    with pytest.raises(ValueError, match="cannot be cut into rows"):
        tracker.memory((x[:2], y[:1]))
    with pytest.raises(sk.NonFiniteLossError):
        tracker.cost((x * math.inf, y))


@pytest.mark.parametrize("recompute", [False, True])
def test_the_memory_of_one_example_is_measured(recompute: bool) -> None:
    model, loss_fn, (x, y) = deep(6, 40, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    need = sk.SharpnessTracker(model, loss_fn, optimizer, chunk=1, recompute=recompute).memory((x, y))
    assert need == memory_of(sk.HessianOperator(model, loss_fn, (x[:1], y[:1]), recompute=recompute))
    assert need.product > 4 * sum(p.numel() for p in model.parameters())


def deep(depth: int, width: int, rows: int) -> tuple[nn.Module, Any, Any]:
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())]
    batch = torch.randn(rows, width), torch.randn(rows, width)
    return nn.Sequential(*layers), F.mse_loss, batch


def profiled(call: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator held at once beyond those before, by torch's own profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    del result
    held = most = 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        held += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, held)
    return most


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # torch 2.11
@pytest.mark.parametrize("recompute", [False, True])
def test_memory_is_what_torchs_profiler_counts(recompute: bool) -> None:
    model, loss_fn, batch = deep(6, 64, 2048)
    H = sk.HessianOperator(model, loss_fn, batch, recompute=recompute)
    memory, v = memory_of(H), torch.randn(1, H.n)
    gradient = profiled(lambda: torch.autograd.grad(loss_fn(model(batch[0]), batch[1]), list(model.parameters())))
    assert memory.gradient == pytest.approx(gradient, rel=0.02)

    def product() -> torch.Tensor:
        engine = ReplayedProgram(H.engine.program.anew())
        engine.forward(H.module, list(batch))
        engine.backward()
        return engine.hvp(v)

    assert memory.product == pytest.approx(profiled(product), rel=0.15)


def test_recomputing_a_deep_network_needs_little_more_than_its_gradient() -> None:
    work = deep(32, 16, 1024)
    kept, again = (memory_of(sk.HessianOperator(*work, recompute=recompute)) for recompute in (False, True))
    assert kept.gradient == again.gradient
    assert again.product <= 0.4 * kept.product
    assert again.product <= 1.2 * again.gradient


@pytest.mark.parametrize("chunk", [None, 256])
def test_a_forecast_from_a_quarter_is_what_the_whole_needs(chunk: int | None) -> None:
    work = deep(6, 16, 512)
    tracker = sk.SharpnessTracker(*work[:2], torch.optim.SGD(work[0].parameters(), lr=0.1), chunk=chunk)
    cost, forecast = tracker.cost(work[2]), tracker.memory(work[2])
    for name in ("gradient", "primal", "form", "product", "block"):
        assert getattr(forecast, name) == pytest.approx(getattr(cost, name).bytes, rel=0.1), name


def test_records_say_what_a_step_took() -> None:
    problem = mlp()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.05)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, every=2)
    records = [tracker.step(problem.batch) for _ in range(6)]
    assert math.isnan(records[0].gradients) and all(r.seconds > 0 and r.gradients > 0 for r in records[1:])
    measured, carried = sum(r.seconds for r in records[2::2]), sum(r.seconds for r in records[1::2])
    assert measured > carried
    assert not {"seconds", "gradients"} & records[1].row().keys()
    later = tracker.observe(problem.batch)
    assert later.seconds > 0
