"""Stand-ins for optimizers of other packages, written from their formulas and carrying their names.

The table knows those optimizers by module and name, so it takes a stand-in for the real class. Where the package is
installed, ``test_optimizer_steps.py`` steps both and compares.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor


class Twin(torch.optim.Optimizer):
    """Calls ``move`` for every parameter that has a gradient."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            self.begin(group)
            for p in group["params"]:
                if p.grad is not None:
                    self.move(group, p, self.state[p])

    def begin(self, group: dict[str, Any]) -> None:
        """Once for each group and step."""

    def move(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
        raise NotImplementedError


class Lion(Twin):
    """theta -= lr (sign(b1 m + (1 - b1) g) + w theta), then m by b2."""

    def __init__(self, params: Any, lr: float = 1e-4, betas: Any = (0.9, 0.99), weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)

    def move(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
        m = state.setdefault("exp_avg", torch.zeros_like(p))
        (b1, b2), lr = group["betas"], group["lr"]
        direction = torch.sign(b1 * m + (1 - b1) * p.grad)
        p.copy_((1 - lr * group["weight_decay"]) * p - lr * direction)
        m.copy_(b2 * m + (1 - b2) * p.grad)


class TimmLion(Lion):
    """The same step; with more options."""

    def __init__(self, params: Any, lr: float = 1e-4, betas: Any = (0.9, 0.99), weight_decay: float = 0.0) -> None:
        Twin.__init__(
            self, params, lr=lr, betas=betas, weight_decay=weight_decay, caution=False, corrected_weight_decay=False,
            max_lr_snapshot=None, foreach=None, maximize=False,
        )  # fmt: skip


class ScheduleFree(Twin):
    """Parameters are y between steps; z takes the steps, and x = (y - (1 - b) z) / b averages z."""

    def __init__(self, params: Any, lr: float, weight_decay: float, warmup_steps: int, r: float, **more: Any) -> None:
        super().__init__(
            params, lr=lr, weight_decay=weight_decay, warmup_steps=warmup_steps, r=r, k=0, train_mode=False,
            weight_sum=0.0, lr_max=-1.0, scheduled_lr=0.0, weight_lr_power=2.0, foreach=True, **more,
        )  # fmt: skip

    def train(self) -> None:
        for group in self.param_groups:
            group["train_mode"] = True

    def begin(self, group: dict[str, Any]) -> None:
        group["k"] += 1
        share = min(1.0, group["k"] / group["warmup_steps"]) if group["warmup_steps"] else 1.0
        group["scheduled_lr"] = group["lr"] * share
        group["lr_max"] = max(group["lr_max"], group["scheduled_lr"])
        group["weight"] = group["k"] ** group["r"] * group["lr_max"] ** 2
        group["weight_sum"] += group["weight"]

    def move(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
        b, lr = self.interpolation(group), group["scheduled_lr"]
        z = state.setdefault("z", p.clone())
        x = (p - (1 - b) * z) / b
        z -= lr * (self.direction(group, p, state) + group["weight_decay"] * p)
        c = group["weight"] / group["weight_sum"]
        x = (1 - c) * x + c * z
        p.copy_((1 - b) * z + b * x)

    def interpolation(self, group: dict[str, Any]) -> float:
        raise NotImplementedError

    def direction(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> Tensor:
        raise NotImplementedError


class SGDScheduleFree(ScheduleFree):
    def __init__(
        self, params: Any, lr: float = 1.0, momentum: float = 0.9, weight_decay: float = 0.0, warmup_steps: int = 0,
        r: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(params, lr, weight_decay, warmup_steps, r, momentum=momentum)

    def interpolation(self, group: dict[str, Any]) -> float:
        return group["momentum"]

    def direction(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> Tensor:
        return p.grad


class AdamWScheduleFree(ScheduleFree):
    def __init__(
        self, params: Any, lr: float = 0.0025, betas: Any = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
        warmup_steps: int = 0, r: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(params, lr, weight_decay, warmup_steps, r, betas=betas, eps=eps)

    def interpolation(self, group: dict[str, Any]) -> float:
        return group["betas"][0]

    def direction(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> Tensor:
        b2 = group["betas"][1]
        v = state.setdefault("exp_avg_sq", torch.zeros_like(p))
        v.copy_(b2 * v + (1 - b2) * p.grad**2)
        return p.grad / ((v / (1 - b2 ** group["k"])).sqrt() + group["eps"])


class Adafactor(Twin):
    """Hugging Face's."""

    def __init__(
        self, params: Any, lr: float | None = None, eps: Any = (1e-30, 1e-3), clip_threshold: float = 1.0,
        decay_rate: float = -0.8, beta1: float | None = None, weight_decay: float = 0.0, scale_parameter: bool = True,
        relative_step: bool = True, warmup_init: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            params, lr=lr, eps=eps, clip_threshold=clip_threshold, decay_rate=decay_rate, beta1=beta1,
            weight_decay=weight_decay, scale_parameter=scale_parameter, relative_step=relative_step,
            warmup_init=warmup_init,
        )  # fmt: skip

    def move(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
        g = p.grad
        if not state:
            state["step"], state["exp_avg"] = 0, torch.zeros_like(p)
        state["step"] += 1
        t = state["step"]
        state["RMS"] = p.norm() / math.sqrt(p.numel())
        rate = group["lr"]
        if group["relative_step"]:
            rate = min(1e-6 * t if group["warmup_init"] else 1e-2, t**-0.5)
        if group["scale_parameter"]:
            rate = rate * max(group["eps"][1], float(state["RMS"]))
        squares, old = g**2 + group["eps"][0], 1 - t ** group["decay_rate"]
        if g.ndim < 2:
            v = state.setdefault("exp_avg_sq", torch.zeros_like(p))
            v.copy_(old * v + (1 - old) * squares)
            u = g / v.sqrt()
        else:
            rows = state.setdefault("exp_avg_sq_row", torch.zeros_like(squares.mean(-1)))
            columns = state.setdefault("exp_avg_sq_col", torch.zeros_like(squares.mean(-2)))
            rows.copy_(old * rows + (1 - old) * squares.mean(-1))
            columns.copy_(old * columns + (1 - old) * squares.mean(-2))
            u = g / (rows / rows.mean(-1, keepdim=True)).sqrt()[..., None] / columns.sqrt()[..., None, :]
        u = rate * u / max(1.0, float(u.square().mean().sqrt()) / group["clip_threshold"])
        if group["beta1"] is not None:
            state["exp_avg"].copy_(group["beta1"] * state["exp_avg"] + (1 - group["beta1"]) * u)
            u = state["exp_avg"]
        p.copy_((1 - group["weight_decay"] * rate) * p - u)


NAMES = {
    Lion: "lion_pytorch.lion_pytorch.Lion",
    TimmLion: "timm.optim.lion.Lion",
    SGDScheduleFree: "schedulefree.sgd_schedulefree.SGDScheduleFree",
    AdamWScheduleFree: "schedulefree.adamw_schedulefree.AdamWScheduleFree",
    Adafactor: "transformers.optimization.Adafactor",
}
DIAGONAL = (SGDScheduleFree, AdamWScheduleFree, Adafactor)
for twin, name in NAMES.items():
    twin.__module__, _, twin.__qualname__ = name.rpartition(".")


def begin(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Put a schedule-free optimizer into training mode."""
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def original(twin: type) -> Any:
    """Return the class that a stand-in stands for; None where its package is not installed."""
    module, _, name = NAMES[twin].rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None
