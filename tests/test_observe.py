"""SharpnessTracker.observe: it changes nothing, and it sees what the optimizer steps with."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random

import numpy as np
import pytest
import torch
from problems import dense_hessian, double, loss_and_gradient, mlp
from problems import relative as error
from torch import nn

import sharpkern as sk
from sharpkern import MicroBatches


def noisy_network() -> nn.Module:
    layers = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3)
    return nn.Sequential(*layers)


def batches(count: int, rows: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(rows, 5), torch.randint(3, (rows,))) for _ in range(count)]


def seed_all() -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002  (the generators that user code draws from)


def random_states() -> tuple:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def train(model: nn.Module, data: list, observe: bool, accumulate: int = 2) -> list[sk.Record]:
    """Train with accumulation, clipping and Adam; return the records."""
    loss_fn, optimizer = nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), lr=0.01)
    tracker = sk.SharpnessTracker(model, loss_fn, optimizer) if observe else None
    records = []
    for i, (x, y) in enumerate(data):
        (loss_fn(model(x), y) / accumulate).backward()
        if (i + 1) % accumulate:
            continue
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        if tracker is not None:
            records.append(tracker.observe(MicroBatches(data[i + 1 - accumulate : i + 1])))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return records


def test_training_is_bit_for_bit_what_it_is_without() -> None:
    model = noisy_network()
    twin, data = copy.deepcopy(model), batches(10)
    seed_all()
    records = train(model, data, observe=True)
    after = random_states()
    seed_all()
    train(twin, data, observe=False)
    assert len(records) == 5 and all(r.converged and r.sharpness > 0 for r in records)
    for (name, mine), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    assert after == random_states()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_left_as_they_are(set_to_none: bool) -> None:
    problem = double(mlp())
    parameters = list(problem.model.parameters())
    for p in parameters:
        p.grad = None if set_to_none else torch.randn_like(p)
    before = [None if p.grad is None else (p.grad, p.grad.clone()) for p in parameters]
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, torch.optim.SGD(parameters, lr=0.1))
    tracker.observe(problem.batch)
    for p, kept in zip(parameters, before, strict=True):
        assert (p.grad is None) if kept is None else (p.grad is kept[0] and torch.equal(p.grad, kept[1]))


@pytest.mark.parametrize("source", ["p.grad", "mapping"])
def test_the_preconditioner_is_that_of_the_gradients_the_optimizer_uses(source: str) -> None:
    problem = double(mlp())
    parameters = list(problem.model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, tol=1e-5)
    for _ in range(4):
        problem.loss_fn(problem.model(problem.batch[0]), problem.batch[1]).backward()
        nn.utils.clip_grad_norm_(parameters, 0.01)
        given = {p: p.grad.clone() for p in parameters} if source == "mapping" else None
        if given is not None:
            for p in parameters:
                p.grad = torch.full_like(p, 1e3)  # must not be read
        record = tracker.observe(problem.batch, given)
        if given is not None:
            for p in parameters:
                p.grad = given[p]
        dense = dense_hessian(problem)
        optimizer.step()
        s = sk.preconditioner(optimizer).inv_sqrt(parameters)
        top = float(torch.linalg.eigvalsh(s[:, None] * dense * s)[-1])
        assert record.preconditioned_sharpness == pytest.approx(top, rel=1e-5)
        assert record.sharpness == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-5)
        assert record.grad_norm == pytest.approx(0.01, rel=1e-4)
        optimizer.zero_grad()


def test_micro_batches_and_chunks_are_the_whole_step() -> None:
    problem = double(mlp())
    x, y = problem.batch
    parts = MicroBatches([(x[:3], y[:3]), (x[3:], y[3:])], [0.5, 0.5])
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    record = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, tol=1e-5).observe(parts)
    dense = sum(dense_hessian(problem._replace(batch=b)) for b in parts.batches) / 2
    assert record.sharpness == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-5)

    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, tol=1e-5, chunk=4)
    loss, gradient = loss_and_gradient(problem)
    record = tracker.step(problem.batch)
    top = float(torch.linalg.eigvalsh(dense_hessian(problem))[-1])
    assert record.sharpness == pytest.approx(top, rel=1e-5)
    assert record.loss == pytest.approx(float(loss), rel=1e-10)
    assert error(torch.cat([p.grad.flatten() for p in problem.model.parameters()]), gradient.detach()) <= 1e-10


def test_a_scaled_gradient_is_refused_and_an_unscaled_one_is_right() -> None:
    problem = mlp()
    parameters = list(problem.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer)
    scaler.scale(problem.loss_fn(problem.model(problem.batch[0]), problem.batch[1])).backward()
    with pytest.raises(ValueError, match=r"16384 times .*scaler\.unscale_\(optimizer\)"):
        tracker.observe(problem.batch)
    scaler.unscale_(optimizer)
    record = tracker.observe(problem.batch)
    scaler.step(optimizer)
    s = sk.preconditioner(optimizer)
    assert record.step == 1 and record.preconditioned_sharpness > 0
    # One step of Adam from zero moments: P is |g| + eps, known in closed form.
    gradients = torch.cat([p.grad.flatten() for p in parameters])
    torch.testing.assert_close(s.diagonal(parameters), 0.1 * (gradients.abs() + 1e-8), rtol=1e-4, atol=1e-9)


def test_autocast_is_the_models_own() -> None:
    problem = mlp()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = problem.loss_fn(problem.model(problem.batch[0]), problem.batch[1])
        low = tracker.observe(problem.batch)
    high = tracker.observe(problem.batch)
    assert low.loss == pytest.approx(loss.item(), rel=1e-5) and low.loss != high.loss
    assert low.sharpness == pytest.approx(high.sharpness, rel=0.05)


def test_a_compiled_model_and_an_average_of_weights_beside_it() -> None:
    problem = double(mlp())
    compiled = torch.compile(problem.model, backend="eager")
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    average = torch.optim.swa_utils.AveragedModel(
        problem.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    tracker = sk.SharpnessTracker(compiled, problem.loss_fn, optimizer, tol=1e-5)
    for _ in range(2):
        problem.loss_fn(compiled(problem.batch[0]), problem.batch[1]).backward()
        record = tracker.observe(problem.batch)
        top = float(torch.linalg.eigvalsh(dense_hessian(problem))[-1])
        assert record.sharpness == pytest.approx(top, rel=1e-5)
        optimizer.step()
        average.update_parameters(problem.model)
        optimizer.zero_grad()


def test_a_part_of_the_parameters() -> None:
    problem = double(mlp())
    names = [name for name, _ in problem.model.named_parameters()][-2:]
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=0.01)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, tol=1e-5, params=names)
    chosen = [dict(problem.model.named_parameters())[name] for name in names]
    n = sum(p.numel() for p in chosen)
    problem.loss_fn(problem.model(problem.batch[0]), problem.batch[1]).backward()
    record = tracker.observe(problem.batch)
    dense = dense_hessian(problem)[-n:, -n:]
    assert record.sharpness == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-5)
    optimizer.step()
    s = sk.preconditioner(optimizer).inv_sqrt(chosen)
    top = float(torch.linalg.eigvalsh(s[:, None] * dense * s)[-1])
    assert record.preconditioned_sharpness == pytest.approx(top, rel=1e-5)
    with pytest.raises(ValueError, match="use observe"):
        tracker.step(problem.batch)


def test_freezing_in_the_middle_of_a_run() -> None:
    problem = double(mlp())
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, tol=1e-5, every=5)
    tracker.observe(problem.batch)
    first = next(problem.model.parameters())
    first.requires_grad_(False)
    record = tracker.observe(problem.batch, certify=True)
    dense = dense_hessian(problem)
    assert record.sharpness == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-5)


def test_steps_between_compute_nothing() -> None:
    problem = double(mlp())
    tracker = sk.SharpnessTracker(
        problem.model, problem.loss_fn, torch.optim.SGD(problem.model.parameters(), lr=0.1), every=3
    )
    first = tracker.observe(problem.batch)
    products = tracker.hessian.products
    second = tracker.observe("never looked at")
    assert (second.step, second.status, second.matvecs, second.sharpness) == (2, "carried", 0, first.sharpness)
    assert math.isnan(second.loss) and math.isnan(second.grad_norm) and second.batch_sharpness is None
    assert tracker.hessian.products == products


def test_works_where_gradients_are_off() -> None:
    problem = double(mlp())
    tracker = sk.SharpnessTracker(
        problem.model, problem.loss_fn, torch.optim.SGD(problem.model.parameters(), lr=0.1), tol=1e-5
    )
    with torch.no_grad():
        record = tracker.observe(problem.batch)
    top = float(torch.linalg.eigvalsh(dense_hessian(problem))[-1])
    assert record.sharpness == pytest.approx(top, rel=1e-5)


def test_what_is_maximised_is_tracked_as_minus_the_loss() -> None:
    problem = double(mlp())
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=0.01, maximize=True)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, tol=1e-5)
    record = tracker.step(problem.batch)
    values = torch.linalg.eigvalsh(dense_hessian(problem))
    assert record.sharpness == pytest.approx(-float(values[0]), rel=1e-4)
    g = loss_and_gradient(problem)[1].detach()
    assert record.batch_sharpness == pytest.approx(-float(g @ dense_hessian(problem) @ g / g.dot(g)), rel=1e-8)
    first, *others = problem.model.parameters()
    mixed = torch.optim.SGD([{"params": [first], "maximize": True}, {"params": others}], lr=0.1)
    with pytest.raises(ValueError, match="maximize differs"):
        sk.SharpnessTracker(problem.model, problem.loss_fn, mixed).step(problem.batch)


@pytest.mark.parametrize("copied", ["pickle", "deepcopy", "torch.save"])
def test_a_copy_of_a_tracker_goes_on_as_the_tracker_does(copied: str) -> None:
    problem = double(mlp())
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=0.01)
    whole = {"model": problem.model, "optimizer": optimizer}
    whole["tracker"] = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer)
    record = whole["tracker"].step(problem.batch)
    optimizer.step()
    if copied == "pickle":
        twin = pickle.loads(pickle.dumps(whole))
    elif copied == "deepcopy":
        twin = copy.deepcopy(whole)
    else:
        torch.save(whole, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert pickle.loads(pickle.dumps(record)) == copy.deepcopy(record) == record
    for _ in range(2):
        mine, theirs = whole["tracker"].step(problem.batch), twin["tracker"].step(problem.batch)
        assert mine == theirs
        whole["optimizer"].step(), twin["optimizer"].step()


def test_results_can_be_pickled_and_operators_say_why_they_cannot() -> None:
    problem = double(mlp())
    H = sk.HessianOperator(problem.model, problem.loss_fn, problem.batch)
    result = sk.lanczos(H)
    assert torch.equal(pickle.loads(pickle.dumps(result)).eigenvectors, result.eigenvectors)
    for copying in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="HessianOperator cannot be pickled or copied.*make it again"):
            copying(H)


def test_bad_gradients_and_options_are_refused() -> None:
    problem = mlp()
    parameters = list(problem.model.parameters())
    optimizer = torch.optim.Adam(parameters)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer)
    with pytest.raises(ValueError, match=r"has shape \[1\]"):
        tracker.observe(problem.batch, {parameters[0]: torch.ones(1)})
    with pytest.raises(ValueError, match="chunk must be at least 1 example, got 0"):
        sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, chunk=0)
    with pytest.raises(ValueError, match="nothing to measure"):
        sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, products=False, directions=False)
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match="lacks trainable parameters"):
        sk.SharpnessTracker(problem.model, problem.loss_fn, other).observe(problem.batch)
