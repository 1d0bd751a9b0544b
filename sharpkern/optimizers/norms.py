"""Norms of an optimizer's moments and its dead units: what shows that Adam is failing."""

from __future__ import annotations

import torch
from torch import nn

from .gi_adam import total_norm
from .rules import rule_of


def optimizer_norms(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the norms that tell a failing Adam: a spike of ``g`` inflates ``v`` for about ``1 / (1 - b2)`` steps.

    Args:
        optimizer: any, only read. Without a rule (``optimizers.rules``), its moments are looked for under Adam's names.

    Returns:
        Euclidean norms over all parameters: "theta" parameters, "g" gradients in ``p.grad``, "m" first moment, "v"
        second moment (of squares, without a root). 0 for what is missing.

    Source: Kalra and Barkeshli, Why warmup the learning rate? (2024), on Adam's training failures.

    >>> w = nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer_norms(torch.optim.Adam([w]))
    {'theta': 5.0, 'g': 0.0, 'm': 0.0, 'v': 0.0}
    """
    try:
        first, second = rule_of(optimizer).moments
    except TypeError:  # the usual names; norms need no rule
        first, second = "exp_avg", "exp_avg_sq"
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state.get(p, {}) for p in params]
    # Of parameters without a gradient or a state the part is 0: a part of the model may be frozen.
    found = {
        "theta": [p.detach() for p in params],
        "g": [p.grad for p in params],
        "m": [s.get(first) for s in states],
        "v": [s.get(second) for s in states],
    }
    return {name: total_norm([t for t in tensors if t is not None]) for name, tensors in found.items()}


def dead_units(model: nn.Module) -> float:
    """Return the share of units whose incoming weights all have a gradient of exactly zero.

    A unit is a row of a weight of two or more dimensions, embeddings aside. A ReLU that is off for every example of
    the batch is one such unit; so is every unit of a layer that no gradient reaches.

    Args:
        model: after ``backward()`` or ``tracker.step()``; reads ``p.grad``.

    Returns:
        0 to 1.

    Raises:
        RuntimeError: no such weight has a gradient.

    >>> layer = nn.Linear(2, 4)
    >>> layer(torch.ones(1, 2))[0, 0].backward()
    >>> dead_units(layer)
    0.75
    """
    looked_up = {m.weight for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    grads = [p.grad for p in model.parameters() if p.ndim >= 2 and p.grad is not None and p not in looked_up]
    if not grads:
        raise RuntimeError("no weight has a gradient: run backward() first.")
    dead = sum(int((g.flatten(1) == 0).all(1).sum()) for g in grads)
    return dead / sum(len(g) for g in grads)
