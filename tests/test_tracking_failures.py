"""Training goes on where a step cannot be measured, and the record says so."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from problems import dense_hessian, double, mlp
from torch import Tensor, nn

import sharpkern as sk
from sharpkern.eigen.common import NonFiniteProductError
from sharpkern.tracking.failures import Failures


def cusp(output: Tensor, targets: Tensor) -> Tensor:
    """A loss whose gradient is finite everywhere, and whose curvature is infinite where output and targets agree."""
    return (output - targets).abs().pow(1.5).mean()


def line() -> tuple[nn.Linear, torch.optim.Optimizer, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A linear model, its optimizer, a good batch, and one on which every product is NaN."""
    model = nn.Linear(4, 1).double()
    x = torch.randn(6, 4).double()
    good, bad = (x, torch.randn(6, 1).double()), (torch.zeros(6, 4).double(), torch.ones(6, 1).double())
    with torch.no_grad():
        model.bias.fill_(1.0)
    return model, torch.optim.SGD([model.weight], lr=0.01), good, bad


def line_tracker(**options: object) -> tuple[sk.SharpnessTracker, nn.Linear, torch.optim.Optimizer, tuple, tuple]:
    model, optimizer, good, bad = line()
    model.bias.requires_grad_(False)
    return sk.SharpnessTracker(model, cusp, optimizer, **options), model, optimizer, good, bad


@pytest.mark.parametrize("block", [None, 3, "auto"])
def test_a_product_that_is_not_finite_is_recorded_and_training_goes_on(block: int | str | None) -> None:
    tracker, model, optimizer, good, bad = line_tracker(block=block)
    with pytest.warns(UserWarning, match="step 1 could not be measured: product 1 .* is not finite"):
        first = tracker.step(bad)
    assert first.status == "failed" and not first.measured and not first.converged
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the warning came once
        for step in range(2, 7):
            rec = tracker.step(bad if step == 4 else good)
            if step == 4:
                assert rec.status == "failed" and rec.loss == 0.0 and rec.grad_norm == 0.0
                assert all(math.isnan(x) for x in (rec.sharpness, rec.sharpness_error, rec.ratio))
                assert (
                    rec.threshold == pytest.approx(200)
                    and rec.eigenvalues == ()
                    and rec.preconditioned_sharpness is None
                )
            else:
                x, y = good
                r = (x @ model.weight.detach().T + 1 - y).abs()
                dense = (0.75 * r.rsqrt() * x).T @ x / len(x)
                assert rec.measured and rec.sharpness == pytest.approx(
                    float(torch.linalg.eigvalsh(dense)[-1]), rel=0.01
                )
            assert model.weight.grad is not None
            optimizer.step()


def test_after_a_first_step_that_failed_the_next_one_is_measured() -> None:
    tracker, _, optimizer, good, bad = line_tracker(every=3)
    with pytest.warns(UserWarning, match="step 1 could not be measured"):
        statuses = [tracker.step(bad).status]
    for batch in (good, good, bad, bad, good, good):
        statuses.append(tracker.step(batch).status)
        optimizer.step()
    assert statuses == ["failed", "measured", "carried", "failed", "carried", "carried", "measured"]


def test_training_past_failures_equals_training_without_a_tracker() -> None:
    tracker, model, optimizer, good, bad = line_tracker(budget=0.5)
    plain = nn.Linear(4, 1).double()
    plain.load_state_dict(model.state_dict())
    other = torch.optim.SGD([plain.weight], lr=0.01)
    tracker._failures.warned = True  # the warning has a test of its own
    statuses = []
    for batch in (good, bad, bad, good, good):
        statuses.append(tracker.step(batch, certify=True).status)
        optimizer.step()
        plain.zero_grad()
        cusp(plain(batch[0]), batch[1]).backward()
        other.step()
    assert statuses == ["measured", "failed", "failed", "measured", "measured"]
    assert torch.allclose(model.weight, plain.weight, rtol=0, atol=1e-12)


def test_a_preconditioner_of_zero_is_a_failed_step() -> None:
    problem = double(mlp())
    x, y = problem.batch
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=0.01, eps=0.0)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer)
    with pytest.warns(UserWarning, match=r"P is zero or not finite for 7 of 35 elements"):
        first = tracker.step((x * torch.tensor([1.0, 1, 1, 1, 0]), y))  # no gradient for the weights of one input
    assert first.status == "failed" and math.isnan(first.preconditioned_sharpness) and math.isnan(first.ratio)
    assert first.batch_sharpness is None and math.isnan(first.sharpness)
    rec = tracker.step(problem.batch)
    optimizer.step()
    assert rec.measured
    s = sk.preconditioner(optimizer).inv_sqrt(list(problem.model.parameters()))
    assert rec.preconditioned_sharpness > 0 and bool(s.isfinite().all())


def test_a_probe_whose_loss_is_not_finite_is_a_failed_step() -> None:
    problem = double(mlp())
    x, y = problem.batch
    probe = (x[:4].clone(), y[:4])
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, probe=probe)
    tracker.step(problem.batch)
    probe[0].fill_(math.nan)
    with pytest.warns(UserWarning, match="step 2 could not be measured: the loss is nan"):
        assert tracker.step(problem.batch).status == "failed"
    probe[0].copy_(x[:4])
    top = float(torch.linalg.eigvalsh(dense_hessian(problem._replace(batch=probe)))[-1])
    assert tracker.step(problem.batch).sharpness == pytest.approx(top, rel=0.01)


def test_a_form_that_is_not_finite_leaves_what_is_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, _, optimizer, good, bad = line_tracker(budget=0.5)
    before = tracker.step(good)
    monkeypatch.setattr(tracker._following.budget, "choose", lambda *_: "bounded")
    with pytest.warns(UserWarning, match="quadratic form of the last vector is nan"):
        assert tracker.step(bad).status == "failed"
    monkeypatch.setattr(tracker._following.budget, "choose", lambda *_: "carried")
    assert tracker.step(good).sharpness == pytest.approx(before.sharpness, rel=1e-6)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_of_several_processes_only_what_all_of_them_meet_is_passed_over(kind: str) -> None:
    """A product is summed over the processes, so that each sees the same; another error may be one's alone."""
    failures, product = Failures(), NonFiniteProductError("product 3 is not finite.")
    with pytest.warns(UserWarning, match="step 7 could not be measured: product 3 is not finite"):
        failures.note(product, 7, kind)
    for error in (torch.linalg.LinAlgError("no eigenvalues"), sk.NonFiniteLossError(math.nan)):
        with pytest.raises(type(error)) as raised:
            failures.note(error, 8, kind)
        assert raised.value is error
    failures.note(product, 9, kind)  # the warning came once
