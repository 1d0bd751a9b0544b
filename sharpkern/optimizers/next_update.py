"""The update that an optimizer would make now, without making it."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .rules import Group, inner_optimizer, learning_rate, rule_of

# Kept as they are: the optimizer's own rounding of these (float32) is a part of its step.
_COUNTS = ("step", "mu_product")
# A power of two, so that dividing by it loses nothing: a step so long has the digits of D, not those of the parameter.
_LONG = 2.0**20


def next_update(
    optimizer: torch.optim.Optimizer, gradients: Mapping[Tensor, Tensor], *, precise: bool = True
) -> dict[Tensor, Tensor]:
    """Return D of the step that the optimizer would take now: ``theta <- theta - lr D``, lr the first group's.

    The step is taken by a copy of the optimizer, on copies of parameters and state. Its hooks do not run.
    Where the table (``optimizers.rules``) says that the step is a multiple of lr, D holds for every lr; for others it
    is the step at the present one. Muon rounds to bfloat16 in between, so D of a float32 parameter agrees with the step
    to about 1e-2.

    Args:
        optimizer: any whose step needs no closure; only read. Schedule-free ones in training mode.
        gradients: parameter -> gradient; the others do not move.
        precise: copy in float64. False keeps the parameters' dtype, which is faster: each element of D is then right
            to about that dtype's rounding of the largest number it is made of.

    Returns:
        parameter -> D in its shape, float64 if precise. Where groups have different rates, D has the ratio to the
        first's.

    Raises:
        TypeError: the optimizer's step needs a closure, or its state is spread over ranks.
        RuntimeError: the first group's lr is 0 and another's is not, or the step is known not to be a multiple of lr.

    Cost: memory for five copies of the parameters, moments included, while it runs.

    >>> w = nn.Parameter(torch.ones(1))
    >>> next_update(torch.optim.SGD([w], lr=0.1, weight_decay=0.5), {w: torch.tensor([2.0])})[w].item()
    2.5
    """
    groups, optimizer = optimizer.param_groups, inner_optimizer(optimizer)
    # In float64, so that the difference of two parameters below has the digits of D and not those of the parameter.
    dtype = torch.float64 if precise else None
    twins = {p: nn.Parameter(p.detach().to(dtype or p.dtype, copy=True)) for p in gradients}
    for p, twin in twins.items():
        twin.grad = gradients[p].detach().to(twin.dtype, copy=True)
    rates, lr = _rates(optimizer, groups, 1.0 if precise else _LONG)
    # The class's own __init__ may want arguments that nobody kept.
    stepper = object.__new__(type(optimizer))
    # A schedule puts its own ``step`` on the instance; without it the class's is found.
    stepper.__dict__.update({name: x for name, x in vars(optimizer).items() if name != "step"})
    stepper.__dict__.update({name: OrderedDict() for name in vars(optimizer) if name.endswith("_hooks")})
    stepper.param_groups = [_copied_group(group, rate, twins) for group, rate in zip(groups, rates, strict=True)]
    if not precise:
        _fuse(stepper.param_groups)
    stepper.state = defaultdict(dict)
    for p, twin in twins.items():
        if p in optimizer.state:
            stepper.state[twin] = {key: _copied(key, x, dtype) for key, x in optimizer.state[p].items()}
    try:
        stepper.step()
    except TypeError as error:
        raise TypeError(f"{type(optimizer).__name__} has no update without a closure: {error}.") from error
    return {p: (p.detach().to(twin.dtype) - twin.detach()) / lr for p, twin in twins.items()}


def _rates(optimizer: torch.optim.Optimizer, groups: list[Group], unit: float) -> tuple[list[float | None], float]:
    """Return the lr at which each group of the copy steps, and by what the step is then divided.

    Args:
        optimizer: without its wrapper.
        groups: as the wrapper has them.
        unit: rate of the first group where every rate gives the same D.
    """
    lrs = [learning_rate(group) for group in groups]
    first = lrs[0]
    if first == 0 and any(lrs):
        raise RuntimeError(f"the first group's lr is 0 and another's is {max(lrs)}: their ratio is unknown.")
    try:
        scales = rule_of(optimizer).scales_with_lr
    except TypeError:  # no rule: its own lr gives the step that it takes, and at 0 there is nothing better than 1
        scales = first == 0
    if scales:
        # A step with lr 1 is D itself, without a rounding by a small lr, and is defined where the present lr is 0.
        return [unit if lr == first else unit * lr / first for lr in lrs], unit
    if first == 0:
        raise RuntimeError(
            f"the first group's lr is 0, and the step of {type(optimizer).__name__} is no multiple of lr: set lr first."
        )
    return [None if group["lr"] is None else lr for group, lr in zip(groups, lrs, strict=True)], first


def _copied_group(group: Group, lr: float | None, twins: Mapping[Tensor, nn.Parameter]) -> Group:
    """Copy a group with another lr; of its parameters, those that step."""
    result = {**group, "lr": lr, "params": [twins[p] for p in group["params"] if p in twins]}
    if isinstance(group.get("eps"), tuple) and group["eps"][0] is None and group["params"]:
        # torch's Adafactor takes the rounding of the parameter's dtype, which is float64 in the copy.
        result["eps"] = (torch.finfo(group["params"][0].dtype).eps, *group["eps"][1:])
    return result


def _fuse(groups: list[Group]) -> None:
    """Let the copy step in one pass over memory where torch has a fused step and would take some ten on a CPU."""
    for group in groups:
        floats = all(p.dtype in (torch.float32, torch.float64) and p.device.type == "cpu" for p in group["params"])
        plain = not group.get("differentiable") and not any(isinstance(b, Tensor) for b in group.get("betas", ()))
        if floats and plain and group.get("fused", True) is None:
            group["fused"] = True


def _copied(key: str, value: Any, dtype: torch.dtype | None) -> Any:
    """Copy a piece of state, tensors in a dtype if one is given: factored moments have shapes of their own."""
    if isinstance(value, Tensor) and value.is_floating_point() and key not in _COUNTS:
        return value.detach().to(dtype or value.dtype, copy=True)
    return copy.deepcopy(value)
