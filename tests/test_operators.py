"""HessianOperator, GGNOperator, PreconditionedOperator against double backward and dense matrices."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import (
    PROBLEMS,
    Problem,
    cast,
    dense_hessian,
    double,
    hessian_times,
    loss_and_gradient,
    mlp,
    operator,
)
from problems import relative as error
from torch import nn

import sharpkern as sk
from sharpkern.curvature.parameters import gradients_of


@pytest.fixture(params=PROBLEMS)
def problem(request: pytest.FixtureRequest) -> Problem:
    return double(PROBLEMS[request.param]())


def test_loss_gradient_and_products_agree_with_double_backward(problem: Problem) -> None:
    H = operator(problem)
    loss, gradient = loss_and_gradient(problem)
    V = torch.randn(3, H.n, dtype=torch.float64)
    want = hessian_times(problem, V)
    assert abs(float(H.loss - loss)) <= 1e-10 * abs(float(loss))
    assert error(H.gradient, gradient.detach()) <= 1e-10
    assert error(H.matvec(V[0]), want[0]) <= 1e-10
    assert error(H.matmat(V.t()).t(), want) <= 1e-10
    assert error((H @ V.t()).t(), want) <= 1e-10


def forms_of(A: sk.HessianOperator | sk.GGNOperator | sk.PreconditionedOperator) -> float:
    """Compare quadratic forms with products, for a block and for one vector; return the error relative to |v||Av|."""
    V = torch.randn(A.n, 18, dtype=A.dtype)
    products = A @ V
    size = (V.norm(dim=0) * products.norm(dim=0)).double()
    forms = A.quadratic_form(V)
    assert forms.shape == (18,)
    errors = [forms - (V * products).sum(0), A.quadratic_form(V[:, 0]) - forms[0]]
    return max(float((e / size).abs().max()) for e in errors)


def test_quadratic_form_is_that_of_the_products(problem: Problem) -> None:
    H = operator(problem)
    optimizer = torch.optim.RMSprop(problem.model.parameters())
    P = sk.preconditioner(optimizer, gradients=gradients_of(H))
    for A in (H, sk.GGNOperator(*problem), sk.PreconditionedOperator(H, P)):
        assert forms_of(A) <= 1e-10


@pytest.mark.parametrize("name", PROBLEMS)
def test_quadratic_form_in_lower_precision(name: str) -> None:
    problem = PROBLEMS[name]()
    assert forms_of(operator(cast(problem, torch.float32))) <= 1e-5
    assert forms_of(operator(cast(problem, torch.bfloat16))) <= 0.02


@pytest.mark.parametrize("name", PROBLEMS)
def test_float32_products_are_within_1e_4_of_float64(name: str) -> None:
    exact = double(PROBLEMS[name]())
    low = cast(Problem(copy.deepcopy(exact.model), exact.loss_fn, exact.batch), torch.float32)
    v = torch.randn(sum(p.numel() for p in exact.model.parameters()))
    assert error((operator(low) @ v).double(), hessian_times(exact, v[None].double())[0]) <= 1e-4


@pytest.mark.parametrize("name", PROBLEMS)
def test_bfloat16_parameters_take_float32_vectors(name: str) -> None:
    exact = double(PROBLEMS[name]())
    low = cast(Problem(copy.deepcopy(exact.model), exact.loss_fn, exact.batch), torch.bfloat16)
    exact = double(Problem(copy.deepcopy(low.model), low.loss_fn, low.batch))  # the same rounded parameters
    H = operator(low)
    v = torch.randn(H.n)
    product = H @ v
    want = hessian_times(exact, v[None].double())[0]
    assert product.dtype == torch.float32
    twice = hessian_times(low, v[None].bfloat16())[0]
    assert float((product.double() - want).norm()) <= 2 * float((twice.double() - want).norm())


def test_ggn_agrees_with_explicit_jacobian() -> None:
    model, loss_fn, (x, y) = double(mlp())
    G = sk.GGNOperator(model, loss_fn, (x, y))
    params = {name: p.detach() for name, p in model.named_parameters()}
    jacobians = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)).flatten())(params)
    J = torch.cat([jacobians[name].flatten(1) for name in params], 1)
    outputs = model(x).detach().flatten()
    C = torch.autograd.functional.hessian(lambda z: loss_fn(z.view(len(x), -1), y), outputs)
    V = torch.randn(3, G.n, dtype=torch.float64)
    assert error(G.matmat(V.t()), J.T @ (C @ (J @ V.t()))) <= 1e-10


@pytest.mark.parametrize("name", ["cnn", "gpt"])
def test_ggn_is_positive_semidefinite_and_equals_hessian_for_a_linear_model(name: str) -> None:
    G = sk.GGNOperator(*double(PROBLEMS[name]()))
    dense = G.matmat(torch.eye(G.n, dtype=torch.float64))
    assert error(dense, dense.T) <= 1e-10
    eigenvalues = torch.linalg.eigvalsh(dense)
    assert eigenvalues[0] >= -1e-9 * eigenvalues[-1]
    linear = Problem(nn.Linear(4, 3).double(), F.cross_entropy, (torch.randn(6, 4).double(), torch.randint(0, 3, (6,))))
    G = sk.GGNOperator(*linear)
    assert error(G.matmat(torch.eye(G.n, dtype=torch.float64)), dense_hessian(linear)) <= 1e-10


def test_three_largest_eigenvalues_agree_with_dense_hessian() -> None:
    problem = double(mlp())
    want = torch.linalg.eigvalsh(dense_hessian(problem)).flip(0)[:3]
    result = sk.lanczos(operator(problem), k=3, tol=1e-7, max_matvecs=400)
    assert result.converged
    assert error(result.eigenvalues, want) <= 1e-6


def test_preconditioned_eigenvalues_agree_with_dense_matrix() -> None:
    problem = double(mlp())
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=0.01)
    for _ in range(3):
        loss = problem.loss_fn(problem.model(problem.batch[0]), problem.batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scale = []
    for p in problem.model.parameters():
        v = optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**3)
        scale.append(((1 - 0.9**3) * (v.sqrt() + 1e-8)).flatten() ** -0.5)
    s = torch.cat(scale)
    want = torch.linalg.eigvalsh(s[:, None] * dense_hessian(problem) * s)
    A = sk.PreconditionedOperator(operator(problem), sk.preconditioner(optimizer))
    got = torch.linalg.eigvalsh(A.matmat(torch.eye(A.n, dtype=torch.float64)))
    assert error(got, want) <= 1e-6
    result = sk.lanczos(A, k=3, tol=1e-7, max_matvecs=400)
    assert error(result.eigenvalues, want.flip(0)[:3]) <= 1e-6


def test_parameter_subset_and_frozen_parameters() -> None:
    problem = double(mlp())
    n_first = sum(p.numel() for p in problem.model[0].parameters())
    n_last = sum(p.numel() for p in problem.model[4].parameters())
    dense = dense_hessian(problem)
    H = operator(problem, params=["4.bias", "4.weight"])
    assert list(H.params) == ["4.weight", "4.bias"]
    assert error(H @ torch.eye(H.n, dtype=torch.float64), dense[-n_last:, -n_last:]) <= 1e-10
    H = operator(problem, params=[problem.model[4].weight])
    assert H.n == problem.model[4].weight.numel()
    problem.model[0].requires_grad_(False)
    H = operator(problem)
    assert H.n == len(dense) - n_first
    assert error(H @ torch.eye(H.n, dtype=torch.float64), dense[n_first:, n_first:]) <= 1e-10


def test_refresh_follows_parameters_and_batch_without_a_new_export() -> None:
    problem = double(mlp())
    H = operator(problem)
    v = torch.randn(H.n, dtype=torch.float64)
    with torch.no_grad():
        for p in problem.model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    with pytest.raises(RuntimeError, match="refresh"):
        H.matvec(v)
    x, y = torch.randn(9, 5).double(), torch.randint(0, 3, (9,))
    engines = list(H._engines)
    H.refresh((x, y))
    assert list(H._engines) == engines
    moved = Problem(problem.model, problem.loss_fn, (x, y))
    assert error(H @ v, hessian_times(moved, v[None])[0]) <= 1e-10
    shorter = Problem(problem.model, problem.loss_fn, (x[:4], y[:4]))
    H.refresh(shorter.batch)
    assert error(H @ v, hessian_times(shorter, v[None])[0]) <= 1e-10


def test_products_are_counted_and_wide_blocks_are_split() -> None:
    problem = double(mlp())
    H = operator(problem)
    V = torch.randn(H.n, 37, dtype=torch.float64)
    assert error(H @ V, hessian_times(problem, V.t()).t()) <= 1e-10
    assert H.products == 37
    assert (H @ V[:, :0]).shape == (H.n, 0)


def test_block_is_used_and_returned_without_a_copy() -> None:
    H = operator(double(mlp()))
    block = torch.randn(3, H.n, dtype=torch.float64)
    assert H.matmat(block.t()).t().is_contiguous()


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(3, 5)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": torch.tanh(self.a(left)) * self.b(right)}


@pytest.mark.parametrize("form", ["tuple", "dict inputs", "dict batch"])
def test_batches_come_as_tuples_and_dicts(form: str) -> None:
    model = TwoInputs().double()
    left, right, y = torch.randn(6, 4).double(), torch.randn(6, 3).double(), torch.randint(0, 5, (6,))
    if form == "dict batch":
        batch = {"left": left, "right": right}

        def loss_fn(out: dict, batch: dict) -> torch.Tensor:
            return F.cross_entropy(out["logits"], y) + 0.1 * batch["left"].sum()
    else:
        batch = ((left, right) if form == "tuple" else {"left": left, "right": right}, y)

        def loss_fn(out: dict, targets: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(out["logits"], targets)

    problem = Problem(model, loss_fn, batch)
    H = operator(problem)
    V = torch.randn(2, H.n, dtype=torch.float64)
    assert error(H.matmat(V.t()).t(), hessian_times(problem, V)) <= 1e-10


def test_functional_loss_of_named_tensors() -> None:
    A = torch.randn(6, 6).double()
    A = A + A.T
    params = {"theta": torch.randn(6).double(), "phi.x": torch.randn(2).double()}
    H = sk.HessianOperator(
        None, lambda p, A: 0.5 * p["theta"] @ A @ p["theta"] + p["phi.x"].pow(4).sum(), A, params=params
    )
    want = torch.block_diag(A, torch.diag(12 * params["phi.x"] ** 2))
    assert error(H @ torch.eye(8, dtype=torch.float64), want) <= 1e-12
    with pytest.raises(ValueError, match="functional loss"):
        sk.GGNOperator(None, lambda p, b: p["theta"].sum(), A)


def test_scipy_finds_the_same_top_eigenvalue() -> None:
    scipy_linalg = pytest.importorskip("scipy.sparse.linalg")
    problem = double(mlp())
    top = scipy_linalg.eigsh(operator(problem).to_scipy(), k=1, which="LA", return_eigenvectors=False)
    assert np.isclose(top[0], float(torch.linalg.eigvalsh(dense_hessian(problem))[-1]), rtol=1e-8)


def test_planted_large_negative_eigenvalue_is_not_reported_as_sharpness() -> None:
    eigenvalues = torch.tensor([-50.0, -3.0, 0.1, 1.0, 2.0], dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    A = Q * eigenvalues @ Q.T
    H = sk.HessianOperator(
        None, lambda p, A: 0.5 * p["x"] @ A @ p["x"], A, params={"x": torch.randn(5, dtype=torch.float64)}
    )
    for solve in (sk.lanczos, sk.power_iteration):
        result = solve(H, tol=1e-6, max_matvecs=2000)
        assert abs(float(result.eigenvalues[0]) - 2.0) <= 1e-5, solve.__name__


def test_wrong_vectors_are_refused_with_what_was_wrong() -> None:
    H = operator(double(mlp()))
    with pytest.raises(ValueError, match=rf"v must be \[{H.n}\].*got \[3\]"):
        H.matvec(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"float64 on cpu, got torch.float32"):
        H.matvec(torch.zeros(H.n))
    with pytest.raises(ValueError, match=r"float64 on cpu, got torch.float64 on meta"):
        H.matvec(torch.zeros(H.n, dtype=torch.float64, device="meta"))
    with pytest.raises(ValueError, match=r"V must be"):
        H.matmat(torch.zeros(H.n, dtype=torch.float64))


def test_bad_batches_losses_and_parameters_are_refused() -> None:
    model, loss_fn, (x, y) = double(mlp())
    with pytest.raises(ValueError, match=r"batch is empty: a tensor has shape \[0, 5\]"):
        sk.HessianOperator(model, loss_fn, (x[:0], y[:0]))
    with pytest.raises(ValueError, match="batch is on meta"):
        sk.HessianOperator(model, loss_fn, (x.to("meta"), y))
    with pytest.raises(ValueError, match=r"floating scalar, got shape \[9\]"):
        sk.HessianOperator(model, lambda z, t: F.cross_entropy(z, t, reduction="none"), (x, y))
    with pytest.raises(ValueError, match="not among the model's parameters: \\['5.weight'\\]"):
        sk.HessianOperator(model, loss_fn, (x, y), params=["5.weight"])
    with pytest.raises(ValueError, match="no parameter is selected"):
        sk.HessianOperator(copy.deepcopy(model).requires_grad_(False), loss_fn, (x, y))
    with pytest.raises(sk.NonFiniteLossError, match="nan"):
        sk.HessianOperator(model, loss_fn, (x * float("nan"), y))
    H = sk.HessianOperator(model, loss_fn, (x, y))
    other = torch.optim.Adam(nn.Linear(2, 2).double().parameters())
    with pytest.raises((ValueError, RuntimeError)):
        sk.PreconditionedOperator(H, sk.preconditioner(other))
