"""The diagonal by which an optimizer divides its update, from its live state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from . import kernels
from .flat import flatten

Gradients = Mapping[Tensor, Tensor] | Literal["next"] | None


class Preconditioner:
    """A positive diagonal P, kept per parameter.

    Attributes:
        params: the optimizer's parameters, in its own order.
    """

    def __init__(self, inv_sqrts: Mapping[Tensor, Tensor]) -> None:
        self._inv_sqrts = dict(inv_sqrts)
        self.params = list(self._inv_sqrts)

    def inv_sqrt(self, params: Sequence[Tensor] | None = None) -> Tensor:
        """Return the diagonal of ``P^-1/2``.

        Args:
            params: the order of the flat vector; None for the optimizer's own.

        Returns:
            ``[n]``.

        Raises:
            ValueError: a parameter that the optimizer does not hold.
        """
        chosen = self.params if params is None else params
        missing = [list(p.shape) for p in chosen if p not in self._inv_sqrts]
        if missing:
            raise ValueError(f"the optimizer does not hold {len(missing)} of the parameters, of shapes {missing}.")
        return flatten(self._inv_sqrts[p] for p in chosen)

    def diagonal(self, params: Sequence[Tensor] | None = None) -> Tensor:
        """Return the diagonal of P, ``[n]``; arguments as ``inv_sqrt``."""
        return self.inv_sqrt(params).pow(-2)


def preconditioner(
    optimizer: torch.optim.Optimizer, *, gradients: Gradients = None, first_moment_correction: bool = True
) -> Preconditioner:
    """Return the diagonal P of an optimizer, so that its update without momentum is ``-lr P^-1 g``.

    SGD: P = 1. Adam, AdamW, GIAdam:

        P_t = (1 - beta1^t) (sqrt(v_t / (1 - beta2^t)) + eps)

    with v_t the second moment including the gradient of step t (with amsgrad its running maximum); the update is
    ``-lr P_t^-1 m_t``, m_t the uncorrected first moment. RMSprop: ``P = sqrt(v_t) + eps``, centred if the optimizer is.
    A parameter group whose learning rate differs from the first group's has P divided by the quotient, so that one
    learning rate, the first group's, goes with P.

    Args:
        optimizer: its state is read, never changed.
        gradients: None reads the state as it is, after step t. A mapping parameter -> gradient, or "next" for each
            ``p.grad``, gives P of the step that those gradients are about to take; this needs no state.
        first_moment_correction: keep the factor ``1 - beta1^t``. It makes P ten times smaller at t = 1 (beta1 = 0.9);
            ``stability_threshold`` belongs to P with it.

    Raises:
        TypeError: an optimizer whose preconditioner is unknown or not diagonal.
        RuntimeError: no state yet and no gradients, or a parameter without gradient with "next".
        ValueError: a parameter of the optimizer missing in the mapping.

    Cost: one pass over the second moments.
    Source: Cohen et al. (2022); Kalra and Barkeshli, Why Warmup the Learning Rate? (2024), appendix.
    """
    rule = _rule(optimizer)
    lr0 = float(optimizer.param_groups[0]["lr"])
    inv_sqrts: dict[Tensor, Tensor] = {}
    for group in optimizer.param_groups:
        lr = float(group["lr"])
        multiplier = lr / lr0 if lr != lr0 else 1.0
        for p in group["params"]:
            if not p.requires_grad:
                continue
            s = rule(optimizer.state.get(p, {}), group, p, _gradient(p, gradients), first_moment_correction)
            inv_sqrts[p] = s if multiplier == 1.0 else s * multiplier**0.5
    return Preconditioner(inv_sqrts)


def is_adaptive(optimizer: torch.optim.Optimizer) -> bool:
    """Whether P of a supported optimizer is anything but one."""
    return _rule(optimizer) is not _identity


def _rule(optimizer: torch.optim.Optimizer) -> Any:
    for base, rule in {"SGD": _identity, "Adam": _adam, "AdamW": _adam, "GIAdam": _adam, "RMSprop": _rmsprop}.items():
        if any(cls.__name__ == base for cls in type(optimizer).__mro__):
            return rule
    raise TypeError(
        f"no diagonal preconditioner is known for {type(optimizer).__name__}; "
        "supported are SGD, Adam, AdamW, GIAdam and RMSprop."
    )


def _gradient(p: Tensor, gradients: Gradients) -> Tensor | None:
    if gradients is None:
        return None
    if gradients == "next":
        if p.grad is None:
            raise RuntimeError(
                f'a parameter of shape {list(p.shape)} has no gradient: call backward() before gradients="next".'
            )
        return p.grad.detach()
    if p not in gradients:
        raise ValueError(f"gradients lacks a parameter of the optimizer, of shape {list(p.shape)}.")
    return gradients[p].detach()


def _second_moment(state: Any, group: Any, p: Tensor, g: Tensor | None, key: str, beta: float) -> tuple[Tensor, int]:
    """Return v_t, flat and at least float32, and t; of the coming step when its gradient is given."""
    step = int(state.get("step", 0))
    if key in state:
        v = state[key]
    elif g is None:
        raise RuntimeError(
            f"the optimizer has no state yet for a parameter of shape {list(p.shape)}: take a step first, or pass "
            'gradients="next" for the preconditioner of the first step.'
        )
    else:
        v = torch.zeros_like(p)
    v = v.detach().reshape(-1)
    v = v if v.dtype == torch.float64 else v.float()
    if g is None:
        return v, step
    g = g.reshape(-1).to(v.dtype)
    if group.get("weight_decay") and not group.get("decoupled_weight_decay", False):
        g = g + group["weight_decay"] * p.detach().reshape(-1).to(v.dtype)
    if step == 0 and group.get("gradient_init") and not bool(v.any()):
        v = g.square()  # GIAdam's v_0, which its first step will set
    return torch.addcmul(v * beta, g, g, value=1 - beta), step + 1


def _identity(state: Any, group: Any, p: Tensor, g: Tensor | None, first: bool) -> Tensor:  # noqa: ARG001
    return torch.ones(p.numel(), dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)


def _adam(state: Any, group: Any, p: Tensor, g: Tensor | None, first: bool) -> Tensor:
    beta1, beta2 = (float(b) for b in group["betas"])
    v, t = _second_moment(state, group, p, g, "exp_avg_sq", beta2)
    if group.get("amsgrad") and "max_exp_avg_sq" in state:
        v = torch.maximum(state["max_exp_avg_sq"].detach().reshape(-1).to(v.dtype), v)
    factor = 1 - beta1**t if first else 1.0
    return kernels.inv_sqrt_adam(v.contiguous(), bias_correction2=1 - beta2**t, eps=group["eps"], factor=factor)


def _rmsprop(state: Any, group: Any, p: Tensor, g: Tensor | None, first: bool) -> Tensor:  # noqa: ARG001
    alpha = float(group["alpha"])
    v, _ = _second_moment(state, group, p, g, "square_avg", alpha)
    if group["centered"]:
        mean = state["grad_avg"].detach().reshape(-1).to(v.dtype) if "grad_avg" in state else torch.zeros_like(v)
        if g is not None:
            mean = mean * alpha + (1 - alpha) * g.reshape(-1).to(v.dtype)
        v = v - mean * mean
    return kernels.inv_sqrt_adam(v.contiguous(), bias_correction2=1.0, eps=group["eps"], factor=1.0)
