"""Which parameters an optimizer holds, against those whose gradients a tracker sets."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def check_held(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor], *, sets_gradients: bool = True) -> None:
    """Check that an optimizer updates the parameters given, and that their gradients are all that it needs.

    Args:
        optimizer: only read.
        params: name -> parameter.
        sets_gradients: the gradients of these parameters will be set without ``backward()``.

    Raises:
        ValueError: the optimizer lacks one of the parameters. If gradients are set: it holds another that requires a
            gradient, such as a parameter of the loss; or one has a hook that ``backward()`` runs after it has set
            ``p.grad``.
    """
    # By identity, as tensors compare by value.
    held = [p for group in optimizer.param_groups for p in group["params"]]
    ids = {id(p) for p in held}
    if lacking := [name for name, p in params.items() if id(p) not in ids]:
        raise ValueError(
            f"the optimizer lacks trainable parameters of the model: {lacking[:5]}. Freeze them with "
            "requires_grad_(False), or give them to the optimizer."
        )
    if not sets_gradients:
        return
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
