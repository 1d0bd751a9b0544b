"""The update that an optimizer would make now, without making it."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def next_update(optimizer: torch.optim.Optimizer, gradients: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """Return D of the step that the optimizer would take now: ``theta <- theta - lr D``, lr the first group's.

    The step is taken by a copy of the optimizer, in float64, on copies of parameters and state. Its hooks do not run.

    Args:
        optimizer: any whose step is linear in the learning rate and needs no closure; only read.
        gradients: parameter -> gradient; the others do not move.

    Returns:
        parameter -> D in its shape, float64. Where groups have different rates, D has the ratio to the first's.

    Raises:
        TypeError: the optimizer's step needs a closure.
        RuntimeError: the first group's lr is 0 and another's is not.

    >>> w = nn.Parameter(torch.ones(1))
    >>> next_update(torch.optim.SGD([w], lr=0.1, weight_decay=0.5), {w: torch.tensor([2.0])})[w].item()
    2.5
    """
    # In float64, so that the difference of two parameters below has the digits of D and not those of the parameter.
    twins = {p: nn.Parameter(p.detach().to(torch.float64, copy=True)) for p in gradients}
    for p, twin in twins.items():
        twin.grad = gradients[p].detach().to(torch.float64, copy=True)
    first = float(optimizer.param_groups[0]["lr"])
    groups = []
    for group in optimizer.param_groups:
        lr = float(group["lr"])
        if first == 0 and lr != 0:
            raise RuntimeError(f"the first group's lr is 0 and another's is {lr}: their ratio is unknown.")
        # A step with lr 1 is D itself, and is defined where the present lr is 0 as well.
        ratio = 1.0 if lr == first else lr / first
        groups.append({**group, "lr": ratio, "params": [twins[p] for p in group["params"] if p in twins]})
    # The class's own __init__ may want arguments that nobody kept.
    stepper = object.__new__(type(optimizer))
    # A schedule puts its own ``step`` on the instance; without it the class's is found.
    stepper.__dict__.update({name: x for name, x in vars(optimizer).items() if name != "step"})
    stepper.__dict__.update({name: OrderedDict() for name in vars(optimizer) if name.endswith("_hooks")})
    stepper.param_groups = groups
    stepper.state = defaultdict(dict)
    for p, twin in twins.items():
        if p in optimizer.state:
            stepper.state[twin] = {key: _copied(key, x, p.shape) for key, x in optimizer.state[p].items()}
    try:
        stepper.step()
    except TypeError as error:
        raise TypeError(f"{type(optimizer).__name__} has no update without a closure: {error}.") from error
    return {p: p.detach().double() - twin.detach() for p, twin in twins.items()}


def _copied(key: str, value: Any, shape: torch.Size) -> Any:
    """Copy a piece of state, moments in float64."""
    if isinstance(value, Tensor) and value.shape == shape and key != "step":
        return value.detach().to(torch.float64 if value.is_floating_point() else value.dtype, copy=True)
    return copy.deepcopy(value)
