"""Operators of one model export it once, as long as nothing has changed that a graph depends on."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import agrees, batch, eager, net
from torch import Tensor, nn

import sharpkern as sk
from sharpkern.curvature import engines
from sharpkern.curvature import exports as kept
from sharpkern.curvature.gate import Verdict
from sharpkern.rop import ReplayedProgram


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The modules exported so far."""
    seen: list[Any] = []
    original = engines.export

    def export(module: nn.Module, given: Any) -> Any:
        seen.append(module)
        return original(module, given)

    monkeypatch.setattr(engines, "export", export)
    return seen


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))


def test_operators_one_after_the_other_export_once_and_are_right(exports: list[Any]) -> None:
    model = net(nn.BatchNorm1d(6), nn.Tanh())
    for _ in range(4):
        moved(model)
        data = batch()
        agrees(sk.HessianOperator(model, F.cross_entropy, data), model, F.cross_entropy, data)
    ggn = sk.GGNOperator(model, F.cross_entropy, batch())
    assert isinstance(ggn.engine, ReplayedProgram)
    assert len(exports) == 1


def test_two_operators_at_once_have_programs_of_their_own(exports: list[Any]) -> None:
    model, one, other = net(), batch(), batch()
    first, second = (sk.HessianOperator(model, F.cross_entropy, data) for data in (one, other))
    v = torch.randn(first.n, dtype=first.dtype)
    before = first @ v
    second @ v
    assert torch.equal(first @ v, before)
    agrees(first, model, F.cross_entropy, one)
    agrees(second, model, F.cross_entropy, other)
    assert len(exports) == 1


class Scaled(nn.Module):
    """Reads a Python number, and a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.shift = 2.0, torch.ones(6, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.factor * x) + self.shift


def replace_layer(model: nn.Module) -> None:
    model[0] = nn.Linear(*reversed(model[0].weight.shape)).double()


def change_number(model: nn.Module) -> None:
    model[1].factor = 3.0


def change_tensor(model: nn.Module) -> None:
    model[1].shift = 2 * torch.ones(6, dtype=torch.float64)


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "mode": nn.Module.eval,
    "frozen": lambda model: model[0].weight.requires_grad_(False),
    "replaced": replace_layer,
    "hook": lambda model: model[0].register_forward_hook(lambda m, args, out: 2 * out),
    "number": change_number,
    "tensor": change_tensor,
}


# Without the comparison, which would notice another graph's numbers.
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_exported_again(change: str, verify: bool, exports: list[Any]) -> None:
    model, data = net(Scaled()), batch()
    sk.HessianOperator(model, F.cross_entropy, data)
    CHANGES[change](model)
    params = [p for p in model.parameters() if p.requires_grad]
    _, gradient, dense = eager(model, F.cross_entropy, data, params=params)
    H = sk.HessianOperator(model, F.cross_entropy, data, verify=verify)
    torch.testing.assert_close(H.gradient, gradient, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(H.to_dense(), dense, rtol=1e-10, atol=1e-10)
    assert len(exports) == 2


def test_another_loss_and_other_shapes_are_exported_again(exports: list[Any]) -> None:
    model, data = net(), batch()

    def smoothed(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets, label_smoothing=0.1)

    shorter = tuple(t[1:] for t in data)
    for count, (loss_fn, given) in enumerate([(F.cross_entropy, data), (smoothed, data), (smoothed, shorter)], start=1):
        agrees(sk.HessianOperator(model, loss_fn, given), model, loss_fn, given)
        assert len(exports) == count
    twin = net()
    agrees(sk.HessianOperator(twin, smoothed, shorter), twin, smoothed, shorter)
    assert len(exports) == 4


@pytest.mark.parametrize("verify", [True, False])
def test_a_loss_in_the_place_of_one_that_is_gone_is_another_one(verify: bool, exports: list[Any]) -> None:
    """A new function often gets the address of the last one."""
    model, data = net(), batch()
    for weight in (0.0, 1.0, 2.0):
        loss_fn = eval(f"lambda o, t: F.cross_entropy(o, t) + {weight} * o.square().mean()", {"F": F})
        agrees(sk.HessianOperator(model, loss_fn, data, verify=verify), model, loss_fn, data)
        del loss_fn
        gc.collect()
    assert len(exports) == 3


def test_a_kept_graph_that_no_longer_agrees_is_exported_again(
    exports: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = net(), batch()
    sk.HessianOperator(model, F.cross_entropy, data)
    compare, verdicts = engines.compare, [False]

    def once(*args: Any) -> Verdict:
        found = compare(*args)
        return found if not verdicts else replace(found, agrees=verdicts.pop())

    monkeypatch.setattr(engines, "compare", once)
    H = sk.HessianOperator(model, F.cross_entropy, data)
    assert not verdicts
    assert len(exports) == 2
    assert isinstance(H.engine, ReplayedProgram)
    agrees(H, model, F.cross_entropy, data)


def references() -> tuple[Any, ...]:
    """Of a model, and of a loss that holds it, of which an operator was made."""
    model = net()
    loss_fn = lambda o, t: F.cross_entropy(o, t) + model[0].weight.square().sum()  # noqa: E731
    sk.HessianOperator(model, loss_fn, batch())
    assert model in kept.graphs
    return weakref.ref(model), weakref.ref(loss_fn)


def test_nothing_keeps_a_model_or_its_loss_alive() -> None:
    gone = references()
    gc.collect()
    assert all(reference() is None for reference in gone)


def test_of_one_model_few_graphs_are_kept() -> None:
    model = net()
    for rows in range(2, 2 + 2 * kept._MOST_GRAPHS):
        sk.HessianOperator(model, F.cross_entropy, (torch.randn(rows, 4).double(), torch.randint(0, 3, (rows,))))
    assert len(kept.graphs[model]) == kept._MOST_GRAPHS
