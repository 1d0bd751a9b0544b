"""Parameters as one flat vector: the order, the views, the way back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from ..optimizers.parts import local_part, spread_like
from ..rop.layout import Layout


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


def select_parameters(
    model: nn.Module | None, params: Mapping[str, Tensor] | Iterable[str] | Iterable[Tensor] | None
) -> dict[str, Tensor]:
    """Resolve names, tensors, a dict or None to name -> parameter in the order of ``model.named_parameters()``.

    Args:
        model: a module; None for a functional loss, whose parameters are ``params`` as they are.
        params: what is wanted; of a dict the values count. None for all that require a gradient.

    Raises:
        ValueError: an unknown name or tensor, a single string, a complex parameter, or nothing selected.
    """
    if model is None:
        if not isinstance(params, Mapping) or not params:
            raise ValueError("a functional loss (model=None) needs params: a dict name -> tensor.")
        return dict(params)
    everything: dict[str, Tensor] = dict(model.named_parameters())
    # A string is an iterable of strings too: its letters would be looked up as names.
    if isinstance(params, str):
        raise ValueError(f"params must be several names, got the string {params!r}: write [{params!r}].")
    if params is None:
        chosen: dict[str, Tensor] = dict(trainable(model))
    else:
        wanted = list(params.values() if isinstance(params, Mapping) else params)
        # By identity, as == on tensors compares their numbers.
        by_id = {id(p): name for name, p in everything.items()}
        # A tied weight is listed under its first name, and may be asked for by any.
        first = {name: by_id[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        names = {
            first.get(w, w) if isinstance(w, str) else by_id.get(id(w), f"a tensor of shape {list(w.shape)}")
            for w in wanted
        }
        if unknown := names - everything.keys():
            raise ValueError(f"not among the model's parameters: {sorted(unknown)}. It has {list(everything)}.")
        # In the model's order whatever the caller's: vectors of two selections that are equal can be exchanged.
        chosen = {name: p for name, p in everything.items() if name in names}
    if complexes := [name for name, p in chosen.items() if p.is_complex()]:
        raise ValueError(
            f"complex parameters have no Hessian in flat real order: {complexes}. Keep real and imaginary part as real "
            "parameters, and join them with torch.view_as_complex."
        )
    if not chosen:
        raise ValueError("no parameter is selected: the model has none with requires_grad=True.")
    if not any(p.numel() for p in chosen.values()):
        raise ValueError(f"the selected parameters hold no numbers: {list(chosen)} are empty.")
    return chosen


class _HasGradient(Protocol):
    """An operator with a gradient, such as ``HessianOperator``."""

    params: dict[str, Tensor]

    @property
    def gradient(self) -> Tensor:
        """``[n]``."""


def gradients_of(hessian: _HasGradient) -> dict[Tensor, Tensor]:
    """Map each parameter to its gradient, a view of ``hessian.gradient`` in the parameter's shape (and sharding)."""
    params = list(hessian.params.values())
    parts = [local_part(p) for p in params]
    views = hessian.gradient.split([part.numel() for part in parts])
    own = [g.view(part.shape).to(part.dtype) for g, part in zip(views, parts, strict=True)]
    return {p: spread_like(g, p) for p, g in zip(params, own, strict=True)}
