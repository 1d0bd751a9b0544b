"""GI-Adam: Adam whose second moment starts at the squared gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class GIAdam(Optimizer):
    """Adam with ``v_0 = g_0^2``, both bias corrections kept.

        m_t = b1 m_{t-1} + (1 - b1) g_t          v_t = b2 v_{t-1} + (1 - b2) g_t^2,   v_0 = g_0^2
        theta <- theta - lr (m_t / (1 - b1^t)) / (sqrt(v_t / (1 - b2^t)) + eps)

    Since v_0 has the size of v already, dividing by ``1 - b2^t`` makes the first steps short: a built-in warmup
    ``lr sqrt(1 - b2^t)``, which lowers the preconditioned sharpness at initialisation by up to ``1 / sqrt(1 - b2)``,
    31.6 for b2 = 0.999. A parameter whose g_0 is zero starts as in Adam.

    g_0 is the gradient at initialisation: of the batch for which ``initialize()`` was called after ``backward()``, else
    of the first step.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the root.
        weight_decay: added to the gradient times the parameter, or with ``decoupled`` subtracted from the parameter.
        decoupled: weight decay as in AdamW.

    Raises:
        ValueError: a hyperparameter out of range.

    Source: Kalra and Barkeshli, Why Warmup the Learning Rate? (2024), section on GI-Adam.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = False,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise ValueError(f"lr, eps and weight_decay must not be negative, got {lr}, {eps} and {weight_decay}.")
        if not all(0 <= b < 1 for b in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas}.")
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled, "gradient_init": True,
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def initialize(self) -> None:
        """Set ``v_0`` to the square of the present ``p.grad``.

        Raises:
            RuntimeError: a step was taken already.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if int(self.state[p].get("step", 0)):
                    raise RuntimeError("initialize() must come before the first step.")
                self._start(p, _gradient(p, group))

    def _start(self, p: Tensor, g: Tensor) -> None:
        self.state[p].update(
            step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=g.square().to(p.dtype)
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters that have a gradient.

        Args:
            closure: computes the loss and gradients anew; optional.

        Returns:
            The closure's loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        (beta1, beta2), lr, eps = group["betas"], float(group["lr"]), group["eps"]
        gradients = [_gradient(p, group) for p in params]
        for p, g in zip(params, gradients, strict=True):
            if not self.state[p]:
                self._start(p, g)
        states = [self.state[p] for p in params]
        for state in states:
            state["step"] += 1
        if group["decoupled_weight_decay"] and group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        m, v = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        torch._foreach_lerp_(m, gradients, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)
        steps = [float(s["step"]) for s in states]
        roots = torch._foreach_sqrt(v)
        torch._foreach_div_(roots, [(1 - beta2**t) ** 0.5 for t in steps])
        torch._foreach_add_(roots, eps)
        torch._foreach_mul_(roots, [-(1 - beta1**t) / lr if lr else float("inf") for t in steps])
        torch._foreach_addcdiv_(params, m, roots)


def _gradient(p: Tensor, group: dict[str, Any]) -> Tensor:
    """The gradient with coupled weight decay."""
    assert p.grad is not None
    if group["weight_decay"] and not group["decoupled_weight_decay"]:
        return p.grad.add(p, alpha=group["weight_decay"])
    return p.grad
