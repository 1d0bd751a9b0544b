"""The empirical Fisher matrix against explicit gradients of one example after another."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import TinyGPT, cnn, double, mlp, randomise, relative
from test_losses import Classifier, Plain, data, from_logits
from torch import Tensor, nn

import sharpkern as sk

F64 = torch.float64


def explicit(model: nn.Module, losses: list[Callable[[], Tensor]]) -> Tensor:
    """(1/B) sum g g' from the gradient of each example's own loss."""
    rows = []
    for loss in losses:
        parts = torch.autograd.grad(loss(), list(model.parameters()), materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in parts]))
    G = torch.stack(rows)
    return G.t() @ G / len(G)


def of_pairs(model: nn.Module, loss_fn: Any, x: Tensor, y: Tensor) -> Tensor:
    return explicit(model, [lambda i=i: loss_fn(model(x[i : i + 1]), y[i : i + 1]) for i in range(len(x))])


def test_matrix_of_an_mlp_is_that_of_explicit_gradients() -> None:
    model, loss_fn, (x, y) = double(mlp())
    A = sk.EmpiricalFisherOperator(model, loss_fn, (x, y))
    want = of_pairs(model, loss_fn, x, y)
    assert relative(A.to_dense(), want) <= 1e-10
    V = torch.randn(A.n, 3, dtype=F64)
    assert relative(A.quadratic_form(V), (V * (want @ V)).sum(0)) <= 1e-10
    with torch.no_grad():
        assert A.loss == pytest.approx(float(loss_fn(model(x), y)), rel=1e-12)
    assert sk.trace(A, A.n).value == pytest.approx(float(want.trace()), rel=1e-10)
    top = sk.lanczos(A, k=2, tol=1e-8)
    assert relative(top.eigenvalues, torch.linalg.eigvalsh(want).flip(0)[:2]) <= 1e-6
    last = sk.EmpiricalFisherOperator(model, loss_fn, (x, y), params=["4.weight", "4.bias"])
    assert relative(last.to_dense(), want[-last.n :, -last.n :]) <= 1e-10


def test_convolutions_with_batch_norm_in_evaluation_mode() -> None:
    model, loss_fn, (x, y) = double(cnn())
    model.eval()
    assert (
        relative(sk.EmpiricalFisherOperator(model, loss_fn, (x, y)).to_dense(), of_pairs(model, loss_fn, x, y)) <= 1e-10
    )


def test_a_language_models_examples_are_its_sequences() -> None:
    model = randomise(TinyGPT()).double()
    tokens = torch.randint(0, 13, (4, 8))

    def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    A = sk.EmpiricalFisherOperator(model, loss_fn, (tokens[:, :-1], tokens[:, 1:]))
    want = of_pairs(model, loss_fn, tokens[:, :-1], tokens[:, 1:])
    V = torch.randn(A.n, 3, dtype=F64)
    assert relative(A @ V, want @ V) <= 1e-10


@pytest.mark.parametrize("loss_fn", [nn.MSELoss(), nn.MSELoss(reduction="sum"), nn.L1Loss(), nn.HuberLoss()])
def test_losses_of_every_reduction_and_outputs_of_one_dimension(loss_fn: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)).double()
    x, y = torch.randn(6, 3, dtype=F64), torch.randn(6, dtype=F64)
    assert (
        relative(sk.EmpiricalFisherOperator(model, loss_fn, (x, y)).to_dense(), of_pairs(model, loss_fn, x, y)) <= 1e-10
    )


@pytest.mark.parametrize("form", [dict, Plain, lambda **kw: tuple(kw.values())[-1]])
@pytest.mark.parametrize("eager_only", [False, True])
def test_dict_batches_and_models_with_a_loss_of_their_own(form: Any, eager_only: bool) -> None:
    model, batch = Classifier(form, eager_only=eager_only).double(), data()

    def loss_fn(output: Any, batch: Any) -> Tensor:
        return from_logits(output if not isinstance(output, Tensor) else {"logits": output}, batch)

    rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(7)]
    want = explicit(model, [lambda row=row: loss_fn(model(**row), row) for row in rows])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "sharpkern: this model does not export")
        A = sk.EmpiricalFisherOperator(model, loss_fn, batch)
    assert relative(A.to_dense(), want) <= 1e-10
    model_loss = {dict: lambda output, _: output["loss"], Plain: lambda output, _: output["loss"]}.get(form)
    if model_loss is not None:
        with pytest.raises(ValueError, match="computes the loss itself"):
            sk.EmpiricalFisherOperator(model, model_loss, batch)


def test_several_outputs_of_which_one_is_not_used() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"a": self.a(x), "unused": self.b(x), "rest": (self.c(x), torch.arange(len(x)))}

    model, x, y = Two().double(), torch.randn(5, 3, dtype=F64), torch.randn(5, 2, dtype=F64)

    def loss_fn(out: dict[str, Any], y: Tensor) -> Tensor:
        return (out["a"] * out["rest"][0] - y).square().sum(1).mean()

    A = sk.EmpiricalFisherOperator(model, loss_fn, (x, y))
    assert relative(A.to_dense(), of_pairs(model, loss_fn, x, y)) <= 1e-10


def test_refresh_follows_parameters_batch_and_frozen_layers() -> None:
    model, loss_fn, (x, y) = double(mlp())
    A = sk.EmpiricalFisherOperator(model, loss_fn, (x, y))
    with torch.no_grad():
        model[0].weight.add_(0.3)
    with pytest.raises(RuntimeError, match="refresh"):
        A @ torch.ones(A.n, dtype=F64)
    x, y = torch.randn(4, 5, dtype=F64), torch.randint(0, 3, (4,))
    A.refresh((x, y))
    want = of_pairs(model, loss_fn, x, y)
    assert relative(A.to_dense(), want) <= 1e-10
    with torch.no_grad():
        model[4].bias.add_(torch.randn(3, dtype=F64))
    A.refresh()  # the slopes have changed, although the last layer's Jacobian has not
    assert relative(A.to_dense(), of_pairs(model, loss_fn, x, y)) <= 1e-10
    want = of_pairs(model, loss_fn, x, y)
    model[0].requires_grad_(False)
    A.refresh()
    assert A.n == len(want) - 42 == sum(p.numel() for p in A.params.values())
    assert relative(A.to_dense(), want[42:, 42:]) <= 1e-10


@pytest.mark.parametrize("which", [0, 1])
def test_a_batch_changed_in_place_is_noticed(which: int) -> None:
    model, loss_fn, batch = double(mlp())
    A = sk.EmpiricalFisherOperator(model, loss_fn, batch)
    batch[which].zero_()
    with pytest.raises(RuntimeError, match="refresh"):
        A @ torch.ones(A.n, dtype=F64)
    A.refresh()
    assert relative(A.to_dense(), of_pairs(model, loss_fn, *batch)) <= 1e-10


def test_products_in_lower_precision() -> None:
    model, loss_fn, (x, y) = double(mlp())
    want = of_pairs(model, loss_fn, x, y)
    A = sk.EmpiricalFisherOperator(model.float(), loss_fn, (x.float(), y))
    assert A.dtype == torch.float32
    assert relative(A.to_dense().double(), want) <= 1e-4
    A = sk.EmpiricalFisherOperator(model.bfloat16(), loss_fn, (x.bfloat16(), y))
    assert relative(A.to_dense().double(), want) <= 0.1


def test_one_example_is_a_matrix_of_rank_one() -> None:
    model, loss_fn, (x, y) = double(mlp())
    A = sk.EmpiricalFisherOperator(model, loss_fn, (x[:1], y[:1]))
    g = sk.HessianOperator(model, loss_fn, (x[:1], y[:1])).gradient
    assert relative(A.to_dense(), g[:, None] * g) <= 1e-10


class Centred(nn.Module):
    """Examples depend on each other, without batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.BatchNorm1d(4), r"'1' \(BatchNorm1d\) normalises over the batch.*model.eval\(\)"),
        (nn.BatchNorm1d(4, track_running_stats=False).eval(), "normalises over the batch"),
        (nn.Dropout(0.1), r"draws random numbers.*model.eval\(\)"),
        (Centred(), "first example another output when it is alone"),
        (nn.Flatten(0), r"an output of shape \[24\] for 6 examples"),
    ],
)
def test_models_whose_examples_are_not_apart_are_refused(layer: nn.Module, words: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), layer).double()
    x, y = torch.randn(6, 3, dtype=F64), torch.randn(6, 4, dtype=F64)
    state, buffers = torch.get_rng_state(), {name: b.clone() for name, b in model.named_buffers()}
    with pytest.raises(ValueError, match=words):
        sk.EmpiricalFisherOperator(model, lambda out, t: (out.view(-1, 4) - t).square().mean(), (x, y))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_bad_batches_and_losses_are_refused() -> None:
    model, loss_fn, (x, y) = double(mlp())
    with pytest.raises(ValueError, match=r"one row for each example, got shapes \[\[9, 5\], \[4\]\]"):
        sk.EmpiricalFisherOperator(model, loss_fn, (x, y[:4]))
    with pytest.raises(ValueError, match=r"one row for each example, got shapes \[\[0, 5\], \[0\]\]"):
        sk.EmpiricalFisherOperator(model, loss_fn, (x[:0], y[:0]))
    with pytest.raises(ValueError, match="scalar tensor that depends on"):
        sk.EmpiricalFisherOperator(model, lambda out, t: F.cross_entropy(out, t, reduction="none"), (x, y))
    with pytest.raises(ValueError, match="scalar tensor that depends on"):
        sk.EmpiricalFisherOperator(model, lambda out, t: torch.ones(()), (x, y))
    with pytest.raises(ValueError, match="needs a model"):
        sk.EmpiricalFisherOperator(None, lambda p, b: p["x"].sum(), x)
    bad = x.clone()
    bad[3] = float("nan")
    with pytest.raises(sk.NonFiniteLossError, match="nan"):
        sk.EmpiricalFisherOperator(model, loss_fn, (bad, y))
