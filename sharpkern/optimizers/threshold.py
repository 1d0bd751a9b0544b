"""Where an optimizer turns unstable on a quadratic loss."""

from __future__ import annotations

from typing import Any

import torch


def stability_threshold(optimizer: torch.optim.Optimizer, *, first_step: bool = False) -> float:
    """Return kappa: on a quadratic loss, the optimizer is stable while ``lr * curvature < kappa``.

    Curvature is the largest eigenvalue of the Hessian H for SGD, of ``P^-1 H`` with P from ``preconditioner``
    (frozen) for the others. With momentum b, dampening d, weight decay w:

        SGD                              2
        SGD, momentum                    2 (1 + b) / (1 - d)
        SGD, Nesterov                    2 (1 + b) / (1 + 2b)
        Adam, AdamW, GIAdam              2 (1 + b1) / (1 - b1)
        RMSprop                          2 (1 + b)
        SGD's weight decay               kappa - lr w
        decoupled decay (AdamW)          kappa (1 - lr w / 2)

    Coupled weight decay of Adam and RMSprop is not in kappa: the curvature is then that of ``P^-1 (H + w)``.
    Where parameter groups differ, the smallest kappa is returned. Minibatch noise lowers the true threshold;
    with cross-entropy the loss often still falls beyond it.

    Args:
        optimizer: SGD, Adam, AdamW, GIAdam or RMSprop, or a subclass.
        first_step: the bound for the very first step, when the momentum is still empty: the loss on a
            quadratic can rise at that step beyond it.

    Returns:
        kappa, without a unit.

    Raises:
        TypeError: the optimizer's threshold is not known.

    Source: Cohen et al., Gradient descent on neural networks typically occurs at the edge of stability (2021)
    and Adaptive gradient methods at the edge of stability (2022); the decay terms from the same
    characteristic polynomials.

    >>> p = [torch.nn.Parameter(torch.zeros(1))]
    >>> stability_threshold(torch.optim.SGD(p, lr=0.1, momentum=0.9))
    3.8
    >>> round(stability_threshold(torch.optim.Adam(p)), 6)
    38.0
    """
    if isinstance(optimizer, torch.optim.SGD):
        rule = _sgd
    elif isinstance(optimizer, torch.optim.Adam):
        rule = _adam
    elif isinstance(optimizer, torch.optim.RMSprop):
        rule = _rmsprop
    else:
        raise TypeError(
            f"no stability threshold is known for {type(optimizer).__name__}; supported: SGD, Adam, AdamW, "
            f"sharpkern.GIAdam, RMSprop."
        )
    return min(rule(group, first_step) for group in optimizer.param_groups)


def _sgd(group: dict[str, Any], first_step: bool) -> float:
    b, dampening = float(group["momentum"]), float(group["dampening"])
    if b == 0:
        kappa = 2.0
    elif first_step:  # the first buffer is the gradient itself, not dampened
        kappa = 2 / (1 + b) if group["nesterov"] else 2.0
    elif group["nesterov"]:
        kappa = 2 * (1 + b) / (1 + 2 * b)
    else:
        kappa = 2 * (1 + b) / (1 - dampening)
    return kappa - float(group["lr"]) * float(group["weight_decay"])


def _adam(group: dict[str, Any], first_step: bool) -> float:
    b = float(group["betas"][0])
    kappa = 2 / (1 - b) if first_step else 2 * (1 + b) / (1 - b)
    if group.get("decoupled_weight_decay"):
        kappa *= 1 - float(group["lr"]) * float(group["weight_decay"]) / 2
    return kappa


def _rmsprop(group: dict[str, Any], first_step: bool) -> float:
    return 2.0 if first_step else 2 * (1 + float(group["momentum"]))
