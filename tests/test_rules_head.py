"""A large head and its cross-entropy as one op: the same numbers as apart, and no tangent of all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import Problem, hessian_times, loss_and_gradient
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import sharpkern as sk
from sharpkern.rop.rules import head

TOKENS, WIDTH, CLASSES = 24, 6, 11


class Head(nn.Module):
    """An embedding and a head, on ``[batch, time]`` tokens."""

    def __init__(self, classes: int = CLASSES, width: int = WIDTH, bias: bool = True, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes, width)
        self.inner, self.head = nn.Linear(width, width), nn.Linear(width, classes, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embed(tokens))))


def loss_with(**options: Any) -> Any:
    return lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), **options)


def rules(H: sk.HessianOperator) -> list[type]:
    return [type(step.rule) for step in H._engine.program.live]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LARGE", 1)
    monkeypatch.setattr(head, "_ROWS", 1)
    monkeypatch.setattr(head, "_CHUNK", 60)  # a few tokens, not a divisor of their number


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ({}, {}),
        ({"bias": False}, {"reduction": "sum"}),
        ({"tied": True}, {"label_smoothing": 0.1}),
        ({"tied": True, "bias": False}, {"ignore_index": 3}),
        ({}, {"weight": torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)}),
    ],
    ids=["plain", "no bias", "tied", "tied, ignored", "weighted"],
)
def test_products_agree_with_double_backward(small: None, model: dict, options: dict, k: int) -> None:
    tokens = torch.randint(0, CLASSES, (3, TOKENS // 3 + 1))
    problem = Problem(
        Head(**model).double(), loss_with(**options), (tokens[:, :-1].contiguous(), tokens[:, 1:].clone())
    )
    H = sk.HessianOperator(*problem)
    assert rules(H)[-1] is head.LinearCrossEntropy
    for _ in range(2):
        loss, gradient = (t.detach() for t in loss_and_gradient(problem))
        V = torch.randn(k, H.n, dtype=torch.float64)
        want = hessian_times(problem, V)
        assert float((H.loss - loss).abs()) <= 1e-12
        assert float((H.gradient - gradient).norm()) <= 1e-10 * float(gradient.norm())
        assert float((H.matmat(V.t()).t() - want).norm()) <= 1e-10 * float(want.norm())
        forms = torch.linalg.vecdot(want, V)
        assert float((H.quadratic_form(V.t()) - forms).norm()) <= 1e-10 * float(want.norm() * V.norm())
        with torch.no_grad():
            for p in problem.model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        H.refresh()


def test_tangents_have_the_shapes_that_other_rules_expect(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled kernels see addresses and sizes; the reference would refuse, or broadcast, a wrong shape."""
    monkeypatch.setenv("SHARPKERN_BACKEND", "reference")
    test_products_agree_with_double_backward(small, {}, {}, 3)


@pytest.mark.parametrize("frozen", ["head.weight", "head.bias", "inner.weight"])
def test_parts_that_do_not_move(small: None, frozen: str) -> None:
    tokens = torch.randint(0, CLASSES, (2, 7))
    problem = Problem(Head().double(), loss_with(), (tokens[:, :-1].contiguous(), tokens[:, 1:].clone()))
    problem.model.get_parameter(frozen).requires_grad_(False)
    H = sk.HessianOperator(*problem)
    V = torch.randn(2, H.n, dtype=torch.float64)
    want = hessian_times(problem, V)
    assert float((H.matmat(V.t()).t() - want).norm()) <= 1e-10 * float(want.norm())


def test_small_heads_shared_logits_and_gauss_newton_stay_apart(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(0, CLASSES, (2, 7))
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
    penalised = sk.HessianOperator(Head(), lambda z, y: loss_with()(z, y) + z.square().mean(), batch)
    assert head.LinearCrossEntropy not in rules(penalised)
    ggn = sk.GGNOperator(Head(), loss_with(), batch)
    assert head.LinearCrossEntropy not in rules(ggn)
    monkeypatch.setattr(head, "LARGE", 10**6)
    assert head.LinearCrossEntropy not in rules(sk.HessianOperator(Head(), loss_with(), batch))


def test_a_reshape_that_merges_classes_and_tokens_stays_apart(small: None) -> None:
    """There a row of the loss is a whole sequence, and its classes are all places of it."""
    tokens, target = torch.randint(0, CLASSES, (3, 4)), torch.randint(0, 4 * CLASSES, (3,))
    problem = Problem(Head().double(), lambda z, y: F.cross_entropy(z.flatten(1), y), (tokens, target))
    H = sk.HessianOperator(*problem)
    assert head.LinearCrossEntropy not in rules(H)
    V = torch.randn(2, H.n, dtype=torch.float64)
    want = hessian_times(problem, V)
    assert float((H.matmat(V.t()).t() - want).norm()) <= 1e-10 * float(want.norm())


class _Largest(TorchDispatchMode):
    """Remembers the largest memory that a call asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in pytree.tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return result


def test_no_tangent_is_larger_than_an_eighth_of_the_logits() -> None:
    classes, tokens = 8192, torch.randint(0, 8192, (4, 513))
    model = Head(classes, width=8)
    H = sk.HessianOperator(model, loss_with(), (tokens[:, :-1].contiguous(), tokens[:, 1:].clone()))
    assert rules(H)[-1] is head.LinearCrossEntropy
    v, logits = torch.randn(H.n), 4 * 512 * classes
    H @ v
    with _Largest() as seen:
        H._engine.program.hvp(v[None], torch.empty(1, H.n))
    assert H.n < logits / 8  # so that parameters do not hide what is sought
    assert H.n <= seen.numel <= logits / 8
