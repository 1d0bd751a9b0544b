"""Suggested warmups: against what training with and without them does, and against independent counts."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sharpkern as sk
from sharpkern.warmup.trials import Probe, Trial, most_runs


def half_mean_squares(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * F.mse_loss(output, target)


def network(mup: bool = False, width: int = 64) -> nn.Module:
    """Three linear layers with ReLU: standard, or with the readout divided by the root of the width."""
    sizes = (20, width, width, 5)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    for i, layer in enumerate(layers):
        nn.init.normal_(layer.weight, 0.0, ((1 if i == 2 else 2) / layer.in_features) ** 0.5)
        nn.init.zeros_(layer.bias)
    if mup:
        layers[-1].weight.data.div_(width**0.5)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def images(examples: int = 120) -> tuple[Tensor, Tensor]:
    """Five overlapping classes of points with a decaying spectrum."""
    y = torch.randint(0, 5, (examples,))
    x = torch.randn(examples, 20) + 1.5 * torch.randn(5, 20)[y]
    return x / torch.arange(1, 21).sqrt(), F.one_hot(y, 5).float()


def train(model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer, schedule: Any, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = half_mean_squares(model(batch[0]), batch[1])
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        schedule.step()
    return losses


MAKE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.1),
}


@pytest.mark.parametrize("name", MAKE)
def test_the_suggestion_trains_and_costs_what_it_says(name: str) -> None:
    model, batch = network(), images()
    optimizer = MAKE[name](model.parameters())
    before = [*(p.detach().clone() for p in model.parameters()), torch.get_rng_state()]
    told: list[str] = []
    s = sk.suggest_warmup(model, half_mean_squares, batch, optimizer, probe_steps=32, on_run=told.append)
    after = [*model.parameters(), torch.get_rng_state()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert not optimizer.state and all(p.grad is None for p in model.parameters())

    truth = sk.preconditioned_sharpness(model, half_mean_squares, batch, optimizer, tol=1e-4).value
    assert s.sharpness == pytest.approx(truth, rel=0.01)
    exact = sk.critical_learning_rate(model, half_mean_squares, batch, optimizer, tol=1e-3, rise=1.0).value
    assert s.critical_lr == pytest.approx(exact, rel=0.08)
    assert 0 < s.lr_init <= s.lr_target <= s.lr_target_max
    assert 1 <= s.warmup_steps <= 32
    assert s.critical.forward_passes + 1 == s.forward_passes  # and the loss before training
    assert sum(t.steps for t in s.trials if t.fall > -1) + 10 < s.gradients <= sum(t.steps for t in s.trials) + 40
    assert s.matvecs > 32
    assert len(told) == 1 + len(s.trials) <= most_runs(32)
    assert all(f"{t.lr_target:.3g}" in words for words, t in zip(told[1:], s.trials, strict=True))
    for text in s.evidence.values():
        assert text in str(s)

    twin, other = copy.deepcopy((model, optimizer))
    schedule = sk.WarmupLR(other, s.lr_target, s.warmup_steps, lr_init=s.lr_init)
    losses = train(twin, batch, other, schedule, 40)
    trial = next(t for t in s.trials if (t.lr_target, t.warmup_steps, t.steps) == (s.lr_target, s.warmup_steps, 40))
    assert max(losses) / losses[0] == pytest.approx(trial.peak, rel=1e-3)
    assert max(losses) <= 2 * losses[0]
    assert losses[-1] < 0.5 * losses[0]


def test_a_spike_at_the_start_of_a_run_is_no_fall() -> None:
    """The loss before training is the same for all runs, and nothing of it is theirs."""
    model, (x, y) = network(), images(64)
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 64, 8)]
    probe = Probe(model, half_mean_squares, batches, torch.optim.SGD(model.parameters(), lr=0.1), steps=16)
    with torch.no_grad():
        before = sum(float(half_mean_squares(model(a), b)) for a, b in batches[:5]) / 5
    assert probe.before == pytest.approx(before, rel=1e-6)
    eta = 2 / sk.sharpness(model, half_mean_squares, (x, y)).value
    for target in (0.1 * eta, eta, 4 * eta, 8 * eta):
        trial = probe.run(target, target, 1)
        twin, losses = copy.deepcopy(model), []
        optimizer = torch.optim.SGD(twin.parameters(), lr=target)
        for i in range(20):
            loss = half_mean_squares(twin(batches[i % 8][0]), batches[i % 8][1])
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if trial.fall > -float("inf"):
            assert trial.fall == pytest.approx(1 - sum(losses[-5:]) / 5 / before, rel=1e-4)
            means = [sum(losses[i : i + 5]) / 5 for i in range(16)]
            assert trial.peak == pytest.approx(max(means) / before, rel=1e-4)
        else:
            assert not max(losses) < 99 * losses[0]


def test_the_runs_that_decide_are_longer_and_go_down_while_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short runs say 4; for four times as long it diverges, and 1 learns more than 2, and than 0.5."""
    falls = {(40, r): f for r, f in ((0.5, 0.3), (1.0, 0.5), (2.0, 0.55), (4.0, 0.6), (8.0, -math.inf))}
    falls |= {(160, r): f for r, f in ((0.5, 0.6), (1.0, 0.8), (2.0, -math.inf), (4.0, -math.inf))}
    probe = Probe(network(), half_mean_squares, [images()], torch.optim.SGD([torch.zeros(1)], lr=0.1), steps=32)
    monkeypatch.setattr(probe, "_run", lambda lr, start, n, steps: Trial(lr, start, n, 1.0, falls[steps, lr], steps))
    trials = [probe.run(lr, lr, 1) for lr in (1.0, 2.0, 4.0, 8.0, 0.5)]
    assert [(t.lr_target, t.steps) for t in probe.finals(trials)] == [(r, 160) for r in (4.0, 2.0, 1.0, 0.5)]
    falls[160, 4.0], falls[160, 2.0] = 0.9, 0.9
    assert [t.lr_target for t in probe.finals(trials)] == [4.0, 2.0]
    # Half of it was not tried: it gets the schedule of its double.
    assert [(t.lr_target, t.lr_init, t.steps) for t in probe.finals(trials[2:])] == [(4.0, 4.0, 160), (2.0, 2.0, 160)]


def test_a_warmup_that_is_too_short_for_a_longer_run_is_not_recommended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up runs: nothing trains at eta_c; a tenth of it does, and in long runs only after more than one step."""
    model, batch = network(), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    eta = sk.critical_learning_rate(model, half_mean_squares, batch, optimizer).value

    def run(self: Probe, target: float, start: float, warmup: int, steps: int) -> Trial:
        fall = -math.inf if target > 0.2 * eta else 0.8 - 0.1 * abs(math.log(target / (0.1 * eta)))
        return Trial(target, start, warmup, 1.0, fall / 2 if warmup == 1 and steps > 80 else fall, steps)

    monkeypatch.setattr(Probe, "_run", run)
    s = sk.suggest_warmup(model, half_mean_squares, batch, optimizer, probe_steps=64)
    assert s.warmup_steps == 16
    assert s.lr_init == pytest.approx(s.lr_target / 10)
    assert "1 steps held, but learnt less in 320" in s.evidence["warmup_steps"]
    assert [t for t in s.trials if (t.warmup_steps, t.steps) == (1, 320)]


def test_standard_parameterisation_needs_the_warmup_that_is_suggested() -> None:
    """For a target that kills the network at once, the suggested length trains it, and a quarter of it does worse."""
    for _ in range(3):
        model, batch = network(), images()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        lr_target = 24 / sk.sharpness(model, half_mean_squares, batch).value
        s = sk.suggest_warmup(model, half_mean_squares, batch, optimizer, probe_steps=64, lr_target=lr_target)
        assert s.lr_target == lr_target
        peaks = {}
        for length in (1, s.warmup_steps):
            twin, other = copy.deepcopy((model, optimizer))
            start = s.lr_init if length > 1 else lr_target
            losses = train(twin, batch, other, sk.WarmupLR(other, lr_target, length, lr_init=start), 80)
            peaks[length] = max(x if x == x else float("inf") for x in losses) / losses[0]
        if "none held" in s.evidence["warmup_steps"]:
            assert min(peaks.values()) > 1.9
        elif s.warmup_steps > 1:
            assert peaks[1] > 2.1 > peaks[s.warmup_steps]
        else:
            assert peaks[1] < 2.1


def test_a_small_target_needs_no_warmup() -> None:
    model, batch = network(), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    eta = sk.critical_learning_rate(model, half_mean_squares, batch, optimizer).lower
    s = sk.suggest_warmup(model, half_mean_squares, batch, optimizer, probe_steps=16, lr_target=0.3 * eta)
    assert (s.warmup_steps, s.lr_init) == (1, s.lr_target)
    assert "no warmup is needed" in s.evidence["lr_init"]


def test_a_target_beyond_everything_is_named_as_such() -> None:
    model, batch = network(), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    s = sk.suggest_warmup(model, half_mean_squares, batch, optimizer, probe_steps=16, lr_target=1e5)
    assert "above the largest sensible one" in s.evidence["lr_target"]
    assert "none held" in s.evidence["warmup_steps"]


def test_groups_keep_their_ratio() -> None:
    """Twice the rate for every group is half the suggested rates."""
    model, batch = network(), images()
    found = []
    for scale in (1.0, 2.0):
        groups = [
            {"params": model[0].parameters(), "lr": 0.1 * scale},
            {"params": model[2:].parameters(), "lr": 0.2 * scale},
        ]
        found.append(sk.suggest_warmup(model, half_mean_squares, batch, torch.optim.SGD(groups, lr=0.1), probe_steps=8))
    assert found[0].critical_lr == pytest.approx(found[1].critical_lr)
    assert found[0].lr_target == pytest.approx(found[1].lr_target)
    one = sk.suggest_warmup(model, half_mean_squares, batch, torch.optim.SGD(model.parameters(), lr=0.1), probe_steps=8)
    assert one.critical_lr > 1.1 * found[0].critical_lr  # most parameters move twice as far there


def test_loaders_lists_and_single_batches() -> None:
    model = network()
    x, y = images(64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    s = sk.suggest_warmup(model, half_mean_squares, loader, optimizer, probe_steps=8, batches=3)
    assert "the mean of 3 batch(es)" in s.evidence["sharpness"]
    listed = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]
    s = sk.suggest_warmup(model, half_mean_squares, listed, optimizer, probe_steps=8)
    values = [sk.sharpness(model, half_mean_squares, b, tol=1e-4).value for b in listed]
    assert s.sharpness == pytest.approx(sum(values) / 4, rel=0.01)
    with pytest.raises(ValueError, match="can be read only once"):
        sk.suggest_warmup(model, half_mean_squares, iter(listed), optimizer)
    for nothing in ([], 3):
        with pytest.raises(ValueError, match="data must be a DataLoader, a list of batches, or one batch, got"):
            sk.suggest_warmup(model, half_mean_squares, nothing, optimizer)


def test_adam_learns_what_a_gradient_start_would_do() -> None:
    model, batch = network(), images()
    optimizer = torch.optim.Adam(model.parameters())
    s = sk.suggest_warmup(model, half_mean_squares, batch, optimizer, probe_steps=8)
    gi = sk.preconditioned_sharpness(model, half_mean_squares, batch, sk.GIAdam(model.parameters()), tol=1e-4).value
    said = s.evidence["sharpness"].partition("GI-Adam would start at ")[2].split(",")[0]
    assert float(said) == pytest.approx(gi, rel=0.01)
    assert s.regime.name == "C2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probe_steps": 4}, "probe_steps must be at least 8 and batches at least 1, got 4 and 4"),
        ({"batches": 0}, "got 64 and 0"),
        ({"lr_target": 0.0}, "lr_target must be positive and finite, got 0.0"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=message):
        sk.suggest_warmup(model, half_mean_squares, images(), torch.optim.SGD(model.parameters(), lr=0.1), **options)


def test_hopeless_problems_say_why() -> None:
    model, (x, y) = network(), images()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"the sharpness is -?[0-9.e-]+, not positive"):
        sk.suggest_warmup(model, lambda o, t: 0 * (o - t).square().mean(), (x, y), sgd)
    with pytest.raises(sk.NonFiniteLossError):
        sk.suggest_warmup(model, half_mean_squares, (x * float("nan"), y), sgd)
    with pytest.raises(TypeError, match="no stability threshold is known for ASGD"):
        sk.suggest_warmup(model, half_mean_squares, (x, y), torch.optim.ASGD(model.parameters()))
