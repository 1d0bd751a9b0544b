"""What the suite asks of a peer, and the cutting of flat vectors that most of them need."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import Workload


class Peer:
    """Hessian-vector products of one workload, by one contender.

    Vectors are handed over in the contender's own layout, so that nobody is timed for the layout of another.
    """

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.params = [p for p in work.model.parameters() if p.requires_grad]
        self.n = sum(p.numel() for p in self.params)

    def prepare(self) -> None:
        """Redo what an update of the parameters makes stale."""

    def native(self, V: Tensor) -> Any:
        """Bring ``[n, k]`` into the layout that ``multiply`` takes."""
        raise NotImplementedError

    def multiply(self, vectors: Any) -> Any:
        """Multiply; a contender in a process of its own returns the seconds that it took there."""
        raise NotImplementedError

    def flat(self, products: Any) -> Tensor:
        """Bring the result of ``multiply`` back to ``[n, k]``."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back what the garbage collector does not."""

    def loss(self) -> Tensor:
        x, y = self.work.batch
        return self.work.loss_fn(self.work.model(x), y)

    def cut(self, v: Tensor) -> list[Tensor]:
        """``[n]`` to one tensor per parameter."""
        return [part.view_as(p) for part, p in zip(v.split([p.numel() for p in self.params]), self.params, strict=True)]


class Operator:
    """A peer as the solvers take it: flat vectors, products counted, optionally scaled to ``S H S``, S a diagonal."""

    device = torch.device("cpu")

    def __init__(self, peer: Peer, scale: Tensor | None = None) -> None:
        self.peer, self.n, self.dtype, self.scale = peer, peer.n, peer.params[0].dtype, scale
        self.products = 0

    def matmat(self, V: Tensor) -> Tensor:
        self.products += V.shape[1]
        if self.scale is not None:
            V = V * self.scale[:, None]
        W = self.peer.flat(self.peer.multiply(self.peer.native(V))).detach()
        return W if self.scale is None else W * self.scale[:, None]


def math_attention() -> Any:
    """The one attention of torch that can be differentiated twice."""
    return sdpa_kernel(SDPBackend.MATH)


class _Norm(nn.Module):
    """``nn.LayerNorm`` or ``nn.GroupNorm(1, C)`` with the affine part written out, with the same parameters."""

    def __init__(self, norm: nn.LayerNorm | nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.group = isinstance(norm, nn.GroupNorm)

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.ndim - 2)) if self.group else (-1,)
        normed = F.layer_norm(x, x.shape[1:] if self.group else x.shape[-1:], eps=self.eps)
        return normed * self.weight.view(shape) + self.bias.view(shape)


def with_forward_mode(work: Workload) -> Workload:
    """Rewrite norms for torch's forward mode over reverse mode; parameters are shared.

    In torch 2.13 that mode raises for group norms, and for a layer norm with weights it is wrong by 0.1 to 0.4%
    without a word. Contenders that use it get a model on which it is right.
    """
    model = copy.deepcopy(work.model, {id(p): p for p in work.model.parameters()})
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.LayerNorm) or (isinstance(child, nn.GroupNorm) and child.num_groups == 1):
                setattr(parent, name, _Norm(child))
    return work._replace(model=model)
