"""Generalised sharpness against brute force and closed forms; its threshold and update curvature against steps."""

from __future__ import annotations

import itertools
import math
from typing import Any

import optimizer_twins as twins
import pytest
import torch
from torch import Tensor, nn, optim

import sharpkern as sk
from sharpkern.optimizers.geometry import (
    GeneralisedSharpness,
    generalised_sharpness,
    generalised_threshold,
    update_curvature,
)
from sharpkern.optimizers.unit_ball import unit_ball

F64 = torch.float64


class Matrix:
    """A symmetric matrix on the parameters given."""

    def __init__(self, H: Tensor, params: list[nn.Parameter]) -> None:
        self.H, self.n, self.dtype, self.device = H, len(H), H.dtype, H.device
        self.params = {str(i): p for i, p in enumerate(params)}
        self.columns = 0

    def matmat(self, V: Tensor) -> Tensor:
        self.columns += V.shape[1]
        return self.H @ V


def symmetric(n: int, positive: bool) -> Tensor:
    A = torch.randn(n, n, dtype=F64)
    return A @ A.t() / n if positive else (A + A.t()) / 2


def zeros(*shapes: Any) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape, dtype=F64)) for shape in shapes]


def largest_in_the_box(H: Tensor, r: Tensor) -> float:
    """Maximise d'Hd over |d_i| <= r_i: on every face, at the stationary point of the coordinates that are free."""
    best = 0.0
    for signs in itertools.product((-1.0, 1.0, 0.0), repeat=len(H)):
        d = torch.tensor(signs, dtype=F64) * r
        free = torch.tensor([s == 0 for s in signs])
        if bool(free.any()):
            inner = -torch.linalg.lstsq(H[free][:, free], (H @ d)[free][:, None]).solution[:, 0]
            if bool((inner.abs() > r[free]).any()):
                continue  # outside: the maximum lies on a smaller face
            d[free] = inner
        best = max(best, float(d @ H @ d))
    return best


def check(found: GeneralisedSharpness, H: Tensor, optimizer: optim.Optimizer, params: list[nn.Parameter]) -> None:
    """The value is attained inside of the ball: that makes it a lower bound."""
    d = found.direction
    assert float(d @ H @ d) == pytest.approx(found.value, rel=1e-9, abs=1e-12)
    assert unit_ball(optimizer, params, gradients={p: torch.ones_like(p) for p in params}).norm(d) <= 1 + 1e-9


@pytest.mark.parametrize("n", [2, 7, 12])
def test_in_the_cube_it_finds_what_all_signs_hold(n: int) -> None:
    """For a positive H the maximum is at a vertex: all 2^n are tried."""
    params = zeros(n)
    optimizer = twins.Lion(params, lr=0.1)
    vertices = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=F64)
    hits = 0
    for _ in range(5):
        H = symmetric(n, True)
        truth = float(((vertices @ H) * vertices).sum(1).max())
        found = generalised_sharpness(Matrix(H, params), optimizer, starts=16, tol=1e-6)
        check(found, H, optimizer, params)
        assert found.kind == "lower bound" and found.converged
        assert 0.95 * truth <= found.value <= truth * (1 + 1e-9)
        hits += found.value > truth * (1 - 1e-9)
    assert hits >= 3


def test_in_the_cube_of_an_indefinite_h_it_may_find_points_inside_of_faces() -> None:
    params = zeros(2, 3)
    optimizer = twins.Lion([{"params": params[:1]}, {"params": params[1:], "lr": 0.3}], lr=0.1)
    r = torch.tensor([1.0, 1.0, 3.0, 3.0, 3.0], dtype=F64)
    ratios = []
    for _ in range(6):
        H = symmetric(5, False)
        truth = largest_in_the_box(H, r)
        found = generalised_sharpness(Matrix(H, params), optimizer, starts=16, max_products=4000)
        check(found, H, optimizer, params)
        assert found.value <= truth * (1 + 1e-9)
        ratios.append(found.value / truth)
    assert min(ratios) > 0.9 and sorted(ratios)[3] > 0.99
    # The longest diagonal of a negative H is far below 0, and the maximum is 0, at 0.
    negative = generalised_sharpness(Matrix(-torch.eye(5, dtype=F64), params), optimizer)
    assert negative.value == pytest.approx(0, abs=1e-9)


def test_a_start_at_a_random_vertex_alone_finds_less() -> None:
    """A dominant diagonal makes every vertex stationary: what the relaxation before is there for."""
    n = 10
    params = zeros(n)
    optimizer = twins.Lion(params, lr=0.1)
    gains = []
    for _ in range(6):
        H = symmetric(n, True) + n * torch.eye(n, dtype=F64)
        one, many = (generalised_sharpness(Matrix(H, params), optimizer, starts=k) for k in (1, 8))
        gains.append(many.value - one.value)
    assert min(gains) >= -1e-9 and sum(gains) > 1.0


def test_in_the_cube_of_rank_one_it_is_the_squared_sum_of_sizes() -> None:
    params = zeros(200)
    a = torch.randn(200, dtype=F64)
    found = generalised_sharpness(Matrix(torch.outer(a, a), params), twins.Lion(params, lr=0.1))
    assert found.value == pytest.approx(float(a.abs().sum()) ** 2)


def test_for_muon_of_rank_one_it_is_the_squared_nuclear_norm() -> None:
    """``H = gg'`` gives ``max (g'd)^2``, the square of the dual norm: sums of singular values, times each factor."""
    params = zeros((4, 6), (9, 4))
    g = torch.randn(60, dtype=F64)
    found = generalised_sharpness(Matrix(torch.outer(g, g), params), optim.Muon(params, lr=0.1))
    nuclear = [float(torch.linalg.svdvals(part).sum()) for part in (g[:24].reshape(4, 6), g[24:].reshape(9, 4))]
    assert found.value == pytest.approx((nuclear[0] + 1.5 * nuclear[1]) ** 2)
    assert found.kind == "lower bound"


def test_for_muon_of_kronecker_form_it_is_a_sum_of_eigenvalues() -> None:
    """``d'Hd = tr(D'AD)``: of an n x m matrix, m < n, the m largest eigenvalues of a positive A (Ky Fan)."""
    n, m = 6, 2
    params = zeros((n, m))
    A = symmetric(n, True)
    H = torch.kron(A, torch.eye(m, dtype=F64))
    optimizer = optim.Muon(params, lr=0.1)
    found = generalised_sharpness(Matrix(H, params), optimizer, tol=1e-7, max_products=8000)
    check(found, H, optimizer, params)
    want = n / m * float(torch.linalg.eigvalsh(A)[-m:].sum())
    assert want * (1 - 1e-4) <= found.value <= want * (1 + 1e-9)


@pytest.mark.parametrize("positive", [True, False])
def test_for_muon_no_random_direction_is_better(positive: bool) -> None:
    params = zeros((2, 2), (2, 1))
    optimizer = optim.Muon([{"params": params[:1]}, {"params": params[1:], "lr": 0.2}], lr=0.1)
    ball = unit_ball(optimizer, params)
    H = symmetric(6, positive)
    found = generalised_sharpness(Matrix(H, params), optimizer, starts=16, max_products=6000)
    check(found, H, optimizer, params)
    d = torch.randn(4000, 6, dtype=F64)
    best = ball.steepest(d)
    for _ in range(60):  # a search of its own: random moves, kept where they rise
        moved = ball.steepest(best + 0.3 * torch.randn_like(d) * torch.rand(len(d), 1, dtype=F64))
        rises = ((moved @ H) * moved).sum(1) > ((best @ H) * best).sum(1)
        best = torch.where(rises[:, None], moved, best)
    assert found.value >= 0.98 * float(((best @ H) * best).sum(1).max())


@pytest.mark.parametrize("make", [optim.SGD, optim.Adam, optim.NAdam], ids=lambda make: make.__name__)
def test_for_a_diagonal_p_it_is_the_eigenvalue(make: Any) -> None:
    params = zeros(3, (2, 2))
    optimizer = make([{"params": params[:1]}, {"params": params[1:], "lr": 0.2}], lr=0.1)
    gradients = {p: torch.randn_like(p) for p in params}
    for positive in (True, False):
        H = symmetric(7, positive)
        operator = Matrix(H, params)
        found = generalised_sharpness(operator, optimizer, gradients=gradients, tol=1e-9)
        s = sk.preconditioner(optimizer, gradients=gradients).inv_sqrt()
        assert found.value == pytest.approx(float(torch.linalg.eigvalsh(s[:, None] * H * s)[-1]))
        assert found.kind == "eigenvalue" and found.converged and found.products == operator.columns
        d = found.direction
        assert float(d @ H @ d) == pytest.approx(found.value)
        assert unit_ball(optimizer, params, gradients=gradients).norm(d) == pytest.approx(1)


def steepest_descent(optimizer: optim.Optimizer, params: list[nn.Parameter], H: Tensor, eta: float) -> list[float]:
    """Run ``theta - eta |g|_* d`` on ``theta'H theta / 2``, and return the losses."""
    ball, x, losses = unit_ball(optimizer, params), torch.randn(len(H), dtype=F64), []
    for _ in range(300):
        g = H @ x
        losses.append(float(x @ g) / 2)
        x = x - eta * ball.dual_norm(g) * ball.steepest(g[None])[0]
    return losses


@pytest.mark.parametrize("name", ["lion", "muon"])
def test_steepest_descent_falls_below_2_over_eta_and_diverges_beyond(name: str) -> None:
    params = zeros((3, 3))
    optimizer = twins.Lion(params, lr=0.1) if name == "lion" else optim.Muon(params, lr=0.1)
    H = symmetric(9, True)
    value = generalised_sharpness(Matrix(H, params), optimizer, starts=16, tol=1e-6, max_products=6000).value
    losses = steepest_descent(optimizer, params, H, 1.9 / value)
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(losses))
    a = torch.randn(9, dtype=F64)  # of rank one, where the worst direction is the one taken: the edge is sharp
    H = torch.outer(a, a)
    value = generalised_sharpness(Matrix(H, params), optimizer).value
    assert steepest_descent(optimizer, params, H, 1.98 / value)[-1] < 1e-3
    rising = steepest_descent(optimizer, params, H, 2.02 / value)
    assert rising[-1] > 10 * rising[0]


@pytest.mark.parametrize("name", ["lion", "sgd"])
def test_a_real_step_raises_the_loss_exactly_beyond_the_generalised_threshold(name: str) -> None:
    """One dimension of curvature, in which the value is the curvature along every step."""
    a = torch.randn(6, dtype=F64)
    H = torch.outer(a, a)
    for factor in (0.98, 1.02):
        x = nn.Parameter(torch.randn(6, dtype=F64))
        start = x.detach().clone()

        def build(lr: float, x: nn.Parameter = x) -> optim.Optimizer:
            return twins.Lion([x], lr=lr, betas=(0.0, 0.0)) if name == "lion" else optim.SGD([x], lr=lr)

        gradients: dict[Tensor, Tensor] = {x: H @ start}
        value = generalised_sharpness(Matrix(H, [x]), build(1.0)).value
        lr = factor * generalised_threshold(build(1.0), gradients) / value
        assert generalised_threshold(build(lr), gradients) * factor == pytest.approx(value)
        x.grad = gradients[x].clone()
        build(lr).step()
        assert (float(x.detach() @ H @ x.detach()) > float(start @ H @ start)) == (factor > 1)
    assert generalised_threshold(build(0.0), gradients) == math.inf


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: optim.Muon(ps, lr=0.02),
        lambda ps: twins.Lion(ps, lr=0.02, weight_decay=0.1),
        lambda ps: optim.Adafactor(ps, lr=0.02),
        lambda ps: optim.NAdam(ps, lr=0.02),
        lambda ps: twins.Adafactor(ps),
    ],
    ids=["muon", "lion", "adafactor", "nadam", "hf adafactor"],
)
def test_the_update_curvature_tells_the_loss_after_the_real_step(make: Any) -> None:
    """On a quadratic the second-order change is the change."""
    params = [nn.Parameter(torch.randn(shape, dtype=F64)) for shape in ((3, 4), (5, 2))]
    H, optimizer = symmetric(22, True), make(params)
    for _ in range(3):
        x = sk.flatten(params).detach()
        g = (H @ x).split([12, 10])
        gradients = {p: part.reshape(p.shape) for p, part in zip(params, g, strict=True)}
        found = update_curvature(Matrix(H, params), optimizer, gradients)
        for p in params:
            p.grad = gradients[p].clone()
        lr = optimizer.param_groups[0]["lr"] or 1.0
        optimizer.step()
        y = sk.flatten(params).detach()
        change = float(y @ H @ y - x @ H @ x) / 2
        assert -lr * found.slope + lr**2 * found.curvature / 2 == pytest.approx(change, rel=1e-6)
        assert found.squared_norm == pytest.approx(float(((x - y) / lr).square().sum()), rel=1e-6)
        low, high = torch.linalg.eigvalsh(H)[[0, -1]].tolist()
        assert low <= found.directional_sharpness <= high
        assert found.critical_lr == pytest.approx(2 * found.slope / found.curvature)


def test_the_critical_rate_of_a_step_without_an_edge() -> None:
    (p,) = zeros(2)
    g = torch.tensor([1.0, 0.0], dtype=F64)
    H = torch.diag(torch.tensor([-1.0, 2.0], dtype=F64))
    assert update_curvature(Matrix(H, [p]), optim.SGD([p], lr=0.1), {p: g}).critical_lr == math.inf
    upward = update_curvature(Matrix(H, [p]), optim.SGD([p], lr=0.1, maximize=True), {p: g})
    assert upward.slope == -1 and upward.critical_lr == 0
    still = update_curvature(Matrix(H, [p]), optim.SGD([p], lr=0.1), {p: 0 * g})
    assert (still.curvature, still.slope, still.squared_norm) == (0, 0, 0)
    with pytest.raises(ValueError, match=r"not the operator's, of shapes \[\[3\]\]"):
        update_curvature(Matrix(H, [p]), optim.SGD([p], lr=0.1), {zeros(3)[0]: torch.ones(3)})


def test_a_network_with_muon_on_its_matrices_and_a_float32_hessian() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    batch = torch.randn(8, 5), torch.randint(0, 3, (8,))
    H = sk.HessianOperator(model, nn.functional.cross_entropy, batch)
    muon = optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.02)
    found = generalised_sharpness(H, muon, starts=4, max_products=400)
    dense = H.matmat(torch.eye(H.n)).double()
    d = found.direction.double()
    assert found.direction.dtype == torch.float32 and found.products <= 400
    assert float(d @ dense @ d) == pytest.approx(found.value, rel=1e-4)
    assert unit_ball(muon, list(H.params.values())).norm(found.direction) <= 1 + 1e-5
    gradients = {p: g.detach() for p, g in zip(H.params.values(), torch.autograd.grad(
        nn.functional.cross_entropy(model(batch[0]), batch[1]), list(H.params.values())), strict=True)}  # fmt: skip
    assert update_curvature(H, muon, {p: g for p, g in gradients.items() if p.ndim == 2}).slope > 0


@pytest.mark.parametrize("options", [{"starts": 0}, {"starts": 4, "max_products": 8}, {"tol": 0.0}])
def test_bad_arguments_are_refused(options: dict[str, Any]) -> None:
    params = zeros(3)
    with pytest.raises(ValueError, match=r"starts must be at least 1, max_products at least 2 starts \+ 1"):
        generalised_sharpness(Matrix(symmetric(3, True), params), twins.Lion(params, lr=0.1), **options)


def test_a_product_that_is_not_finite_is_an_error() -> None:
    params = zeros(3)
    with pytest.raises(RuntimeError, match="not finite"):
        generalised_sharpness(Matrix(math.nan * symmetric(3, True), params), twins.Lion(params, lr=0.1))
