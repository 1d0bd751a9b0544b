"""Replayed sweeps give what the program's own sweeps give, wherever values, memory, modes and random numbers change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import PROBLEMS, Problem, double, hessian_times, loss_and_gradient, operator
from torch import Tensor, nn

import sharpkern as sk
from sharpkern.kernels.precision import tf32_products
from sharpkern.rop.recording import replayed, tape
from sharpkern.rop.recording.pool import Pool
from sharpkern.rop.rule import RULES, Rule


def agree(H: sk.HessianOperator, problem: Problem, k: int = 1) -> None:
    loss, gradient = loss_and_gradient(problem)
    assert float((H.loss - loss.detach()).abs()) <= 1e-12 * (1 + float(loss.detach().abs()))
    assert float((H.gradient - gradient.detach()).norm()) <= 1e-10 * float(gradient.detach().norm())
    for _ in range(2):  # the second is a replay
        V = torch.randn(k, H.n, dtype=H.dtype)
        want = hessian_times(problem, V)
        assert float((H.matmat(V.t()).t() - want).norm()) <= 1e-10 * float(want.norm())


def recordings(H: sk.HessianOperator) -> dict:
    return H._engine._recordings


@pytest.mark.parametrize("large", [0, 1 << 40], ids=["used in place", "copied"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_replays_follow_parameters_and_batches(name: str, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "_LARGE", large)
    problem = double(PROBLEMS[name]())
    H = operator(problem)
    for _ in range(3):
        agree(H, problem)
        agree(H, problem, k=3)
        with torch.no_grad():
            for p in problem.model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        other = double(PROBLEMS[name]()).batch
        problem = Problem(problem.model, problem.loss_fn, other)
        H.refresh(other)
    assert {"forward", "backward", "gradient", ("hvp", 1), ("hvp", 3)} <= recordings(H).keys()


@pytest.mark.parametrize("large", [0, 1 << 40], ids=["used in place", "copied"])
def test_blocks_of_large_activations_are_multiplied_one_vector_at_a_time(
    large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replayed, "_CACHED", 1000)
    monkeypatch.setattr(tape, "_LARGE", large)
    problem = double(PROBLEMS["mlp"]())
    H = operator(problem)
    agree(H, problem, k=3)
    V = torch.randn(H.n, 3, dtype=H.dtype)
    torch.testing.assert_close(H.quadratic_form(V), (V * (H @ V)).sum(0), rtol=1e-10, atol=1e-10)
    assert {key for key in recordings(H) if isinstance(key, tuple)} == {("hvp", 1), ("quadratic_form False", 1)}


def test_each_precision_has_its_own_recording() -> None:
    problem = double(PROBLEMS["mlp"]())
    H = operator(problem)
    agree(H, problem)
    with tf32_products():  # of no effect on the CPU
        agree(H, problem)
    assert {("hvp", 1), ("hvp, TF32", 1)} <= recordings(H).keys()


def test_recordings_of_block_sizes_seen_long_ago_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replayed, "_MAX_RECORDINGS", 5)
    problem = double(PROBLEMS["mlp"]())
    H = operator(problem)
    for k in (1, 2, 3, 4, 1):
        agree(H, problem, k=k)
    assert recordings(H).keys() == {"forward", "backward", "gradient", ("hvp", 4), ("hvp", 1)}


def test_parameters_that_move_in_memory_are_noticed() -> None:
    problem = double(PROBLEMS["mlp"]())
    H = operator(problem)
    for _ in range(6):  # more often than recordings are renewed
        agree(H, problem)
        for p in problem.model.parameters():
            p.data = p.data + 0.05 * torch.randn_like(p)
        H.refresh()
    agree(H, problem)
    assert not recordings(H)


def test_number_of_threads_may_change() -> None:
    problem, threads = double(PROBLEMS["mlp"]()), torch.get_num_threads()
    H = operator(problem)
    try:
        torch.set_num_threads(threads + 1)
        H.refresh()
        agree(H, problem)
    finally:
        torch.set_num_threads(threads)


def test_results_are_not_overwritten_by_the_next_product() -> None:
    H = operator(double(PROBLEMS["mlp"]()))
    loss, gradient = H.loss, H.gradient
    kept = loss.clone(), gradient.clone()
    v, w = torch.randn(2, H.n, dtype=H.dtype)
    H @ v
    first = H @ v
    copy = first.clone()
    H @ w
    with torch.no_grad():
        for p in H.params.values():
            p.mul_(0.9)
    H.refresh()
    assert torch.equal(first, copy)
    assert torch.equal(loss, kept[0])
    assert torch.equal(gradient, kept[1])


def test_each_refresh_draws_a_new_dropout_mask_that_its_products_share() -> None:
    model = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Dropout(0.5), nn.Linear(40, 2)).double()
    batch = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    H = sk.HessianOperator(model, nn.MSELoss(), batch)
    losses = set()
    for _ in range(4):
        v = torch.randn(H.n, dtype=H.dtype)
        assert torch.equal(H @ v, H @ v)
        losses.add(float(H.loss))
        H.refresh()
    assert len(losses) == 4


def test_batch_norm_statistics_move_once_per_refresh() -> None:
    norm = nn.BatchNorm1d(5, dtype=torch.float64)
    model = nn.Sequential(norm, nn.Linear(5, 2).double())
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    H = sk.HessianOperator(model, nn.MSELoss(), (x, y))
    other = nn.BatchNorm1d(5, dtype=torch.float64)
    for _ in range(3):
        H.refresh(update_buffers=True)
        H @ torch.randn(H.n, dtype=H.dtype)
        other(x)
    torch.testing.assert_close(norm.running_var, other.running_var, rtol=1e-12, atol=0)


@pytest.mark.parametrize("why", ["reads a value", "too large"])
def test_what_cannot_be_replayed_runs_as_it_is(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = double(PROBLEMS["mlp"]())
    if why == "too large":
        monkeypatch.setattr(tape, "_MAX_BYTES", 100)
    else:
        monkeypatch.setattr(tape, "_UNSIZED", (torch.Tag.pointwise,))
    H = operator(problem)
    agree(H, problem)
    H.refresh()
    agree(H, problem)
    assert not recordings(H)


@pytest.mark.parametrize("large", [0, 1 << 20], ids=["used in place", "copied"])
def test_recording_covers_calls_with_and_without_an_out_variant(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def computation(x: Tensor, out: Tensor) -> None:
        y = torch.zeros(4, 3).add_(x)  # memory that must be cleared each time
        values, order = torch.sort(y * 2, dim=0)
        out.copy_(torch.cat([values.t().reshape(-1), order.float().view(-1), torch.roll(y, 1).flatten()]))

    monkeypatch.setattr(tape, "_LARGE", large)
    x, out, want = torch.randn(4, 3), torch.empty(36), torch.empty(36)
    recording = tape.record(computation, [x], [out], Pool(), torch.device("cpu"))
    for _ in range(3):
        computation(x, want)
        assert torch.equal(out, want)
        x, out = torch.randn(4, 3), torch.empty(36)
        recording.replay([x], [out])


def test_l1_penalty_is_recorded_and_right() -> None:
    model, x, y = nn.Linear(4, 3).double(), torch.randn(8, 4).double(), torch.randn(8, 3).double()
    problem = Problem(model, lambda o, t: nn.functional.mse_loss(o, t) + o.norm(p=1) ** 2, (x, y))
    H = operator(problem)
    agree(H, problem)
    assert recordings(H)


def test_rule_that_computes_outside_of_torch_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays would see the first vector's numbers for ever."""

    class NumPySine(Rule):
        freed_after_reverse = ("dx",)

        def forward(self, x: Tensor) -> Tensor:
            self.x = x
            return torch.sin(x)

        def _times(self, t: Tensor, f: np.ufunc) -> Tensor:
            return torch.from_numpy(f(self.x.numpy()) * t.numpy())

        def tangent(self, dx: Tensor) -> Tensor:
            self.dx = dx
            return self._times(dx, np.cos)

        def backward(self, g: Tensor) -> tuple[Tensor]:
            return (self._times(g, np.cos),)

        def backward_tangent(self, dg: Tensor, g: Tensor) -> tuple[Tensor]:
            return (self._times(dg, np.cos) - self._times(g * self.dx, np.sin),)

    monkeypatch.setitem(RULES, torch.ops.aten.sin.default, NumPySine)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(8, 4).double(), torch.randn(8, 3).double()
    problem = Problem(model, lambda o, t: nn.functional.mse_loss(torch.sin(o), t), (x, y))
    H = operator(problem)
    for _ in range(3):
        agree(H, problem)
    assert not recordings(H)


def test_an_overload_that_leaves_given_memory_unwritten_is_found_by_trying_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norm of a transposed input, in torch 2.13; the list of those that are known is empty here."""

    def computation(x: Tensor, out: Tensor) -> None:
        norm = torch.ops.aten._native_batch_norm_legit.no_stats
        results = [norm(y, None, None, True, 0.1, 1e-5) for y in (x, x.t().contiguous().t())]
        out.copy_(sum(z + mean + inverse for z, mean, inverse in results))

    monkeypatch.setattr(tape, "_UNWRITTEN", set())
    tape._out_variant.cache_clear()
    try:
        x, out = torch.randn(6, 4).double(), torch.empty(6, 4).double()
        recording = tape.record(computation, [x], [out], Pool(), torch.device("cpu"))
        for _ in range(3):
            x, out, want = torch.randn(6, 4).double(), torch.empty(6, 4).double(), torch.empty(6, 4).double()
            recording.replay([x], [out])
            computation(x, want)
            torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    finally:
        tape._out_variant.cache_clear()


def test_trying_overloads_draws_no_random_numbers() -> None:
    def computation(x: Tensor, out: Tensor) -> None:
        flags = torch.ops.aten.bernoulli.p(x, 0.5)  # a random op with a result of its own
        out.copy_(x.sin() * flags + (x > 0))

    x, out, want = torch.randn(5, 3), torch.empty(5, 3), torch.empty(5, 3)
    torch.manual_seed(3)
    computation(x, want)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    recording = tape.record(computation, [x], [out], Pool(), torch.device("cpu"))
    assert torch.equal(out, want)
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(3)
    recording.replay([x], [out])
    assert torch.equal(out, want)


def test_noise_before_what_cannot_be_recorded_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    unsized = tape._unsized
    monkeypatch.setattr(tape, "_unsized", lambda op, args: op is torch.ops.aten.tanh.default or unsized(op, args))
    model = nn.Sequential(nn.Linear(4, 30), nn.Dropout(0.5), nn.Tanh(), nn.Linear(30, 3)).double()
    batch = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    before = torch.get_rng_state()
    H = sk.HessianOperator(model, nn.MSELoss(), batch)
    assert not recordings(H)
    torch.set_rng_state(before)
    want = nn.MSELoss()(model(batch[0]), batch[1]).detach()
    assert float((H.loss - want).abs()) <= 1e-12 * float(want)


def test_indexing_by_integers_is_recorded() -> None:
    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, 4))
            self.register_buffer("index", torch.tensor([2, 0, 2]))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.table[self.index].tanh().sum(0)

    problem = double(Problem(Picked(), nn.MSELoss(), (torch.randn(5, 4), torch.randn(5))))
    H = operator(problem)
    agree(H, problem)
    assert recordings(H)
    x, mask = torch.randn(3), torch.tensor([True, False, True])
    assert tape._unsized(torch.ops.aten.index.Tensor, (x, [mask]))
