"""Small models in float64, and their loss, gradient and Hessian by autograd: what an operator must agree with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import sharpkern as sk


def net(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), *(middle or [nn.Tanh()]), nn.Linear(6, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 4).double(), torch.randint(0, 3, (5,))


def eager(model: nn.Module, loss_fn, data, *, params=None) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and dense Hessian by autograd twice (the transposed derivative of the gradient)."""
    params = list(model.parameters()) if params is None else params
    loss = loss_fn(model(data[0]), data[1])
    parts = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    gradient = torch.cat([g.reshape(-1) for g in parts])
    rows = [
        torch.cat([
            h.reshape(-1)
            for h in torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True)
        ])
        for g in gradient
    ]  # fmt: skip
    return loss.detach(), gradient.detach(), torch.stack(rows)


def agrees(H: sk.HessianOperator, model: nn.Module, loss_fn, data, tolerance: float = 1e-10) -> None:
    loss, gradient, dense = eager(model, loss_fn, data)
    torch.testing.assert_close(H.loss, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(H.gradient, gradient, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(H @ torch.eye(H.n, dtype=torch.float64), dense.T, rtol=tolerance, atol=tolerance)


class Apply(nn.Module):
    def __init__(self, f) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)
