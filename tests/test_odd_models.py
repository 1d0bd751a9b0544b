"""Models at the edges: one example, one parameter, parameters without numbers, a loss that does not depend on any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpkern as sk


class Scalar(nn.Module):
    """One parameter of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.w * x)


class WithEmpty(nn.Module):
    """Parameters without numbers beside others: a layer from nothing, and one to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.alone = nn.Parameter(torch.empty(0))
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        none = x @ self.empty.t()  # [rows, 0]
        return self.last(torch.tanh(self.first(x))) + none.sum() + self.alone.sum() + none.sum(1, keepdim=True)


class Experts(nn.Module):
    """Two experts with norms of their own; the second one gets no token, and computes on zero rows."""

    def __init__(self, norm: Callable[[], nn.Module], routed: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 6), norm(), nn.GELU(), nn.Linear(6, 4), nn.Softmax(-1)) for _ in range(2)
        )
        self.routed = routed

    def forward(self, x: Tensor) -> Tensor:
        if not self.routed:  # by position: shapes are known beforehand
            return torch.cat([self.experts[0](x), self.experts[1](x[len(x) :])])
        to = torch.zeros(len(x), dtype=torch.bool)  # by value: the export cannot know how many there are
        to[: len(x)] = x[:, 0] < 1e9
        y = torch.zeros_like(x)
        y[to] = self.experts[0](x[to])
        y[~to] = self.experts[1](x[~to])
        return y


class Ignored(nn.Module):
    """Its output does not depend on its parameters, but for a factor of zero."""

    def __init__(self, factor: float | None) -> None:
        super().__init__()
        self.layer, self.factor = nn.Linear(3, 2), factor

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2] + (0 if self.factor is None else self.factor * self.layer(x))


def dense(model: nn.Module, loss_fn: Any, batch: Any) -> Tensor:
    """The Hessian by autograd twice."""
    params = [p for p in model.parameters() if p.requires_grad]
    loss = loss_fn(model(batch[0]), batch[1])
    grads = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    rows = [
        torch.cat([r.reshape(-1) for r in torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True)])
        for g in flat
    ]
    return torch.stack(rows) if rows else torch.zeros(0, 0, dtype=flat.dtype)


def check(model: nn.Module, loss_fn: Any, batch: Any) -> sk.HessianOperator:
    """Products and forms, recorded and replayed, of the Hessian; and that nothing is NaN."""
    want = dense(model, loss_fn, batch)
    H = sk.HessianOperator(model, loss_fn, batch)
    scale = max(1e-3, float(want.abs().max()))
    for _ in range(2):
        V = torch.randn(H.n, 3, dtype=H.dtype)
        assert float((H @ V - want @ V).abs().max()) <= 1e-10 * scale
        assert float((H.quadratic_form(V) - (V * (want @ V)).sum(0)).abs().max()) <= 1e-10 * scale * H.n
    assert bool(H.gradient.isfinite().all())
    return H


@pytest.fixture(params=["reference", None], ids=["reference", "chosen"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own ops, or the kernels that are chosen here."""
    if request.param:
        monkeypatch.setenv("SHARPKERN_BACKEND", request.param)


def batch_of(rows: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, width).double(), torch.randint(0, classes, (rows,))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("loss_fn", [F.cross_entropy, lambda z, y: z.square().mean() + 0 * y.sum()])
def test_one_example(loss_fn: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2)).double()
    check(model, loss_fn, batch_of(1, 3, 2))


@pytest.mark.usefixtures("backend")
def test_one_class_one_unit_one_number() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.SiLU(), nn.Linear(1, 1)).double()
    check(model, F.cross_entropy, batch_of(1, 1, 1))
    check(model, lambda z, y: z.square().sum(), batch_of(1, 1, 1))


@pytest.mark.usefixtures("backend")
def test_one_scalar_parameter() -> None:
    x, y = torch.randn(5, 1).double(), torch.randn(5, 1).double()
    model = Scalar().double()
    H = check(model, F.mse_loss, (x, y))
    assert H.n == 1
    found = sk.sharpness(model, F.mse_loss, (x, y))
    assert found.value == pytest.approx(float(H.to_dense()), rel=1e-9, abs=1e-12)


@pytest.mark.usefixtures("backend")
def test_parameters_without_numbers() -> None:
    H = check(WithEmpty().double(), F.cross_entropy, batch_of(6, 4, 2))
    assert H.n == 4 * 3 + 3 + 3 * 2 + 2
    parts = H.unflatten(torch.ones(H.n))
    assert parts["empty"].shape == (0, 4) and parts["alone"].shape == (0,)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(6), lambda: nn.RMSNorm(6)], ids=["layer norm", "rms norm"])
def test_expert_without_tokens(norm: Callable[[], nn.Module]) -> None:
    H = check(Experts(norm, routed=False).double(), F.cross_entropy, batch_of(5, 4, 4))
    assert float(H.to_dense()[H.n // 2 :].abs().max()) == 0.0  # nothing of the second one
    assert not H.fallback_ops


@pytest.mark.filterwarnings("ignore:sharpkern. this model does not export:UserWarning")
def test_expert_without_tokens_routed_by_values() -> None:
    check(Experts(lambda: nn.LayerNorm(6), routed=True).double(), F.cross_entropy, batch_of(5, 4, 4))


def test_no_trainable_parameter_is_refused_by_name() -> None:
    model = nn.Linear(3, 2).double().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter is selected"):
        sk.HessianOperator(model, F.cross_entropy, batch_of(4, 3, 2))
    with pytest.raises(ValueError, match="no parameter is selected"):
        sk.HessianOperator(nn.Flatten(), F.cross_entropy, batch_of(4, 3, 2))


def test_only_parameters_without_numbers_are_refused() -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.empty(0).double())
    model.forward = lambda x: x.sum(1) + model.w.sum()
    with pytest.raises(ValueError, match="hold no numbers"):
        sk.HessianOperator(model, F.mse_loss, (torch.randn(4, 3).double(), torch.randn(4).double()))


def test_loss_that_ignores_all_parameters_is_refused_and_one_of_slope_zero_is_zero() -> None:
    batch = batch_of(4, 3, 2)
    with pytest.raises(ValueError, match="depends on the model; got a constant"):
        sk.HessianOperator(Ignored(None).double(), F.cross_entropy, batch)
    model = Ignored(0.0).double()
    H = check(model, F.cross_entropy, batch)
    assert not H.to_dense().any() and not H.gradient.any()
    assert sk.sharpness(model, F.cross_entropy, batch).value == 0.0


def test_empty_batch_is_refused() -> None:
    x, y = batch_of(4, 3, 2)
    with pytest.raises(ValueError, match=r"batch is empty: a tensor has shape \[0, 3\]"):
        sk.HessianOperator(nn.Linear(3, 2).double(), F.cross_entropy, (x[:0], y[:0]))
