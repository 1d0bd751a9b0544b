"""What an eager pass sees and an export would drop: it goes to autograd, and is named."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from small_models import Apply, agrees, batch, net
from torch import Tensor, nn

import sharpkern as sk
from sharpkern.rop.double_backward import DoubleBackward


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):  # noqa: ARG004
        return torch.round(4 * z) / 4

    @staticmethod
    def backward(ctx, g):  # noqa: ARG004
        return g


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):  # noqa: ARG004
        return z.view_as(z)

    @staticmethod
    def backward(ctx, g):  # noqa: ARG004
        return -g


def hooked(x: Tensor) -> Tensor:
    y = torch.tanh(x)
    y.register_hook(lambda g: 0.1 * g)
    return y


def turned(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.reshape(-1, 3, 2)).abs().repeat(1, 2)


def noisy(x: Tensor) -> Tensor:
    return x + torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=x.dtype)


SEEN = {
    "straight-through": (lambda: Apply(lambda x: Round.apply(torch.tanh(x))), "autograd.Function Round"),
    "bound apply": (lambda: Apply(Round.apply), "autograd.Function Round"),
    "gradient reversal": (lambda: Apply(Reverse.apply), "autograd.Function Reverse"),
    "tensor hook": (lambda: Apply(hooked), "gradient hook"),
    "fft": (lambda: Apply(lambda x: torch.fft.fft(x).abs()), "complex"),
    "view as complex": (lambda: Apply(turned), "complex"),
    "own generator": (lambda: Apply(noisy), "Generator"),  # torch 2.11 names the class, with the line
    "branch on a value": (lambda: Apply(lambda x: x.tanh() if x.detach().sum().item() > -1e9 else x), "test_eager.py"),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_what_export_drops_goes_to_autograd_and_is_named(name: str) -> None:
    make, word = SEEN[name]
    model, data = net(make()), batch()
    with pytest.warns(UserWarning, match="autograd") as caught:
        H = sk.HessianOperator(model, F.cross_entropy, data)
    assert word in str(caught[0].message)
    assert isinstance(H._engine, DoubleBackward)
    agrees(H, model, F.cross_entropy, data)


def test_parameter_and_module_hooks_reach_the_trackers_gradient() -> None:
    model, data = net(), batch()
    mask = (torch.rand(6, 4) > 0.5).double()
    model[0].weight.register_hook(lambda g: g * mask)
    model[1].register_full_backward_hook(lambda m, gi, go: (0.1 * gi[0],))  # noqa: ARG005
    F.cross_entropy(model(data[0]), data[1]).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    with pytest.warns(UserWarning, match="gradient hook on 0.weight"):
        sk.SharpnessTracker(model, F.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1)).step(data)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[name], rtol=1e-12, atol=1e-14)


def test_penalty_by_autograd_grad_in_the_loss() -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net(nn.Softplus())

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            u = self.inner(x)
            return u + torch.autograd.grad(u.sum(), x, create_graph=True)[0].square().sum()

    model, data = Penalised(), batch()
    with pytest.warns(UserWarning, match="autograd"):
        H = sk.HessianOperator(model, F.cross_entropy, data)
    agrees(H, model, F.cross_entropy, data)


def test_python_and_numpy_randomness_is_not_frozen() -> None:
    class LayerDrop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x if random.random() < 0.5 else x + torch.tanh(self.inner(x))

    with pytest.warns(UserWarning, match="Python's random module"):
        H = sk.HessianOperator(net(LayerDrop()), F.cross_entropy, batch())
    losses = set()
    for _ in range(30):
        H.refresh()
        losses.add(float(H.loss))
    assert len(losses) == 2


def test_a_buffer_bound_anew_is_updated() -> None:
    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("ema", torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            self.ema = 0.9 * self.ema + 0.1 * x.detach().mean(0)
            return torch.tanh(x - self.ema)

    model, twin, data = net(Average()), net(Average()), batch()
    twin.load_state_dict(model.state_dict())
    tracker = sk.SharpnessTracker(model, F.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.0))
    with pytest.warns(UserWarning, match="autograd"):
        tracker.step(data)
    for _ in range(2):
        tracker.step(data)
    for _ in range(3):
        twin(data[0])
    torch.testing.assert_close(model[1].ema, twin[1].ema)


@pytest.mark.parametrize(
    ("loss_fn", "words"),
    [
        (lambda o, t: {"loss": F.cross_entropy(o, t)}, r"a dict with \['loss'\]"),
        (lambda o, t: (F.cross_entropy(o, t), o), "a tuple"),
        (lambda o, t: F.cross_entropy(o, t).item(), "got a float"),
        (lambda o, t: F.cross_entropy(o, t, reduction="none"), r"got shape \[5\]"),
        (lambda o, t: F.cross_entropy(o.detach(), t), "got a constant"),
    ],
)
def test_losses_that_are_no_scalar_are_refused(loss_fn, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sk.HessianOperator(net(), loss_fn, batch())


@pytest.mark.parametrize("operator", [sk.HessianOperator, sk.GGNOperator])
def test_sparse_gradients_of_an_embedding_go_to_autograd(operator: type[sk.HessianOperator]) -> None:
    def model(sparse: bool) -> nn.Sequential:
        return nn.Sequential(
            nn.Embedding(7, 4, sparse=sparse), nn.Flatten(), nn.Tanh(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)
        ).double()

    sparse, dense = model(True), model(False)
    dense.load_state_dict(sparse.state_dict())
    data = torch.randint(0, 5, (5, 3)), torch.randint(0, 3, (5,))
    with pytest.warns(UserWarning, match="sparse=True"):
        H = operator(sparse, F.cross_entropy, data)
    G = operator(dense, F.cross_entropy, data)
    V = torch.randn(H.n, 2, dtype=torch.float64)
    torch.testing.assert_close(H.gradient, G.gradient, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(H @ V, G @ V, rtol=1e-10, atol=1e-12)
    if operator is sk.HessianOperator:
        agrees(G, dense, F.cross_entropy, data)
