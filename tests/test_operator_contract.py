"""What every operator owes a solver, by class: symmetry, linearity, block = columns, forms, dtypes; and its truth.

The truths are central differences of plain torch functions in float64, so that no second derivative of torch's or ours
is in them. A new class of operator without a line in ``OPERATORS`` fails.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from problems import Problem, cast, randomise
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sharpkern as sk
from sharpkern.curvature.base import BaseOperator, ParameterOperator
from sharpkern.curvature.chunked import ChunkedHessian, MicroBatches
from sharpkern.curvature.distributed.replicated import DataParallelGGN, DataParallelHessian
from sharpkern.curvature.distributed.sharded import ShardedGGN, ShardedHessian
from sharpkern.curvature.fisher import EmpiricalFisherOperator
from sharpkern.curvature.negative import NegativeOperator
from sharpkern.curvature.operators import LossCurvature
from sharpkern.spectrum.layers import BlockOperator

ROWS = 6
STEP = 1e-5  # of the differences: their error is about 1e-10


def problem() -> Problem:
    """A model of 36 parameters, with a loss that is not quadratic, in float64."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
    batch = torch.randn(ROWS, 3), torch.randint(0, 4, (ROWS,))
    return cast(Problem(randomise(model), nn.functional.cross_entropy, batch), torch.float64)


class Truth:
    """Functions of the flat parameters, and matrices from their differences."""

    def __init__(self, p: Problem) -> None:
        self.p, self.names = p, [name for name, _ in p.model.named_parameters()]
        self.shapes = [t.shape for t in p.model.parameters()]
        self.theta = torch.cat([t.detach().flatten() for t in p.model.parameters()])

    def outputs(self, theta: Tensor) -> Tensor:
        parts = theta.split([s.numel() for s in self.shapes])
        values = {n: t.view(s) for n, t, s in zip(self.names, parts, self.shapes, strict=True)}
        return torch.func.functional_call(self.p.model, values, (self.p.batch[0],))

    def gradient(self, theta: Tensor) -> Tensor:
        theta = theta.clone().requires_grad_()
        return torch.autograd.grad(self.p.loss_fn(self.outputs(theta), self.p.batch[1]), theta)[0]

    def hessian(self) -> Tensor:
        return differences(self.gradient, self.theta)

    def ggn(self) -> Tensor:
        J = differences(lambda t: self.outputs(t).flatten(), self.theta)
        z = self.outputs(self.theta).detach()

        def slope(flat: Tensor) -> Tensor:
            flat = flat.clone().requires_grad_()
            return torch.autograd.grad(self.p.loss_fn(flat.view_as(z), self.p.batch[1]), flat)[0]

        return J @ differences(slope, z.flatten()) @ J.t()

    def fisher(self) -> Tensor:
        theta = self.theta.clone().requires_grad_()
        losses = [self.p.loss_fn(self.outputs(theta)[i : i + 1], self.p.batch[1][i : i + 1]) for i in range(ROWS)]
        g = torch.stack([torch.autograd.grad(loss, theta)[0] for loss in losses])
        return g.t() @ g / ROWS


def differences(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Row i: the derivative of the function's values by number i."""
    rows = []
    for i in range(len(at)):
        step = torch.zeros_like(at)
        step[i] = STEP
        rows.append((function(at + step) - function(at - step)).detach() / (2 * STEP))
    return torch.stack(rows)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-3)
    for p in model.parameters():
        optimizer.state[p] = {
            "step": torch.tensor(5.0),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.linspace(0.1, 2, p.numel(), dtype=p.dtype).view_as(p),
        }
    return optimizer


def scaled(truth: Truth) -> Tensor:
    """Adam's P by its formula: (1 - beta1^t) (sqrt(v / (1 - beta2^t)) + eps)."""
    v = torch.cat([torch.linspace(0.1, 2, s.numel(), dtype=torch.float64) for s in truth.shapes])
    root = ((1 - 0.9**5) * ((v / (1 - 0.999**5)).sqrt() + 1e-3)).rsqrt()
    return root[:, None] * truth.hessian() * root


def sharded(p: Problem, kind: Any) -> Any:
    fully_shard(p.model, mesh=init_device_mesh("cpu", (1,)))
    return kind(*p)


class Case(NamedTuple):
    make: Callable[[Problem], BaseOperator]
    truth: Callable[[Truth], Tensor]
    alone: bool = True  # False: processes share it, here one


OPERATORS: dict[type[BaseOperator], Case] = {
    sk.HessianOperator: Case(lambda p: sk.HessianOperator(*p), Truth.hessian),
    sk.GGNOperator: Case(lambda p: sk.GGNOperator(*p), Truth.ggn),
    EmpiricalFisherOperator: Case(lambda p: EmpiricalFisherOperator(*p), Truth.fisher),
    NegativeOperator: Case(lambda p: NegativeOperator(sk.HessianOperator(*p)), lambda t: -t.hessian()),
    sk.PreconditionedOperator: Case(
        lambda p: sk.PreconditionedOperator(sk.HessianOperator(*p), sk.preconditioner(optimizer_of(p.model))), scaled
    ),
    BlockOperator: Case(
        lambda p: BlockOperator(sk.HessianOperator(*p), ["2.bias", "0.weight"]),
        lambda t: t.hessian()[(i := [*range(12), *range(32, 36)])][:, i],
    ),
    ChunkedHessian: Case(lambda p: ChunkedHessian(p.model, p.loss_fn, MicroBatches.split(p.batch, 4)), Truth.hessian),
    sk.DatasetHessian: Case(
        lambda p: sk.DatasetHessian(p.model, p.loss_fn, [tuple(t[i : i + 4] for t in p.batch) for i in (0, 4)]),
        Truth.hessian,
    ),
    DataParallelHessian: Case(lambda p: DataParallelHessian(*p), Truth.hessian, alone=False),
    DataParallelGGN: Case(lambda p: DataParallelGGN(*p), Truth.ggn, alone=False),
    ShardedHessian: Case(lambda p: sharded(p, ShardedHessian), Truth.hessian, alone=False),
    ShardedGGN: Case(lambda p: sharded(p, ShardedGGN), Truth.ggn, alone=False),
}
BASES = {ParameterOperator, LossCurvature}  # have no products of their own
IDS = [kind.__name__ for kind in OPERATORS]


def subclasses(kind: type) -> set[type]:
    below = {c for c in kind.__subclasses__() if c.__module__.startswith("sharpkern.")}
    return below.union(*(subclasses(c) for c in below))


def test_every_operator_is_here() -> None:
    assert subclasses(BaseOperator) - BASES == set(OPERATORS), "a new operator needs a line in OPERATORS"


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


class Made(NamedTuple):
    case: Case
    p: Problem
    truth: Tensor
    A: Any


@pytest.fixture(scope="module", params=OPERATORS.values(), ids=IDS)
def made(request: pytest.FixtureRequest) -> Made:
    """One operator of each class for all tests: its export takes longer than they do."""
    if not request.param.alone:
        request.getfixturevalue("one_process")
    p = problem()
    truth = request.param.truth(Truth(p))
    return Made(request.param, p, truth, request.param.make(p))


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    error = float((got.double() - want.double()).abs().max()) / float(want.double().abs().max())
    assert error <= tolerance


def test_matrix_is_that_of_finite_differences(made: Made) -> None:
    A, truth = made.A, made.truth
    V = torch.randn(A.n, 3, dtype=torch.float64)
    close(A @ V, truth @ V, 1e-7)
    assert A.shape == (len(truth), len(truth))


def test_products_are_symmetric_linear_and_the_same_in_blocks(made: Made) -> None:
    A = made.A
    V, W = torch.randn(2, A.n, 5, dtype=torch.float64)
    AV, AW = A @ V, A @ W
    close(W.t() @ AV, (V.t() @ AW).t(), 1e-11)
    a, b = torch.randn(2, dtype=torch.float64)
    close(A @ (a * V - b * W), a * AV - b * AW, 1e-11)
    for i in range(5):
        close(A @ V[:, i], AV[:, i], 1e-11)
    close(A @ V[:, 1:2], AV[:, 1:2], 1e-11)
    close(A @ V[:, [3, 0]], AV[:, [3, 0]], 1e-11)
    assert torch.equal(A @ torch.zeros(A.n, 2, dtype=torch.float64), torch.zeros(A.n, 2, dtype=torch.float64))
    assert (A @ V[:, :0]).shape == (A.n, 0)
    before = V.clone()
    assert torch.equal(A @ V, AV) or float((A @ V - AV).abs().max()) <= 1e-12 * float(AV.abs().max())
    assert torch.equal(V, before), "a product must not write to its argument"


def test_forms_are_those_of_the_products(made: Made) -> None:
    A = made.A
    V = torch.randn(A.n, 4, dtype=torch.float64)
    forms = A.quadratic_form(V)
    assert forms.dtype == torch.float64
    close(forms, (V * (A @ V)).sum(0), 1e-10)
    close(A.quadratic_form(V[:, 2]), forms[2], 1e-10)


def test_float32_is_kept_and_close_to_float64(made: Made) -> None:
    p = problem()  # of its own, for some operators change the model
    truth = made.case.truth(Truth(p))
    A = made.case.make(cast(p, torch.float32))
    assert A.dtype == torch.float32
    V = torch.randn(A.n, 3)
    product = A @ V
    assert product.dtype == torch.float32
    assert A.quadratic_form(V).dtype == torch.float64
    close(product, truth @ V.double(), 1e-4)
    with pytest.raises(ValueError, match="must be torch.float32 on cpu, got torch.float64"):
        A @ V.double()
    array = A @ V.numpy()
    assert isinstance(array, np.ndarray) and array.dtype == np.float32
    np.testing.assert_array_equal(array, product.numpy())
    for wrong in (torch.randn(A.n + 1), torch.randn(A.n - 1, 2)):
        with pytest.raises(ValueError, match="for this operator, got"):
            A @ wrong
