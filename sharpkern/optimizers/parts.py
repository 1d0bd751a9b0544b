"""Parameters that are spread over processes (DTensor): this process's part of one, and the way back."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_spread(t: Any) -> bool:
    """Whether a tensor is a DTensor, of which this process may hold only a part."""
    # By its method, because importing torch.distributed.tensor takes longer than all of this package.
    return isinstance(t, Tensor) and hasattr(t, "to_local")


def local_part(t: Tensor) -> Tensor:
    """Return this process's part of a DTensor, on its memory and without a graph; any other tensor as it is."""
    part: Tensor = t.detach().to_local() if is_spread(t) else t  # type: ignore[attr-defined]
    return part


def spread_like(part: Tensor, like: Tensor) -> Tensor:
    """Return the DTensor that has this part here and is laid out like another one; the part itself if none is."""
    if not is_spread(like):
        return part
    from torch.distributed.tensor import DTensor

    layout: Any = like
    return DTensor.from_local(
        part, layout.device_mesh, layout.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
