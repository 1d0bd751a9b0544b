"""The exported program on the constructs that make second derivatives go wrong in silence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from problems import Problem, dense_hessian, hessian_times, loss_and_gradient, operator, randomise
from problems import relative as error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sharpkern as sk
from sharpkern.rop import ReplayedProgram
from sharpkern.rop.double_backward import DoubleBackward


class Wrapped(nn.Module):
    """Linear layer, a function under test, linear layer."""

    def __init__(self, middle, width: int = 6) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, width), nn.Linear(width, 3)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(torch.tanh(self.first(x))))


def problem_of(middle) -> Problem:
    model = randomise(Wrapped(middle)).double()
    return Problem(model, F.cross_entropy, (torch.randn(5, 4).double(), torch.randint(0, 3, (5,))))


def agrees(problem: Problem, tolerance: float = 1e-10) -> sk.HessianOperator:
    H = operator(problem)
    assert isinstance(H._engine, ReplayedProgram)
    V = torch.randn(2, H.n, dtype=torch.float64)
    _, gradient = loss_and_gradient(problem)
    assert error(H.gradient, gradient.detach()) <= tolerance
    assert error(H.matmat(V.t()).t(), hessian_times(problem, V)) <= tolerance
    return H


def add_in_place(x: Tensor) -> Tensor:
    y = x * 2
    y += x.sin()
    y[..., 0] = y[..., 1].clone() * y[..., 2].clone()
    y[:, 3:5].mul_(x[:, :2])
    return y


def rotate_with_slices(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[..., ::2] = x[..., 1::2].exp()
    y[..., 1::2] = -x[..., ::2]
    return y


def no_grad_statistics(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.std()
    return x / scale + x.detach().mean() * x


def relu_in_place(x: Tensor) -> Tensor:
    return F.relu(x + 0.1, inplace=True)


def checkpointed(x: Tensor) -> Tensor:
    return checkpoint(lambda t: torch.sigmoid(t) * t, x, use_reentrant=False)


@pytest.mark.parametrize(
    "middle",
    [add_in_place, rotate_with_slices, no_grad_statistics, checkpointed, relu_in_place],
    ids=["in-place", "slice assignment", "no_grad", "checkpoint", "relu in place"],
)
def test_construct_is_differentiated_as_autograd_does_twice(middle) -> None:
    agrees(problem_of(middle))


@pytest.mark.parametrize(
    "middle", [nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.BatchNorm1d(6)], ids=lambda m: type(m).__name__
)
def test_norm_is_differentiated_as_autograd_does_twice(middle) -> None:
    agrees(problem_of(randomise(middle)))


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.MSELoss(),
        nn.HuberLoss(delta=0.3),
        nn.SmoothL1Loss(),
        nn.SoftMarginLoss(),
        nn.KLDivLoss(reduction="sum"),
    ],
    ids=lambda f: type(f).__name__,
)
def test_loss_is_differentiated_as_autograd_does_twice(loss_fn: nn.Module) -> None:
    model, _, (x, _) = problem_of(nn.Identity())
    agrees(Problem(model, loss_fn, (x, torch.rand(5, 3).double())))


def finite_difference(problem: Problem, v: Tensor) -> Tensor:
    """Differences of autograd's gradients, to fourth order: the truth where autograd's second derivative is wrong."""
    params = list(problem.model.parameters())
    start = nn.utils.parameters_to_vector(params).detach()

    def gradient(shift: float) -> Tensor:
        nn.utils.vector_to_parameters(start + shift * v, params)
        return loss_and_gradient(problem)[1].detach()

    def central(h: float) -> Tensor:
        return (gradient(h) - gradient(-h)) / (2 * h)

    truth = (4 * central(1e-4) - central(2e-4)) / 3
    nn.utils.vector_to_parameters(start, params)
    return truth


def test_weight_norm_is_right_although_torchs_double_backward_is_not() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3)).double()
    problem = Problem(model, F.cross_entropy, (torch.randn(5, 4).double(), torch.randint(0, 3, (5,))))
    H = operator(problem)
    v = torch.randn(H.n, dtype=torch.float64)
    truth = finite_difference(problem, v)
    H.refresh()
    assert error(H @ v, truth) <= 1e-8
    assert error(hessian_times(problem, v[None])[0], truth) >= 1e-4, "torch has mended weight_norm: update the docs"


def test_dropout_mask_is_the_same_for_every_product_and_new_after_refresh() -> None:
    H = operator(problem_of(nn.Dropout(0.5)))
    v = torch.randn(H.n, dtype=torch.float64)
    first = H @ v
    assert torch.equal(H @ v, first)
    eye = torch.eye(H.n, dtype=torch.float64)
    dense = H @ eye
    assert error(dense, dense.T) <= 1e-10
    losses = {float(H.loss)}
    for _ in range(3):
        H.refresh()
        losses.add(float(H.loss))
    assert len(losses) > 1


def test_dropout_gradient_matches_autograd_under_the_same_seed() -> None:
    problem = problem_of(nn.Dropout(0.3))
    torch.manual_seed(5)
    H = operator(problem)
    torch.manual_seed(5)
    loss, gradient = loss_and_gradient(problem)
    torch.manual_seed(5)
    H.refresh()
    assert abs(float(H.loss - loss)) <= 1e-12
    assert error(H.gradient, gradient.detach()) <= 1e-10


def test_batch_norm_statistics_change_only_when_asked_and_once_per_refresh() -> None:
    problem = problem_of(nn.BatchNorm1d(6))
    norm = problem.model.middle
    before = norm.running_mean.clone()
    H = operator(problem)
    H @ torch.randn(H.n, 3, dtype=torch.float64)
    assert torch.equal(norm.running_mean, before)
    reference = torch.nn.BatchNorm1d(6).double()
    with torch.no_grad():
        reference(torch.tanh(problem.model.first(problem.batch[0])))
    H.refresh(update_buffers=True)
    assert error(norm.running_mean, reference.running_mean) <= 1e-12
    assert error(norm.running_var, reference.running_var) <= 1e-12
    assert int(norm.num_batches_tracked) == 1


def test_mode_switch_is_noticed() -> None:
    problem = problem_of(nn.BatchNorm1d(6))
    H = operator(problem)
    problem.model.eval()
    H.refresh()
    V = torch.randn(1, H.n, dtype=torch.float64)
    assert error(H.matmat(V.t()).t(), hessian_times(problem, V)) <= 1e-10


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.a(torch.tanh(self.b(x))) + x @ self.a.weight


def test_tied_weights_accumulate() -> None:
    model = Tied().double()
    H = agrees(Problem(model, F.mse_loss, (torch.randn(5, 4).double(), torch.randn(5, 4).double())))
    assert H.n == 4 * 4 + 4 + 4


def test_parameter_without_influence_has_zero_rows() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "idle": nn.Linear(2, 2)}).double()
    model.forward = lambda x: model["used"](x)
    problem = Problem(model, F.cross_entropy, (torch.randn(5, 4).double(), torch.randint(0, 3, (5,))))
    H = operator(problem)
    dense = H @ torch.eye(H.n, dtype=torch.float64)
    assert error(dense, dense_hessian(problem)) <= 1e-10
    assert torch.equal(dense[-6:], torch.zeros(6, H.n, dtype=torch.float64))


def test_op_without_a_rule_goes_through_the_fallback_and_is_right() -> None:
    H = agrees(problem_of(lambda x: torch.special.i0(x) + torch.cumprod(x + 2, 1)))
    assert H.fallback_ops


def test_recurrent_network_is_right() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.lstm(x)[0][:, -1])

    model = Recurrent().double()
    agrees(Problem(model, F.cross_entropy, (torch.randn(3, 5, 3).double(), torch.randint(0, 2, (3,)))), 1e-9)


def test_random_op_without_a_rule_goes_through_autograd_and_keeps_its_noise() -> None:
    with pytest.warns(UserWarning, match="rrelu"):
        H = operator(problem_of(nn.RReLU()))
    dense = H @ torch.eye(H.n, dtype=torch.float64)
    assert error(dense, dense.T) <= 1e-10
    assert torch.equal(dense, H @ torch.eye(H.n, dtype=torch.float64))


def data_dependent(x: Tensor) -> Tensor:
    return x.exp() if x.detach().sum().item() > -1e9 else x.sin()


def test_model_that_does_not_export_says_so_and_is_right() -> None:
    problem = problem_of(data_dependent)
    with pytest.warns(UserWarning, match="does not export"):
        H = operator(problem)
    assert isinstance(H._engine, DoubleBackward)
    V = torch.randn(3, H.n, dtype=torch.float64)
    assert error(H.matmat(V.t()).t(), hessian_times(problem, V)) <= 1e-10
    assert error(H.gradient, loss_and_gradient(problem)[1].detach()) <= 1e-12


def test_autograd_engine_gives_the_same_ggn() -> None:
    smooth = problem_of(torch.exp)
    branching = Problem(Wrapped(data_dependent).double(), smooth.loss_fn, smooth.batch)
    branching.model.load_state_dict(smooth.model.state_dict())
    with pytest.warns(UserWarning, match="does not export"):
        G = sk.GGNOperator(*branching)
    eye = torch.eye(G.n, dtype=torch.float64)
    assert error(G @ eye, sk.GGNOperator(*smooth) @ eye) <= 1e-10


def test_autograd_engine_keeps_the_dropout_mask() -> None:
    problem = problem_of(lambda x: F.dropout(data_dependent(x), 0.5))
    with pytest.warns(UserWarning, match="does not export"):
        H = operator(problem)
    dense = H @ torch.eye(H.n, dtype=torch.float64)
    assert error(dense, dense.T) <= 1e-10


def test_autograd_engine_composes_weight_norm_of_primitives() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)).double()
    batch = torch.randn(5, 4).double(), torch.randint(0, 3, (5,))
    smooth = sk.HessianOperator(nn.Sequential(model, Exponential()), F.cross_entropy, batch)
    with pytest.warns(UserWarning, match="does not export"):
        H = sk.HessianOperator(Branching(model), F.cross_entropy, batch)
    eye = torch.eye(H.n, dtype=torch.float64)
    assert error(H @ eye, smooth @ eye) <= 1e-10


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


class Branching(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return data_dependent(self.inner(x))


def test_compiled_model_is_unwrapped() -> None:
    problem = problem_of(nn.Tanh())
    compiled = torch.compile(problem.model)
    H = sk.HessianOperator(compiled, problem.loss_fn, problem.batch)
    assert list(H.params) == [name for name, _ in problem.model.named_parameters()]
    V = torch.randn(1, H.n, dtype=torch.float64)
    assert error(H.matmat(V.t()).t(), hessian_times(problem, V)) <= 1e-10


def test_autocast_region_is_exported_with_its_casts() -> None:
    def mixed(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (x @ x.new_ones(6, 6)).float()

    model = randomise(Wrapped(mixed))
    problem = Problem(model, F.cross_entropy, (torch.randn(5, 4), torch.randint(0, 3, (5,))))
    H = operator(problem)
    assert isinstance(H._engine, ReplayedProgram)
    v = torch.randn(H.n)
    want = hessian_times(problem, v[None])[0]
    assert float((H @ v - want).norm() / want.norm()) <= 0.1


def test_a_cotangent_that_two_arguments_share_is_not_added_into() -> None:
    """The sum hands one tensor to both arguments; that of ``a`` gets a second part before ``b`` reads its own."""

    def shared(x: Tensor) -> Tensor:
        b = torch.sin(x)
        a = torch.cos(x)
        h = a * a
        return torch.tanh(a + b) * h

    agrees(problem_of(shared))


def test_tangents_are_freed_when_a_product_is_done() -> None:
    problem = problem_of(lambda x: torch.tanh(x) * x.exp())
    H = sk.HessianOperator(*problem)
    program, block = H._engine.program, torch.randn(3, H.n, dtype=torch.float64)
    program.hvp(block, torch.empty_like(block))
    rules = [step.rule for step in program.live]
    assert any(rule.freed_after_reverse for rule in rules)
    assert all(getattr(rule, name, None) is None for rule in rules for name in rule.freed_after_reverse)
