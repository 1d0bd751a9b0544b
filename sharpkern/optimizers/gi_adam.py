"""GI-Adam: Adam whose second moment starts from a gradient instead of zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT


class GIAdam(torch.optim.Adam):
    """Adam with the second moment initialised by a gradient, ``v_0 = g_0^2``; both bias corrections are kept.

        m_t = b1 m_{t-1} + (1 - b1) g_t       v_t = b2 v_{t-1} + (1 - b2) g_t^2
        theta <- theta - lr (m_t / (1 - b1^t)) / (sqrt(v_t / (1 - b2^t)) + eps)

    As v is at its full size from the start, dividing it by ``1 - b2^t`` inflates it: a built-in warmup, of
    effective lr ``lr sqrt(1 - b2^t)``, 0.03 lr at the first step. Weights with ``g_0 = 0`` are plain Adam's.

    ``initialize()`` sets v_0 from the gradients present then (the paper draws one batch for it before
    training). A parameter not initialised by its first step uses that step's own gradient as g_0. State,
    state_dict and parameter groups are those of ``torch.optim.Adam``.

    With ``v0="random"`` it is RI-Adam: ``v_0 = z^2``, z normal and scaled so that ``|z| = |g_0|`` over all parameters
    that start together. It tells the size of v_0 from its direction. ``sharpkern.preconditioner`` knows P before the
    first step only after ``initialize()``, which draws z.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment, after its bias correction.
        weight_decay: coupled (added to the gradient), unless decoupled.
        decoupled: shrink the weights by ``1 - lr weight_decay`` instead, as AdamW.
        v0: "gradient", or "random" for RI-Adam, from torch's global generator.
        amsgrad: divide by the largest second moment so far.
        foreach: one call for many tensors; None chooses.
        maximize: ascend.
        capturable: keep the step on the device, for CUDA graphs.

    Raises:
        ValueError: an argument is out of range.

    Source: Kalra and Barkeshli, Why warmup the learning rate? (2024), GI-Adam and RI-Adam.

    >>> p = torch.nn.Parameter(torch.zeros(1))
    >>> p.grad = torch.ones(1)
    >>> GIAdam([p], lr=1.0).step()
    >>> round(p.item(), 5)  # Adam's first step is -1
    -0.03162
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = False,
        v0: Literal["gradient", "random"] = "gradient",
        amsgrad: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        if v0 not in ("gradient", "random"):
            raise ValueError(f"v0 must be 'gradient' or 'random', got {v0!r}.")
        self.v0 = v0
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad,
            decoupled_weight_decay=decoupled,
            foreach=foreach, maximize=maximize, capturable=capturable,
        )  # fmt: skip

    @property
    def starts_from_gradient(self) -> bool:
        """Read by ``sharpkern.preconditioner``, as P of the first step differs from Adam's."""
        if self.v0 == "random":
            raise RuntimeError("v_0 is not drawn yet: call the optimizer's initialize() after backward().")
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "v0": self.v0}

    @torch.no_grad()
    def initialize(self, closure: Callable[[], Any] | None = None) -> Any:
        """Set ``v_0 = g_0^2`` from the gradients in ``p.grad``; call it once, before the first step.

        Args:
            closure: computes the gradients first (backward on one batch) and returns the loss.

        Returns:
            The closure's result, or None.

        Raises:
            RuntimeError: no parameter has a gradient, or a parameter is already initialised.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        present = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not present:
            raise RuntimeError("initialize() needs gradients: run backward() first, or pass a closure.")
        if started := sum(1 for p in present if self.state.get(p)):
            raise RuntimeError(
                f"{started} of {len(present)} parameters are initialised already: call initialize() "
                f"once, before the first step()."
            )
        self._start()
        return result

    def _init_group(self, group: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Start what is new, then let Adam collect its lists; ``step`` calls this after the closure."""
        if any(p.grad is not None and not self.state.get(p) for p in group["params"]):
            self._start()
        return super()._init_group(group, *args, **kwargs)

    def _start(self) -> None:
        """Create the state of parameters that have a gradient and none yet, in all groups, and fill v_0."""
        first: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            decay = 0.0 if group["decoupled_weight_decay"] else group["weight_decay"]
            # Under maximize Adam turns the gradient before it adds the decay; of -g + w p only the square counts.
            decay = -decay if group["maximize"] else decay
            for p in group["params"]:
                if p.grad is not None and not self.state.get(p):
                    first[p] = p.grad if decay == 0 else p.grad.add(p, alpha=decay)
            # Adam's own method creates the state, so that its keys, dtypes and devices are Adam's in every version.
            super()._init_group(group, [], [], [], [], [], [])
        if self.v0 == "random":
            drawn = {p: torch.randn_like(g) for p, g in first.items()}
            # One scale for all parameters: RI-Adam keeps the size of v_0 and forgets how it is spread over layers.
            scale = total_norm(list(first.values())) / (total_norm(list(drawn.values())) or 1.0)
            first = {p: z.mul_(scale) for p, z in drawn.items()}
        for p, g in first.items():
            self.state[p]["exp_avg_sq"].copy_(g).square_()


def total_norm(tensors: list[Tensor]) -> float:
    """Return the Euclidean norm of all tensors together."""
    return math.sqrt(sum(float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in tensors))
