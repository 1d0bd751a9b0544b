"""Gauss-Newton matrices of models that compute a loss of their own, as Hugging Face's do."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from problems import relative
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import sharpkern as sk
from sharpkern.rop import ReplayedProgram

F64 = torch.float64


class Output(OrderedDict):
    """A dict with attributes, registered with pytree: the form that Hugging Face's models return."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


pytree.register_pytree_node(
    Output, lambda o: (list(o.values()), list(o)), lambda values, names: Output(zip(names, values, strict=True))
)


class Plain(UserDict):
    """A mapping that pytree does not know."""


class Pair(NamedTuple):
    loss: Tensor
    logits: Tensor


class Classifier(nn.Module):
    """Computes a loss of its own where it is given labels."""

    def __init__(self, form: Any = Output, *, eager_only: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.form, self.eager_only = nn.Linear(4, 5), nn.Linear(5, 3), form, eager_only

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        hidden = torch.tanh(self.first(input_ids))
        if self.eager_only and float(hidden.detach().sum()) > 1e9:  # a branch on a value does not export
            hidden = hidden + 1
        logits = self.second(hidden)
        own = {} if labels is None else {"loss": F.cross_entropy(logits, labels)}
        return self.form(**own, logits=logits)


def data() -> dict[str, Tensor]:
    return {"input_ids": torch.randn(7, 4, dtype=F64), "labels": torch.randint(0, 3, (7,))}


def from_logits(output: Any, batch: Any) -> Tensor:
    return F.cross_entropy(output["logits"], batch["labels"])


def by_hand(model: Classifier, batch: dict[str, Tensor]) -> Tensor:
    """J' C J with an explicit Jacobian of the logits and the closed form of the softmax's curvature."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def logits(p: dict[str, Tensor]) -> Tensor:
        h = torch.tanh(F.linear(batch["input_ids"], p["first.weight"], p["first.bias"]))
        return F.linear(h, p["second.weight"], p["second.bias"])

    parts = torch.func.jacrev(logits)(params)
    J = torch.cat([part.flatten(2) for part in parts.values()], 2)
    p = logits(params).softmax(1)
    C = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / len(p)
    return torch.einsum("bin,bij,bjm->nm", J, C, J)


@pytest.mark.parametrize("form", [Output, dict, Plain])
def test_a_loss_from_the_logits_beside_the_models_own(form: type) -> None:
    model, batch = Classifier(form).double(), data()
    G = sk.GGNOperator(model, from_logits, batch)
    assert isinstance(G.engine, ReplayedProgram)
    assert relative(G.to_dense(), by_hand(model, batch)) <= 1e-10
    with torch.no_grad():
        assert float(G.loss) == pytest.approx(float(model(**batch)["loss"]), rel=1e-12)
    V = torch.randn(G.n, 2, dtype=F64)
    assert relative(G.quadratic_form(V), (V * (by_hand(model, batch) @ V)).sum(0)) <= 1e-10
    with torch.no_grad():
        model.first.weight.mul_(1.3)
    other = data()
    G.refresh(other)
    assert relative(G.to_dense(), by_hand(model, other)) <= 1e-10


@pytest.mark.parametrize("form", [Output, dict, Plain])
def test_the_same_through_double_backward(form: type) -> None:
    model, batch = Classifier(form, eager_only=True).double(), data()
    with pytest.warns(UserWarning, match="does not export"):
        G = sk.GGNOperator(model, from_logits, batch)
    assert relative(G.to_dense(), by_hand(model, batch)) <= 1e-10


def test_a_tuple_with_a_loss_and_labels_apart() -> None:
    model, batch = Classifier(lambda **kw: tuple(kw.values())).double(), data()
    G = sk.GGNOperator(model, lambda output, b: F.cross_entropy(output[1], b["labels"]), batch)
    assert relative(G.to_dense(), by_hand(model, batch)) <= 1e-10
    inputs, labels = {"input_ids": batch["input_ids"]}, batch["labels"]
    G = sk.GGNOperator(model, lambda output, t: F.cross_entropy(output[0], t), (inputs, labels))
    assert relative(G.to_dense(), by_hand(model, batch)) <= 1e-10


@pytest.mark.parametrize(
    ("form", "loss_fn"),
    [
        (Output, lambda output, batch: output.loss),
        (Output, lambda output, batch: 2 * output.loss + 0.1 * output.logits.square().mean()),
        (Output, lambda output, batch: output.loss.square()),
        (dict, lambda output, batch: output["loss"]),
        (Plain, lambda output, batch: output["loss"] * 1.0),
        (Pair, lambda output, batch: output.loss / 3),
        (Pair, lambda output, batch: output[0] + output[1].square().mean()),
    ],
)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("eager_only", [False, True])
def test_the_models_own_loss_is_no_output_to_split_at(form: Any, loss_fn: Any, eager_only: bool, grad: bool) -> None:
    model = Classifier(form, eager_only=eager_only).double()
    words = r"computes the loss itself.*loss_fn = lambda output, batch: F.cross_entropy"
    with pytest.raises(ValueError, match=words), torch.set_grad_enabled(grad):
        sk.GGNOperator(model, loss_fn, data())
    H = sk.HessianOperator(Classifier(form).double(), loss_fn, data())  # the Hessian needs no split
    assert float(H.gradient.norm()) > 0


def test_a_scalar_output_that_is_no_loss_is_split_at() -> None:
    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).sum()

    model, x = Energy().double(), torch.randn(5, 4, dtype=F64)
    G = sk.GGNOperator(model, lambda e, t: (e - t).square(), (x, torch.randn((), dtype=F64)))
    s = x.sum(0)
    assert relative(G.to_dense(), 2 * s[:, None] * s) <= 1e-12


def test_a_loss_that_changes_its_input_in_place_is_looked_at_too() -> None:
    model, batch = Classifier(Pair).double(), data()

    def loss_fn(output: Pair, batch: dict[str, Tensor]) -> Tensor:
        shifted = output.logits
        shifted -= shifted.max(1, keepdim=True).values.detach()
        return F.cross_entropy(shifted, batch["labels"])

    G = sk.GGNOperator(model, loss_fn, batch)
    assert relative(G.to_dense(), by_hand(model, batch)) <= 1e-10
