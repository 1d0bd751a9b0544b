"""Where an optimizer turns unstable on a quadratic loss."""

from __future__ import annotations

from typing import Any

import torch

from .rules import diagonal_rule_of, inner_optimizer, learning_rate

_SAME = 0.01  # relative difference of thresholds that is none


def stability_threshold(optimizer: torch.optim.Optimizer, *, first_step: bool = False) -> float:
    """Return kappa: on a quadratic loss, the optimizer is stable while ``lr * curvature < kappa``.

    Curvature is the largest eigenvalue of the Hessian H for SGD, of ``P^-1 H`` with P from ``preconditioner``
    (frozen) for the others. With momentum b, dampening d, weight decay w:

        SGD                              2
        SGD, momentum                    2 (1 + b) / (1 - d)
        SGD, Nesterov                    2 (1 + b) / (1 + 2b)
        Adam, AdamW, GIAdam              2 (1 + b1) / (1 - b1)
        RAdam, Adamax                    2 (1 + b1) / (1 - b1)
        NAdam                            2 (1 + b1) / ((1 - b1) (1 + 2 b1))
        Adagrad, Adadelta, Adafactor     2
        Adafactor, Hugging Face, beta1   2 (1 + b1) / (1 - b1)
        RMSprop                          2 (1 + b)
        schedule-free, late              2 / (1 - b1)
        schedule-free, newest weight c   2 (2 - c) / (2 - 2 b1 + c (2 b1 - 1))
        SGD's weight decay               kappa - lr w, schedule-free AdamW's too
        decoupled decay (AdamW, RAdam)   kappa (1 - lr w / 2)

    Coupled weight decay of all but SGD is not in kappa: the curvature is then that of ``P^-1 (H + w)``. Nor is the
    decay of Hugging Face's Adafactor with a rate of its own. Schedule-free optimizers have kappa of the coming step,
    for the parameters in training mode; their own warmup divides it. With ``maximize=True`` the optimizer descends
    minus the loss, so the curvature is that of -H: minus the smallest eigenvalue of H. Where parameter groups differ,
    the smallest kappa is returned: a bound, which ``SharpnessTracker`` makes exact by scaling each group
    (``optimizers.threshold.threshold_scales``). Minibatch noise lowers the true threshold; with cross-entropy the loss
    often still falls beyond it.

    Args:
        optimizer: one of the table above, or of a class registered with ``optimizers.rules.register``.
        first_step: the bound for the very first step, when the momentum is still empty: the loss on a
            quadratic can rise at that step beyond it.

    Returns:
        kappa, without a unit.

    Raises:
        TypeError: the optimizer's threshold is not known, or there is none (Lion, Muon).
        ValueError: some groups climb and others descend.

    Source: Cohen et al., Gradient descent on neural networks typically occurs at the edge of stability (2021)
    and Adaptive gradient methods at the edge of stability (2022); the decay terms from the same
    characteristic polynomials.

    >>> p = [torch.nn.Parameter(torch.zeros(1))]
    >>> stability_threshold(torch.optim.SGD(p, lr=0.1, momentum=0.9))
    3.8
    >>> round(stability_threshold(torch.optim.Adam(p)), 6)
    38.0
    """
    if len({bool(group.get("maximize")) for group in optimizer.param_groups}) > 1:
        raise ValueError("maximize differs between parameter groups: near a saddle point no eigenvalue decides.")
    return min(_kappas(optimizer, first_step))


def _kappas(optimizer: torch.optim.Optimizer, first_step: bool) -> list[float]:
    """Return each group's threshold."""
    kappa = diagonal_rule_of(optimizer).kappa
    assert kappa is not None  # as the rule is diagonal
    return [kappa(group, first_step) for group in optimizer.param_groups]


def relative_lr(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> float:
    """Return the group's lr in units of the first group's.

    Raises:
        RuntimeError: the first group's lr is 0 and the group's is not.
    """
    first, lr = learning_rate(optimizer.param_groups[0]), learning_rate(group)
    if lr == first:
        return 1.0
    if first == 0:
        raise RuntimeError(f"the first group's lr is 0 and another's is {lr}: P is relative to the first group's lr.")
    return lr / first


def threshold_scales(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return how much nearer to instability each group is than the curvature alone says, relative to one kappa.

        s_g = (lr_g / lr_1) (kappa / kappa_g),   kappa = stability_threshold(optimizer)

    The first direction to turn unstable swings with a period of two. There a group's momentum is a constant factor, so
    ``2 x_g = (2 / kappa_g) lr_g P_g^-1 (H x)_g`` for every group: with S the diagonal of the s_g, the optimizer is
    stable while ``lr_1`` times the largest eigenvalue of ``S P^-1 H`` is below kappa. Groups whose kappa lies within 1%
    of the smallest count as equal to it, so that weight decay on a part of the parameters does not make SGD cost a
    second solve; the threshold is then too low by at most that.

    Args:
        optimizer: with a rule; only read.

    Returns:
        A number for each parameter group; 1 for all where they agree.

    Raises:
        TypeError: the optimizer's threshold is not known, or there is none.
        RuntimeError: the first group's lr is 0 and another's is not.
        ValueError: a group's kappa is not positive: its weight decay alone makes it unstable.
    """
    kappas = _kappas(optimizer, False)
    smallest = min(kappas)
    lrs = [relative_lr(optimizer, group) for group in optimizer.param_groups]
    # Lest weight decay on a part of the parameters, which is usual, make a plain SGD's tracker solve twice.
    if max(kappas) <= smallest + _SAME * abs(smallest):
        return lrs
    if smallest <= 0:
        raise ValueError(f"weight decay alone makes a group unstable: the groups' thresholds are {kappas}.")
    return [lr * smallest / kappa for lr, kappa in zip(lrs, kappas, strict=True)]


def minibatch_thresholds(optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Return the two levels, times the learning rate, at which the batch sharpness of mini-batch SGD settles.

        small batches   2 (1 - b)
        large batches   2 (1 + b)

    with momentum b; both are 2 without. They are plateaus of the average of ``g'Hg / g'g`` over batches
    (``Record.batch_sharpness``), seen in experiments with a constant learning rate after the progressive phase, in
    image classification at CIFAR's scale; between the two sizes of batch it lies between them. The largest eigenvalue
    of the whole data's Hessian then stays below ``2 / lr``.

    Args:
        optimizer: SGD, without Nesterov's momentum and without dampening.

    Returns:
        Both, smaller first.

    Raises:
        TypeError: no such plateau is known for the optimizer.

    Source: Andreyev and Beneventano, Edge of stochastic stability (arXiv 2412.20553); for momentum arXiv 2604.14108.

    >>> p = [torch.nn.Parameter(torch.zeros(1))]
    >>> minibatch_thresholds(torch.optim.SGD(p, lr=0.1, momentum=0.5))
    (1.0, 3.0)
    """
    groups = optimizer.param_groups
    plain = type(inner_optimizer(optimizer)) is torch.optim.SGD and not any(
        g["nesterov"] or g["dampening"] for g in groups
    )
    momenta = {float(g["momentum"]) for g in groups} if plain else set()
    if len(momenta) != 1:
        raise TypeError(
            f"the plateaus of the batch sharpness are known for SGD with one momentum, without Nesterov and "
            f"dampening, not for this {type(optimizer).__name__}."
        )
    (b,) = momenta
    return 2 * (1 - b), 2 * (1 + b)
