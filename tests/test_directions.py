"""Batch sharpness and update curvature against dense matrices and the optimizer's own step."""

from __future__ import annotations

import math
import warnings

import optimizer_twins as twins
import pytest
import torch
from problems import Problem, dense_hessian, double, loss_and_gradient, mlp
from torch import nn

import sharpkern as sk

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_both_agree_with_the_dense_hessian_and_the_step_taken(name: str, products: bool) -> None:
    problem = double(mlp())
    parameters = list(problem.model.parameters())
    optimizer = OPTIMIZERS[name](parameters)
    tracker = sk.SharpnessTracker(
        problem.model, problem.loss_fn, optimizer, products=products, directions=True if products else None
    )
    for _ in range(3):
        g = loss_and_gradient(problem)[1].detach()
        dense, before = dense_hessian(problem), flat(parameters)
        record = tracker.step(problem.batch)
        optimizer.step()
        u = (before - flat(parameters)) / optimizer.param_groups[0]["lr"]
        P = sk.preconditioner(optimizer).diagonal(parameters) if name.startswith("adam") else torch.ones_like(u)
        assert record.batch_sharpness == pytest.approx(float(g @ dense @ g / g.dot(g)), rel=1e-8)
        assert record.update_curvature == pytest.approx(float(u @ dense @ u / (u * P).dot(u)), rel=1e-6)
        if products:
            top = record.sharpness if record.preconditioned_sharpness is None else record.preconditioned_sharpness
            assert record.update_curvature <= top * (1 + 1e-3)
        else:
            assert math.isnan(record.sharpness) and record.preconditioned_sharpness is None
            assert (record.status, record.matvecs, record.ratio) == ("untracked", 0, None)
            assert record.threshold is not None


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_optimizer_that_climbs_has_the_curvatures_of_minus_the_loss(momentum: float) -> None:
    problem = double(mlp())
    parameters = list(problem.model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=momentum, maximize=True)
    tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, directions=True)
    for _ in range(2):
        g = loss_and_gradient(problem)[1].detach()
        dense, before = -dense_hessian(problem), flat(parameters)
        record = tracker.step(problem.batch)
        optimizer.step()
        u = before - flat(parameters)
        assert record.batch_sharpness == pytest.approx(float(g @ dense @ g / g.dot(g)), rel=1e-8)
        assert record.update_curvature == pytest.approx(float(u @ dense @ u / u.dot(u)), rel=1e-6)


def test_one_form_serves_where_the_update_is_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = double(mlp())
    shapes = []
    original = sk.HessianOperator.form_rows
    monkeypatch.setattr(sk.HessianOperator, "form_rows", lambda H, V: (shapes.append(len(V)), original(H, V))[1])
    for name, rows in (("sgd", 1), ("decay", 2)):
        optimizer = OPTIMIZERS[name](problem.model.parameters())
        sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, products=False).step(problem.batch)
        assert shapes.pop() == rows


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_the_size_of_the_gradient_does_not_matter(scale: float) -> None:
    model = nn.Linear(4, 1, bias=False)
    x = torch.randn(8, 4)

    def loss_fn(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return scale * (output.squeeze(1) - targets).square().mean()

    problem = Problem(model, loss_fn, (x, torch.randn(8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    record = sk.SharpnessTracker(model, loss_fn, optimizer, products=False).step(problem.batch)
    g = model.weight.grad.double().flatten() / scale
    dense = 2 / 8 * x.double().t() @ x.double()
    assert record.batch_sharpness == pytest.approx(scale * float(g @ dense @ g / g.dot(g)), rel=1e-4)


def test_without_a_gradient_there_is_no_direction() -> None:
    model = nn.Linear(3, 1, bias=False)
    x = torch.randn(5, 3)
    batch = x, model(x).detach()
    tracker = sk.SharpnessTracker(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), products=False)
    record = tracker.step(batch)
    assert record.grad_norm == 0 and record.batch_sharpness is None and record.update_curvature is None


def test_directions_are_left_out_where_asked_or_dear() -> None:
    problem = double(mlp())
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    make = lambda **options: sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, **options)  # noqa: E731
    assert make(directions=False).step(problem.batch).batch_sharpness is None
    assert make(budget=0.5).step(problem.batch).batch_sharpness is None
    skipping = make(every=2)
    assert [skipping.step(problem.batch).batch_sharpness is None for _ in range(3)] == [False, True, False]
    adam = sk.SharpnessTracker(problem.model, problem.loss_fn, OPTIMIZERS["adam"](problem.model.parameters()))
    record = adam.step(problem.batch)  # one form by default, and Adam's update is not along the gradient
    assert record.batch_sharpness is not None and record.update_curvature is None
    always = make(every=2, directions=True)
    assert [always.step(problem.batch).batch_sharpness is None for _ in range(3)] == [False, False, False]


def test_an_optimizer_that_needs_a_closure_has_a_batch_sharpness_only() -> None:
    problem = double(mlp())
    optimizer = torch.optim.LBFGS(problem.model.parameters())
    with pytest.warns(UserWarning, match="no threshold"):
        tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, products=False)
    record = tracker.step(problem.batch)
    assert record.batch_sharpness is not None and record.update_curvature is None and record.threshold is None


@pytest.mark.parametrize("name", ["lion", "muon", "adafactor", "schedule-free"])
def test_optimizers_without_a_plain_diagonal_have_a_curvature_along_their_step(name: str) -> None:
    problem = double(mlp())
    matrices = [p for p in problem.model.parameters() if p.ndim == 2]
    for p in problem.model.parameters():
        p.requires_grad_(p.ndim == 2 or name != "muon")
    parameters = matrices if name == "muon" else list(problem.model.parameters())
    optimizer = {
        "lion": lambda: twins.Lion(parameters, lr=1e-3),
        "muon": lambda: torch.optim.Muon(parameters, lr=1e-3, weight_decay=0.0),
        "adafactor": lambda: twins.Adafactor(parameters),  # its lr is None
        "schedule-free": lambda: twins.AdamWScheduleFree(parameters, lr=1e-3),
    }[name]()
    twins.begin(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a threshold that is not known
        tracker = sk.SharpnessTracker(problem.model, problem.loss_fn, optimizer, directions=True, tol=1e-4)
    for _ in range(2):
        dense, before = dense_hessian(problem), flat(parameters)
        record = tracker.step(problem.batch)
        optimizer.step()
        u = before - flat(parameters)
        assert record.sharpness == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-4)
        along = float(u @ dense @ u / u.dot(u))
        if name in ("lion", "muon"):
            assert record.threshold is None and record.ratio is None
            assert record.update_curvature == pytest.approx(along, rel=1e-5 if name == "lion" else 0.05)
        else:  # in the norm of P, so only the sign is that of the Euclidean one
            assert record.update_curvature * along > 0
            assert record.update_curvature <= record.preconditioned_sharpness * (1 + 1e-3)
