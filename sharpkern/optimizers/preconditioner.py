"""The diagonal P that scales an optimizer's step, from its live state: ``theta <- theta - lr P^-1 m``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from .parts import local_part
from .rules import Rule, Step, diagonal_rule_of, inner_optimizer
from .threshold import relative_lr, threshold_scales

Gradients = Literal["next"] | Mapping[Tensor, Tensor] | None


class NonFinitePreconditionerError(RuntimeError):
    """P is zero or not finite somewhere, so that there is no P^-1/2."""


class Preconditioner:
    """A positive diagonal P, one number for each element of the optimizer's parameters; made by
    ``preconditioner``.

    A snapshot: later steps of the optimizer do not change it.

    Attributes:
        params: the optimizer's parameters, in its order.
    """

    def __init__(self, params: list[Tensor], inv_sqrt: dict[Tensor, Tensor]) -> None:
        self.params = params
        self._inv_sqrt = inv_sqrt

    def inv_sqrt(self, params: Iterable[Tensor] | None = None) -> Tensor:
        """Return ``P^-1/2``, flat, in the order of the parameters asked for.

        Args:
            params: parameters of the optimizer; None for all that P was made for, in the optimizer's order.

        Returns:
            ``[n]``, float64 when every parameter is, else float32.

        Raises:
            ValueError: a tensor is not one of the optimizer's parameters, or none is asked for.
            RuntimeError: P was made without a gradient for one of them.

        Cost: moves 2n numbers.
        """
        wanted = list(self._inv_sqrt) if params is None else list(params)
        if not wanted:
            raise ValueError("params must name at least one parameter, got none.")
        for i, p in enumerate(wanted):
            if p in self._inv_sqrt:
                continue
            if any(p is q for q in self.params):
                raise RuntimeError(
                    f"P is unknown for parameter {i} of shape {list(p.shape)}: it is frozen, or gradients= "
                    f"held no gradient for it."
                )
            raise ValueError(f"parameter {i} of shape {list(p.shape)} is not one of the optimizer's.")
        return torch.cat([self._inv_sqrt[p] for p in wanted])

    def diagonal(self, params: Iterable[Tensor] | None = None) -> Tensor:
        """Return P, flat: ``[n]``; arguments and errors as for ``inv_sqrt``."""
        return self.inv_sqrt(params) ** -2


def preconditioner(
    optimizer: torch.optim.Optimizer, *, gradients: Gradients = None, first_moment_correction: bool = True
) -> Preconditioner:
    """Read the diagonal preconditioner out of an optimizer's state.

        Adam, AdamW, GIAdam:  P_t = (1 - b1^t) (sqrt(v_t / (1 - b2^t)) + eps)
                              amsgrad: v_t is the running maximum
        RAdam:                P_t = (1 - b1^t) (sqrt(v_t) + eps) / (r_t sqrt(1 - b2^t)), r_t the rectification;
                              P_t = 1 - b1^t in the first steps, before r_t exists
        Adamax:               P_t = (1 - b1^t) u_t, u_t the running maximum of |g| + eps
        Adagrad:              P_t = (1 + (t - 1) lr_decay) (sqrt(sum of g^2) + eps)
        RMSprop:              P_t = sqrt(v_t) + eps
                              centered: v_t less the squared running mean of g
        NAdam:                P_t = f_t (sqrt(v_t / (1 - b2^t)) + eps), f_t -> 1 by the momentum schedule
        Adadelta:             P_t = sqrt(v_t + eps) / sqrt(u_{t-1} + eps), u the average of squared updates
        Adafactor:            P_t = D_t max(1, rms(g / D_t) / d) / max(e2, rms(theta)), D_t^2 = row x column means of
                              g^2 over their mean; both of torch's and Hugging Face's (``optimizers.rules.adafactor``)
        AdamW, schedule-free: P_t = sqrt(v_t / (1 - b2^t)) + eps
        SGD, also schedule-free: P = 1

    so that ``theta_{t+1} = theta_t - lr P_t^-1 m_t``, decoupled weight decay apart. For Adam, RAdam and Adamax m is the
    *uncorrected* average of gradients: the correction of the first moment is part of P, and ``stability_threshold``
    belongs to this P. For NAdam m is ``f_t`` times what it steps by. For the others without momentum m is the gradient;
    schedule-free optimizers step z by it (their own warmup is in the threshold). A parameter group whose lr differs
    from the first group's has its P divided by the ratio, so one lr, the first group's, speaks for all. ``lr=None``
    counts as 1. P is positive under ``maximize`` too: the step is then ``+lr P^-1 m``.

    Args:
        optimizer: one of the list above, or of a class registered with ``optimizers.rules.register``; only read. A
            subclass counts as its parent while it overrides neither ``step`` nor ``_init_group``. Wrappers of
            Accelerate and Lightning, and ``ZeroRedundancyOptimizer`` on one rank, are looked through.
        gradients: None for the state as it is, P of the step last taken. ``"next"`` for P of the step about
            to be taken with the gradients in ``p.grad`` (t = steps + 1; no earlier step is needed), or a
            mapping from parameter to gradient for the same without touching ``p.grad``. Coupled weight decay
            is added to them.
        first_moment_correction: False leaves ``(1 - b1^t)`` out of P: ten times larger at t = 1 for b1
            = 0.9.

    Returns:
        A ``Preconditioner``, for all trainable parameters, or for those in the mapping. Of parameters that are spread
        over processes (DTensor), each process gets its own part.

    Raises:
        TypeError: the optimizer's rule is not known; the optimizer has no diagonal P (Lion, Muon: see
            ``optimizers.geometry``); its state is spread over ranks.
        RuntimeError: no state yet and ``gradients`` is None, or the state does not tell P of the last step (Adadelta,
            Adafactor); a gradient is missing under ``"next"``; P is
            zero or not finite somewhere; the first group's lr is 0 and another's is not.
        ValueError: a gradient of the mapping has the wrong shape, or it holds none of the optimizer's
            parameters.

    Cost: moves about 2n numbers, 4n with gradients.
    Source: Cohen et al., Adaptive gradient methods at the edge of stability (2022); Kalra and Barkeshli, Why
    warmup the learning rate? (2024), for the factor ``1 - b1^t``.

    >>> p = torch.nn.Parameter(torch.zeros(2))
    >>> p.grad = torch.tensor([4.0, 9.0])
    >>> adam = torch.optim.Adam([p], eps=0.0)
    >>> [round(x, 4) for x in preconditioner(adam, gradients="next").diagonal().tolist()]
    [0.4, 0.9]
    """
    diagonal_rule_of(optimizer)  # before its lr is read: an optimizer that is not known need not have one
    relative = [relative_lr(optimizer, group) for group in optimizer.param_groups]
    return _scaled(optimizer, gradients, relative, first_moment_correction=first_moment_correction)


def threshold_preconditioner(optimizer: torch.optim.Optimizer, gradients: Gradients = None) -> Preconditioner:
    """Return ``P / S``, so that one threshold holds for all parameter groups: see ``threshold_scales``.

    On a quadratic loss the optimizer is stable while ``lr`` of the first group times the largest eigenvalue of
    ``S P^-1 H`` is below ``stability_threshold(optimizer)``. Where all groups have one threshold, this is P.

    Args:
        optimizer: with a rule; only read.
        gradients: as for ``preconditioner``.

    Raises:
        As ``preconditioner`` and ``threshold_scales``.
    """
    return _scaled(optimizer, gradients, threshold_scales(optimizer), first_moment_correction=True)


def is_adaptive(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether stability is a matter of ``S P^-1 H`` rather than of H: P is not the identity, or groups differ.

    Groups differ when their learning rates do, or their thresholds by more than 1% (momentum, much weight decay).

    Raises:
        TypeError: the optimizer's rule is not known.
        RuntimeError: the first group's lr is 0 and another's is not.
        ValueError: a group is unstable by its weight decay alone.
    """
    return diagonal_rule_of(optimizer).adaptive or any(scale != 1 for scale in threshold_scales(optimizer))


def _scaled(
    optimizer: torch.optim.Optimizer, gradients: Gradients, scales: list[float], *, first_moment_correction: bool
) -> Preconditioner:
    """Return P of every group over the group's scale."""
    if isinstance(gradients, str) and gradients != "next":
        raise ValueError(f"gradients must be None, 'next' or a mapping from parameter to gradient, got {gradients!r}.")
    # Groups are read from a wrapper, which may know a newer lr; the state is only in what it wraps.
    groups, rule, optimizer = optimizer.param_groups, diagonal_rule_of(optimizer), inner_optimizer(optimizer)
    result: dict[Tensor, Tensor] = {}
    for group, scale in zip(groups, scales, strict=True):
        for p in group["params"]:
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            if rule.inv_sqrt is None:  # P is known without a gradient, so a mapping's gaps do not matter
                result[p] = torch.full((local_part(p).numel(),), math.sqrt(scale), dtype=dtype, device=p.device)
                continue
            if not p.requires_grad or (isinstance(gradients, Mapping) and p not in gradients):
                continue
            gradient = _gradient(p, group, gradients, dtype, rule)
            state = _state(optimizer, p, gradient)
            piece = rule.inv_sqrt(Step(optimizer, group, p, state, gradient, dtype, first_moment_correction))
            _check_finite(piece, p, group)
            # Here and not in the rule: no optimizer's rule needs to know of other groups.
            result[p] = piece.mul_(math.sqrt(scale))
    if not result:
        raise ValueError("gradients holds none of the optimizer's trainable parameters.")
    return Preconditioner([p for group in groups for p in group["params"]], result)


def _check_finite(inv_sqrt: Tensor, p: Tensor, group: dict[str, Any]) -> None:
    # At once, and not when a product turns out NaN: only here is it known which parameter and which eps.
    # By the largest, which a NaN would be too: one pass, and no mask.
    if inv_sqrt.numel() and not math.isfinite(float(inv_sqrt.amax())):
        bad = int((~inv_sqrt.isfinite()).sum())
        raise NonFinitePreconditionerError(
            f"P is zero or not finite for {bad} of {inv_sqrt.numel()} elements of a parameter of shape "
            f"{list(p.shape)} (eps={group.get('eps')}): use a larger eps, or check the gradients."
        )


def _gradient(p: Tensor, group: dict[str, Any], gradients: Gradients, dtype: torch.dtype, rule: Rule) -> Tensor | None:
    """Return the flat gradient as the optimizer's moments see it; None where the state is read as it is."""
    if gradients is None:
        return None
    g = p.grad if isinstance(gradients, str) else gradients[p]
    if g is None:
        raise RuntimeError(
            f"gradients='next' needs p.grad, but a parameter of shape {list(p.shape)} has none: run "
            f"backward() first, or freeze it with requires_grad_(False)."
        )
    if g.shape != p.shape:
        raise ValueError(f"the gradient of a parameter of shape {list(p.shape)} has shape {list(g.shape)}.")
    flat = local_part(g).detach().reshape(-1).to(dtype)
    if group.get("maximize"):  # before the decay is added, and signs matter to a running mean of gradients
        flat = -flat
    if decay := rule.coupled_decay(group):
        flat = flat + decay * local_part(p).detach().reshape(-1).to(dtype)
    return flat


def _state(optimizer: torch.optim.Optimizer, p: Tensor, gradient: Tensor | None) -> dict[str, Any]:
    """Return the parameter's state, {} if it has none."""
    state: dict[str, Any] = optimizer.state.get(p, {})
    # Adagrad, and GIAdam after initialize(), have a state before their first step: its step count tells. Schedule-free
    # optimizers count elsewhere, and have none before.
    if gradient is None and (not state or float(state.get("step", 1)) == 0):
        raise RuntimeError(
            f"{type(optimizer).__name__} has taken no step for a parameter of shape {list(p.shape)}: call "
            f"optimizer.step() first, or pass gradients='next' after backward()."
        )
    return state
