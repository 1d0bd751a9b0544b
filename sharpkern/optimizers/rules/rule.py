"""What a rule says of an optimizer, and what it is given to say it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ..parts import is_spread, local_part

Group = dict[str, Any]
Optimizer = torch.optim.Optimizer
Geometry = Literal["diagonal", "sign", "spectral"]


def learning_rate(group: Group) -> float:
    """Return a parameter group's lr as a number; 1 where it is None.

    Hugging Face's Adafactor has ``lr=None`` where it makes its own rate. That rate differs between parameters, so the
    rule puts all of it into P, and the number that multiplies ``P^-1`` is then 1.

    Raises:
        TypeError: the group has no lr.

    >>> learning_rate({"lr": torch.tensor(0.25)}), learning_rate({"lr": None})
    (0.25, 1.0)
    """
    # Said here, as every ratio of rates comes by: a KeyError would name neither optimizer nor remedy.
    if "lr" not in group:
        raise TypeError(f"a step is measured in units of lr, and this optimizer has none, only {sorted(group)}.")
    return 1.0 if group["lr"] is None else float(group["lr"])


@dataclass(frozen=True)
class Step:
    """One parameter's part in a step, as ``Rule.inv_sqrt`` sees it.

    Attributes:
        optimizer: only read.
        group: the parameter group that holds the parameter.
        parameter: as it is now; its shape is the one that ``gradient`` lost.
        state: the parameter's state; {} before its first step, and then ``gradient`` is given.
        gradient: flat ``[n]``, as the moments see it: its sign turned under ``maximize``, coupled weight decay added.
            None where P is that of the step last taken, to be read from the state as it is.
        dtype: of the result, float32 or float64.
        first_moment_correction: whether P has the factor ``1 - b1^t``.
    """

    optimizer: Optimizer
    group: Group
    parameter: Tensor
    state: dict[str, Any]
    gradient: Tensor | None
    dtype: torch.dtype
    first_moment_correction: bool

    @cached_property
    def t(self) -> float:
        """The number of the step that P belongs to, 1 for the first."""
        # Schedule-free optimizers count the steps of a group, for parameters that join late too.
        done = float(self.group["k"]) if "k" in self.group else float(self.state.get("step", 0.0))
        return done if self.gradient is None else done + 1

    def coming_gradient(self) -> Tensor:
        """Return the gradient, for rules whose P is known before the step only.

        Raises:
            RuntimeError: P of the step last taken is asked for.
        """
        if self.gradient is None:
            raise RuntimeError(
                f"{type(self.optimizer).__name__} does not keep what made P of its last step: pass gradients='next' "
                "after backward(), or a mapping from parameter to gradient, for P of the coming step."
            )
        return self.gradient

    def matrix(self) -> Tensor:
        """Return the parameter, for rules that look at its rows and columns.

        Raises:
            TypeError: this process may hold a part of it only.
        """
        if is_spread(self.parameter):
            raise TypeError(
                f"{type(self.optimizer).__name__} looks at rows and columns, and this parameter is sharded: its P is "
                "known for parameters that a process holds whole."
            )
        return self.parameter

    def kept(self, key: str) -> Tensor:
        """Return an entry of the state, flat ``[n]``; this process's part of a DTensor."""
        tensor = local_part(self.state[key])
        # reshape and not view: a moment has its parameter's strides, which may be those of channels_last
        return tensor.reshape(-1).to(self.dtype)

    def average(self, key: str, value: Tensor | None, weight: float) -> Tensor:
        """Return a running average after the step, flat: ``average + weight (value - average)``, from zero."""
        if value is None:  # the optimizer has put the gradient in already
            return self.kept(key)
        return self.kept(key).lerp(value, weight) if self.state else value * weight

    @property
    def correction(self) -> float:
        """The bias correction of the first moment, ``1 - b1^t``; 1 where P is asked for without it."""
        return 1 - float(self.group["betas"][0]) ** self.t if self.first_moment_correction else 1.0


@dataclass(frozen=True)
class Rule:
    """One optimizer.

    Attributes:
        kappa: ``(group, first_step) -> float``: on a quadratic loss the group is stable while ``lr * curvature`` is
            below kappa, decoupled weight decay included; ``first_step`` asks for the step with an empty momentum. None
            where no number can do that, as the step does not grow with the gradient.
        inv_sqrt: ``Step -> [n]``: P^-1/2 of one parameter, flat, in the step's dtype; None for P = 1.
        moments: keys of the state that hold the first and the second moment; "" for none.
        rise: relative rise of the loss that one step at the critical learning rate may cause. Adaptive optimizers get
            less: a spike inflates their second moment for ``1 / (1 - b2)`` steps.
        geometry: "diagonal" where the step is ``lr P^-1`` times a gradient or an average of gradients. "sign" and
            "spectral" where it has a fixed length in another norm, whatever the gradient's size (Lion; Muon): there is
            no P, kappa is None, and ``optimizers.unit_ball`` has the norm.
        scales_with_lr: whether the step is proportional to lr, so that a step with lr 1 tells those with any other.
        decay_in_gradient: whether weight decay is added to the gradient before the moments see it, where the group has
            no ``decoupled_weight_decay`` of its own.
        options: the names that the class puts into ``optimizer.defaults``, all of them, in one string. Given for
            classes that are recognised by name: a version with other options may have another step. "" for no check.
    """

    kappa: Callable[[Group, bool], float] | None
    inv_sqrt: Callable[[Step], Tensor] | None = None
    moments: tuple[str, str] = ("exp_avg", "exp_avg_sq")
    rise: float = 0.01
    geometry: Geometry = "diagonal"
    scales_with_lr: bool = True
    decay_in_gradient: bool = True
    options: str = ""

    @property
    def adaptive(self) -> bool:
        """Whether P is anything but the identity, parameter groups apart."""
        return self.inv_sqrt is not None

    def coupled_decay(self, group: Group) -> float:
        """Return the weight decay that the moments see as a part of the gradient."""
        # torch's classes with a choice name it in the group; AdamW has the key too, as it is Adam inside.
        if not self.decay_in_gradient or group.get("decoupled_weight_decay"):
            return 0.0
        return float(group.get("weight_decay", 0.0))


def decayed(kappa: float, group: Group) -> float:
    """Return kappa under decoupled weight decay w, ``kappa (1 - lr w / 2)``.

    At the edge x swings, ``x_{t+1} = -x_t``; the decay does ``lr w`` of the 2 that the step has to do.
    """
    return kappa * (1 - learning_rate(group) * float(group["weight_decay"]) / 2)
