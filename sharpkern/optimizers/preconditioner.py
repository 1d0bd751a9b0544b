"""The diagonal P that scales an optimizer's step, from its live state: ``theta <- theta - lr P^-1 m``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from .. import kernels

Gradients = Literal["next"] | Mapping[Tensor, Tensor] | None


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
        RMSprop:              P_t = sqrt(v_t) + eps
                              centered: v_t less the squared running mean of g
        SGD:                  P = 1

    so that ``theta_{t+1} = theta_t - lr P_t^-1 m_t``, with m the *uncorrected* average of gradients for Adam
    (decoupled weight decay apart): the correction of the first moment is part of P, and
    ``stability_threshold`` belongs to this P. A parameter group whose lr differs from the first group's has
    its P divided by the ratio, so one lr, the first group's, speaks for all.

    Args:
        optimizer: SGD, Adam, AdamW, GIAdam or RMSprop, or a subclass; only read.
        gradients: None for the state as it is, P of the step last taken. ``"next"`` for P of the step about
            to be taken with the gradients in ``p.grad`` (t = steps + 1; no earlier step is needed), or a
            mapping from parameter to gradient for the same without touching ``p.grad``. Coupled weight decay
            is added to them.
        first_moment_correction: False leaves Adam's ``(1 - b1^t)`` out of P: ten times larger at t = 1 for b1
            = 0.9.

    Returns:
        A ``Preconditioner``, for all trainable parameters, or for those in the mapping.

    Raises:
        TypeError: the optimizer's rule is not known.
        RuntimeError: no state yet and ``gradients`` is None; a gradient is missing under ``"next"``; P is
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
    _check_supported(optimizer)
    if isinstance(gradients, str) and gradients != "next":
        raise ValueError(f"gradients must be None, 'next' or a mapping from parameter to gradient, got {gradients!r}.")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    result: dict[Tensor, Tensor] = {}
    for group in optimizer.param_groups:
        root = math.sqrt(_relative_lr(optimizer, group))
        for p in group["params"]:
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            if isinstance(optimizer, torch.optim.SGD):
                result[p] = torch.full((p.numel(),), root, dtype=dtype, device=p.device)
                continue
            if not p.requires_grad or (isinstance(gradients, Mapping) and p not in gradients):
                continue
            gradient = _gradient(p, group, gradients, dtype)
            if isinstance(optimizer, torch.optim.Adam):
                piece = _adam(optimizer, p, group, gradient, dtype, first_moment_correction)
            else:
                piece = _rmsprop(optimizer, p, group, gradient, dtype)
            if not bool(piece.isfinite().all()):
                bad = int((~piece.isfinite()).sum())
                raise RuntimeError(
                    f"P is zero or not finite for {bad} of {piece.numel()} elements of a parameter of shape "
                    f"{list(p.shape)} (eps={group['eps']}): use a larger eps, or check the gradients."
                )
            result[p] = piece.mul_(root)
    if not result:
        raise ValueError("gradients holds none of the optimizer's trainable parameters.")
    return Preconditioner(params, result)


def is_adaptive(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether P of a supported optimizer is anything but the identity.

    Raises:
        TypeError: the optimizer's rule is not known.
    """
    _check_supported(optimizer)
    return not isinstance(optimizer, torch.optim.SGD)


def _check_supported(optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(optimizer, (torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop)):
        raise TypeError(
            f"no diagonal preconditioner is known for {type(optimizer).__name__}; supported: SGD, Adam, "
            f"AdamW, sharpkern.GIAdam, RMSprop."
        )


def _relative_lr(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> float:
    """Return the group's lr in units of the first group's."""
    first, lr = float(optimizer.param_groups[0]["lr"]), float(group["lr"])
    if lr == first:
        return 1.0
    if first == 0:
        raise RuntimeError(f"the first group's lr is 0 and another's is {lr}: P is relative to the first group's lr.")
    return lr / first


def _gradient(p: Tensor, group: dict[str, Any], gradients: Gradients, dtype: torch.dtype) -> Tensor | None:
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
    flat = g.detach().reshape(-1).to(dtype)
    decay = 0.0 if group.get("decoupled_weight_decay") else float(group["weight_decay"])
    if decay:
        flat = (-flat if group["maximize"] else flat) + decay * p.detach().reshape(-1).to(dtype)
    return flat


def _state(optimizer: torch.optim.Optimizer, p: Tensor, gradient: Tensor | None) -> dict[str, Any]:
    """Return the parameter's state, {} if it has none."""
    state: dict[str, Any] = optimizer.state.get(p, {})
    if gradient is None and (not state or float(state["step"]) == 0):
        raise RuntimeError(
            f"{type(optimizer).__name__} has taken no step for a parameter of shape {list(p.shape)}: call "
            f"optimizer.step() first, or pass gradients='next' after backward()."
        )
    return state


def _adam(
    optimizer: torch.optim.Adam,
    p: Tensor,
    group: dict[str, Any],
    gradient: Tensor | None,
    dtype: torch.dtype,
    first_moment_correction: bool,
) -> Tensor:
    """``P^-1/2`` of one parameter, flat."""
    beta1, beta2 = (float(b) for b in group["betas"])
    state = _state(optimizer, p, gradient)
    if gradient is None:
        t = float(state["step"])
        v = _flat(state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"], dtype)
    else:
        t = float(state["step"]) + 1 if state else 1.0
        squared = gradient**2
        if state:
            v = _flat(state["exp_avg_sq"], dtype).lerp(squared, 1 - beta2)
        elif getattr(optimizer, "starts_from_gradient", False):  # GIAdam: v_0 = g^2, so v_1 = g^2
            v = squared
        else:
            v = squared.mul_(1 - beta2)
        if group["amsgrad"] and state:
            v = torch.maximum(v, _flat(state["max_exp_avg_sq"], dtype))
    factor = 1 - beta1**t if first_moment_correction else 1.0
    return kernels.inv_sqrt_adam(v, bias_correction2=1 - beta2**t, eps=float(group["eps"]), factor=factor)


def _rmsprop(
    optimizer: torch.optim.Optimizer,
    p: Tensor,
    group: dict[str, Any],
    gradient: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``P^-1/2`` of one parameter, flat."""
    state = _state(optimizer, p, gradient)
    weight = 1 - float(group["alpha"])
    if gradient is None:
        v = _flat(state["square_avg"], dtype)
    else:
        v = _flat(state["square_avg"], dtype).lerp(gradient**2, weight) if state else gradient**2 * weight
    if group["centered"]:
        if gradient is None:
            mean = _flat(state["grad_avg"], dtype)
        else:
            mean = _flat(state["grad_avg"], dtype).lerp(gradient, weight) if state else gradient * weight
        v = (v - mean**2).clamp_(min=0)
    return kernels.inv_sqrt_adam(v, bias_correction2=1.0, eps=float(group["eps"]), factor=1.0)


def _flat(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.reshape(-1).to(dtype)
