"""The gate: a program is used only if it gives the loss, gradient and buffers of the user's own eager model."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..rop import ReplayedProgram
from ..rop.sandbox import kept_random_states
from .eager import EagerPass, run_eagerly

# Two right ways to the same gradient differ by rounding; wrong ones by parts of the whole.
_ROUNDING = 512.0  # in units of the coarsest rounding inside the model
_MOST = 0.1  # relative difference that is never taken for rounding
_BUFFER = 1e-3  # relative difference of a buffer that is no rounding: a running mean, not one more sum of it
_SMALL = 0.1  # a parameter's gradient is compared on the scale of its own, or of this part of the whole


@dataclass(frozen=True)
class Verdict:
    """Whether a program agrees with the eager model.

    Attributes:
        agrees: loss, gradient and buffers are the same but for rounding.
        what: the first that is not, and by how much.
        difference: the largest relative difference of loss and gradient.
        loss: the program's.
    """

    agrees: bool
    what: str
    difference: float
    loss: Tensor | None = None


def compare(
    engine: ReplayedProgram,
    module: nn.Module,
    leaves: Sequence[Any],
    spec: pytree.TreeSpec,
    params: Mapping[str, Tensor],
    eager: EagerPass,
) -> Verdict:
    """Run a program's primal sweeps where the eager pass started, and compare.

    Random states and buffers are left as they are; the program's own primal values are replaced.

    Args:
        engine: the program.
        module: what it was exported from.
        leaves: the batch's.
        spec: the batch's.
        params: name -> parameter.
        eager: ``run_eagerly`` of the same module, batch and parameters, from the same random state.
    """
    # The program draws what the eager pass drew: both start from the same state, so masks are the same.
    with kept_random_states({t.device for t in params.values()}):
        loss = engine.forward(module, leaves)
        engine.backward()
        gradient = engine.gradient()
    parts = gradient.split([p.numel() for p in params.values()])
    pieces = [g.view(p.shape) for g, p in zip(parts, params.values(), strict=True)]
    allowed = min(_MOST, _ROUNDING * engine.program.graph.rounding)
    verdict = _differences(loss, pieces, eager, params, allowed)
    # Only where rounding could be the reason: a copy in float64 is expensive, and a large difference is no rounding.
    if not verdict.agrees and verdict.difference <= _MOST:
        verdict = _second_look(verdict, loss, pieces, module, pytree.tree_unflatten(list(leaves), spec), params, eager)
    # Buffers last: where loss or gradient is wrong already, that is what a user should read.
    if verdict.agrees and (name := _other_buffer(module, engine.program.new_buffers(), eager.buffers)) is not None:
        verdict = Verdict(False, f"the buffer {name!r} that the forward pass leaves", verdict.difference)
    return replace(verdict, loss=loss)


def _differences(
    loss: Tensor, pieces: Sequence[Tensor], eager: EagerPass, params: Mapping[str, Tensor], allowed: float
) -> Verdict:
    """Compare loss and gradient, each part on the scale of its own."""
    # None is the eager way to say zero.
    wanted = [torch.zeros_like(p) if g is None else g for g, p in zip(eager.gradients, params.values(), strict=True)]
    norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in wanted])
    whole = float(torch.linalg.vector_norm(norms))
    # Subtracted as they are, which rounds the difference alone: copies in float64 would cost half a gradient.
    pairs = zip(pieces, wanted, strict=True)
    gaps = torch.stack([torch.linalg.vector_norm(a - b, dtype=torch.float64) for a, b in pairs])
    relative = gaps / norms.clamp(min=max(_SMALL * whole, torch.finfo(torch.float64).tiny))
    # A NaN would be lost in ``argmax`` or in a comparison, and must be the worst of all.
    relative = torch.where(relative.isnan(), math.inf, relative)
    worst = int(relative.argmax())
    value = float(eager.loss)
    off = abs(float(loss) - value) / max(abs(value), torch.finfo(torch.float64).tiny)
    difference = max(off, float(relative[worst]))
    if off > allowed or math.isnan(off):
        return Verdict(False, f"the loss, {float(loss):.6g} instead of {value:.6g}", difference)
    if float(relative[worst]) > allowed:
        return Verdict(False, f"the gradient of {list(params)[worst]!r}, by {float(relative[worst]):.2g}", difference)
    return Verdict(True, "", difference)


def _second_look(
    verdict: Verdict,
    loss: Tensor,
    pieces: Sequence[Tensor],
    module: nn.Module,
    batch: Any,
    params: Mapping[str, Tensor],
    eager: EagerPass,
) -> Verdict:
    """Where terms cancel, both are rounding: let a float64 copy say which of the two is nearer, if there can be one."""
    try:
        twin = copy.deepcopy(module).double()
        # The caller's names need not be the module's: a functional loss has others.
        names = {id(p): name for name, p in module.named_parameters()}
        own = dict(twin.named_parameters())
        doubles = {name: own[names[id(p)]] for name, p in params.items()}
        wide = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, batch)
        truth = run_eagerly(twin, wide, doubles)
    except Exception:  # a user's code need not run in float64, nor be copied
        return verdict
    zeros = [torch.zeros_like(p) for p in params.values()]
    theirs = [z if g is None else g for g, z in zip(eager.gradients, zeros, strict=True)]
    exact = EagerPass(truth.loss, truth.gradients, {}, [], draws=False)
    mine = _differences(loss, pieces, exact, params, 0.0)
    eagers = _differences(eager.loss, theirs, exact, params, 0.0)
    # As near to the truth as eager torch is, up to a small factor: two sums of rounding are never equal.
    return Verdict(True, "", verdict.difference) if mine.difference <= 4 * eagers.difference else verdict


def _other_buffer(module: nn.Module, program: Mapping[str, Tensor], eager: Mapping[str, Tensor]) -> str | None:
    """Name a buffer that the program would leave otherwise than the eager pass did."""
    for name, left in eager.items():
        mine = program.get(name)
        if mine is None:
            # The program does not write it, so it leaves the value that is there.
            mine = module.get_buffer(name)
        if mine.shape != left.shape:
            return name
        if not left.numel() or left.layout is not torch.strided:
            continue
        if float((mine.double() - left.double()).abs().max()) > _BUFFER * float(left.abs().max()):
            return name
    return None
