"""Fully connected networks of one shape in one: their parameters stacked, each layer one batched matrix product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .models import FCN, ScaledLinear


class FCNStack:
    """Several FCNs of one architecture, each with its own parameters; none sees anything of another.

    Args:
        like: an FCN of that architecture; its parameters are not used.
        networks: of each network its parameters, in the order of ``like.parameters()``; copied.

    Attributes:
        parameters: ``[networks, ...]`` each, in that order.

    The gain is in calls, not in arithmetic: small matrix products cost their overhead.
    """

    def __init__(self, like: FCN, networks: Sequence[Sequence[Tensor]]) -> None:
        self._activation = like.activation
        # As ``ScaledLinear.forward``: y = after (before W x + b). One of the two is 1 in every parameterisation.
        self._scales = [(x.before_bias, x.after_bias) for x in like.layers if isinstance(x, ScaledLinear)]
        self.parameters = [torch.stack(p).requires_grad_() for p in zip(*networks, strict=True)]

    def keep(self, chosen: Tensor) -> None:
        """Keep the networks with these indices, and drop the others."""
        # A selection of a leaf is no leaf, and ``autograd.grad`` needs leaves here.
        self.parameters = [p.detach()[chosen].requires_grad_() for p in self.parameters]

    def __call__(self, x: Tensor) -> Tensor:
        """``[N, inputs]``, the same for all, or ``[networks, N, inputs]``, to ``[networks, N, classes]``."""
        # ``ScaledLinear`` registers its weight before its bias, so they alternate.
        weights, biases = self.parameters[::2], self.parameters[1::2]
        if x.ndim == 2:
            # A view, and not a copy of the batch for each network.
            x = x.expand(len(weights[0]), *x.shape)
        for i, (w, b, (before, after)) in enumerate(zip(weights, biases, self._scales, strict=True)):
            # Both multipliers and the bias in one call: calls are what a stack saves.
            x = torch.baddbmm(b[:, None], self._activation(x) if i else x, w.mT, beta=after, alpha=before * after)
        return x

    def gradients(self, x: Tensor, targets: Tensor, loss: str) -> tuple[Tensor, list[Tensor]]:
        """Return each network's loss, ``[networks]``, and the gradients, in the shapes of ``parameters``.

        Args:
            x: ``[N, inputs]`` or ``[networks, N, inputs]``.
            targets: see ``stacked_losses``.
            loss: "mse" or "cross-entropy".
        """
        losses = stacked_losses(self(x), targets, loss)
        # No network's loss depends on another's parameters, so the gradient of the sum is each one's own.
        return losses.detach(), list(torch.autograd.grad(losses.sum(), self.parameters))


def stacked_losses(output: Tensor, targets: Tensor, loss: str) -> Tensor:
    """Return the trainer's loss of each network, ``[networks]``.

    Args:
        output: ``[networks, N, classes]``.
        targets: of ``losses.loss_targets``, the same for all or with a leading dimension of networks.
        loss: "mse" or "cross-entropy".
    """
    # Means over the examples of each network. The losses' own ``reduction="mean"`` would average over networks too.
    if loss == "mse":
        return 0.5 * (output - targets).square().mean((1, 2))
    targets = targets.expand(output.shape[:2])
    return F.cross_entropy(output.flatten(0, 1), targets.flatten(), reduction="none").view(output.shape[:2]).mean(1)
