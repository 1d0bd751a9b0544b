"""Parameters as one flat vector: the order, the views, the way back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from .kernels.cpu.huge_pages import empty


class Layout:
    """Where each parameter lies in a flat vector: the order of ``named_parameters()``, no gaps.

    A tensor that has two names (tied weights) appears once, under its first name.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.names = list(params)
        self.tensors = list(params.values())
        self.shapes = [t.shape for t in self.tensors]
        self.offsets = [0]
        for t in self.tensors:
            self.offsets.append(self.offsets[-1] + t.numel())
        self.n = self.offsets[-1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of flat vectors: float64 when every parameter is, else float32."""
        return torch.float64 if all(t.dtype == torch.float64 for t in self.tensors) else torch.float32

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.tensors[0].device

    def empty(self, k: int) -> Tensor:
        """Return memory for k vectors, ``[k, n]``."""
        return empty(k, self.n, self.dtype, self.device)

    def views(self, block: Tensor) -> Iterator[Tensor]:
        """View each parameter's part of a ``[k, n]`` block as ``[k, *shape]``."""
        k = block.shape[0]
        for start, stop, shape in zip(self.offsets, self.offsets[1:], self.shapes, strict=False):
            yield block[:, start:stop].view(k, *shape)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name, each tensor once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def flatten(tensors: Iterable[Tensor] | Mapping[str, Tensor]) -> Tensor:
    """Concatenate tensors into one vector, in the order given.

    Args:
        tensors: an iterable, or a mapping whose values are taken; any shapes, one device.

    Returns:
        ``[n]``, a copy; dtype by torch's promotion.

    Raises:
        ValueError: no tensor was given.

    Cost: moves 2n numbers.

    >>> flatten([torch.ones(2, 2), torch.zeros(1)]).tolist()
    [1.0, 1.0, 1.0, 1.0, 0.0]
    """
    parts = list(tensors.values() if isinstance(tensors, Mapping) else tensors)
    if not parts:
        raise ValueError("flatten needs at least one tensor, got none.")
    return torch.cat([t.reshape(-1) for t in parts])


def unflatten(v: Tensor, model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut a flat vector into named views, in the order of ``model.named_parameters()``.

    Args:
        v: ``[n]``, n the number of trainable parameters.
        model: a module (its parameters with ``requires_grad``), or a mapping name -> tensor.

    Returns:
        name -> view of v with the parameter's shape; nothing is copied.

    Raises:
        ValueError: v is not ``[n]``.

    >>> model = nn.Linear(2, 1)
    >>> {name: tuple(t.shape) for name, t in unflatten(torch.arange(3.0), model).items()}
    {'weight': (1, 2), 'bias': (1,)}
    """
    layout = Layout(trainable(model) if isinstance(model, nn.Module) else model)
    if v.shape != (layout.n,):
        raise ValueError(f"v must be [{layout.n}] for these {len(layout.names)} parameters, got {list(v.shape)}.")
    return {name: part[0] for name, part in zip(layout.names, layout.views(v[None]), strict=True)}
