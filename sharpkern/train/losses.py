"""Losses of the reference trainer, in the warmup paper's conventions, and the targets they need."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from .config import TrainConfig
from .data import Dataset

LossFunction = Callable[[Tensor, Tensor], Tensor]


def half_mean_squares(output: Tensor, target: Tensor) -> Tensor:
    """Return half the mean over batch and outputs of ``(output - target)^2``, 0-d.

    Args:
        output: ``[N, classes]``.
        target: ``[N, classes]``, one-hot.

    Source: the convention of Kalra and Barkeshli, Why warmup the learning rate? (2024), arXiv 2406.09405.
    """
    # Without the half all sharpnesses would be twice, and all thresholds in lr half, those of the paper.
    return 0.5 * F.mse_loss(output, target)


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy over all tokens, 0-d, in nats.

    Args:
        logits: ``[N, T, vocabulary]``.
        targets: ``[N, T]`` int64, the next tokens.
    """
    # ``cross_entropy`` wants classes second. Flattening leaves the logits where they are; moving the classes would
    # stride them.
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def build_loss(config: TrainConfig) -> LossFunction:
    """Choose the loss function."""
    if config.model.kind == "gpt":
        return token_cross_entropy
    return half_mean_squares if config.loss == "mse" else F.cross_entropy


def loss_targets(config: TrainConfig, classes: Tensor, data: Dataset) -> Tensor:
    """Return one-hot targets for mean squares, the classes themselves otherwise.

    Args:
        config: the loss is read.
        classes: ``[N]`` int64, or ``[N, T]`` tokens.
        data: sets the number of classes, and the dtype of one-hot targets.

    Returns:
        ``[N, classes]``, or ``classes`` as it is.
    """
    if config.loss == "mse":
        return F.one_hot(classes, data.classes).to(data.train_inputs.dtype)
    return classes
