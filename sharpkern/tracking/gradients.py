"""The gradients that an optimizer will step with, and in which direction."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_SCALED = 100.0  # a loss scale is at least this; it starts at 65,536
_PARALLEL = 0.999  # cosine; the two differ by the rounding of 16-bit floats


def climbs(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether the optimizer maximises the loss.

    Raises:
        ValueError: some parameter groups do and others do not: then no Hessian belongs to its steps.
    """
    signs = {bool(group.get("maximize", False)) for group in optimizer.param_groups}
    if len(signs) > 1:
        raise ValueError("maximize differs between parameter groups: a saddle point's dynamics have no sharpness.")
    return True in signs


def gradients_to_step_with(
    batch: Mapping[Tensor, Tensor], given: Mapping[Tensor, Tensor] | None
) -> dict[Tensor, Tensor]:
    """Return the gradient of each parameter that the optimizer will use.

    Args:
        batch: parameter -> gradient of the step's batch.
        given: the gradients to step with; None for ``p.grad``. Where there is none, the batch's is taken.

    Raises:
        ValueError: a gradient's shape is not its parameter's; or ``p.grad`` still carries a loss scale: it is parallel
            to the batch's gradient and a hundred times as long, or longer.
    """
    found = {p: p.grad if given is None else given.get(p) for p in batch}
    for p, g in found.items():
        if g is not None and g.shape != p.shape:
            raise ValueError(f"the gradient of a parameter of shape {list(p.shape)} has shape {list(g.shape)}.")
    if given is None:
        _check_scale(batch, {p: g for p, g in found.items() if g is not None})
    return {p: batch[p] if g is None else g.detach() for p, g in found.items()}


def _check_scale(batch: Mapping[Tensor, Tensor], left: Mapping[Tensor, Tensor]) -> None:
    """Notice a loss scale, which would make the second moments wrong by its square."""
    if not left:
        return
    lengths = torch.nn.utils.get_total_norm([batch[p] for p in left]), torch.nn.utils.get_total_norm(left.values())
    own, found = (float(x) for x in lengths)
    if not own > 0 or not found > _SCALED * own:  # most steps end here
        return
    # Scaled first, because a product of two such lengths may overflow.
    pairs = [(batch[p] / own, g.to(batch[p].dtype) / found) for p, g in left.items()]
    if float(torch.stack([(a * b).sum(dtype=torch.float64) for a, b in pairs]).sum()) > _PARALLEL:
        raise ValueError(
            f"p.grad is {found / own:.6g} times the batch's gradient, as a GradScaler's loss scale leaves it: call "
            "scaler.unscale_(optimizer) before observe(), or pass gradients=."
        )
