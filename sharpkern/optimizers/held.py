"""Which parameters an optimizer holds, against those whose gradients a tracker sets."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def check_held(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor]) -> None:
    """Check that an optimizer updates just the parameters given, and that nothing but the gradient reaches them.

    Args:
        optimizer: only read.
        params: name -> parameter, those whose gradients will be set.

    Raises:
        ValueError: the optimizer lacks one of them; it holds another that requires a gradient, such as a parameter of
            the loss; or one has a hook that ``backward()`` runs after it has set ``p.grad``.
    """
    # By identity, as tensors compare by value.
    held = [p for group in optimizer.param_groups for p in group["params"]]
    ids = {id(p) for p in held}
    if lacking := [name for name, p in params.items() if id(p) not in ids]:
        raise ValueError(
            f"the optimizer lacks trainable parameters of the model: {lacking[:5]}. Freeze them with "
            "requires_grad_(False), or give them to the optimizer."
        )
    own = {id(p) for p in params.values()}
    # Such a parameter would keep an old gradient, and be moved by it at every step.
    if others := [list(p.shape) for p in held if p.requires_grad and id(p) not in own]:
        raise ValueError(
            f"the optimizer holds parameters that are not the model's, of shapes {others[:5]}: their gradients would "
            "not be set. Make them part of the model (a loss with parameters can be a submodule of it)."
        )
    if hooked := [name for name, p in params.items() if p._post_accumulate_grad_hooks]:
        raise ValueError(
            f"parameters have hooks that run in backward() only, after the gradient is set: {hooked[:5]}. The tracker "
            "sets p.grad itself, so they would not run: remove them."
        )
