"""The critical learning rate: how far along the optimizer's next update the loss falls, by forward passes only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ..curvature.losses import LossModule, NonFiniteLossError, check_recordable
from ..curvature.parameters import trainable
from ..curvature.wrappers import check_one_process, unwrapped
from ..optimizers.next_update import next_update
from ..optimizers.rules import learning_rate, rule_of

_FLAT = 1e-6  # a bracket this narrow (relative) is not halved further, whatever the rise: the loss jumps there


@dataclass(frozen=True)
class CriticalLR:
    """The smallest learning rate whose step raises the loss.

    Attributes:
        value: an upper end: the smallest learning rate found to raise the loss (of the optimizer's first group; the
            others scale with it). The cap if ``capped``; 0 if the update does not descend at all; infinite if it is
            zero.
        lower: the largest learning rate below ``value`` found not to raise it; ``value`` itself if ``capped``.
        loss: before the step.
        rise: loss after a step with ``value``, less ``loss``, over ``|loss|``; 0 if ``capped``.
        forward_passes: losses evaluated, besides the one forward and backward pass that gives loss and direction.
        capped: no learning rate up to ``value`` raised the loss.
    """

    value: float
    lower: float
    loss: float
    rise: float
    forward_passes: int
    capped: bool

    @property
    def sharpness(self) -> float:
        """Critical sharpness ``2 / value``; on a quadratic the curvature along D, ``D'HD / D'g``."""
        return 2 / self.value if self.value > 0 else math.inf


def critical_learning_rate(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batch: Any,
    optimizer: torch.optim.Optimizer,
    *,
    start: float | CriticalLR | None = None,
    cap: float | None = None,
    rise: float = 0.1,
    tol: float = 1 / 16,
    max_passes: int = 60,
    parallel: int = 1,
) -> CriticalLR:
    """Find the smallest learning rate at which the optimizer's next step raises the loss of this batch.

        eta_c = min { eta > 0 : L(theta - eta D) > L(theta) }

    D is the direction of the step that the optimizer would take now with this batch's gradient (momentum, second
    moments and weight decay included). Doubling or halving from ``start`` brackets eta_c, bisection narrows the
    bracket until it is at most ``tol`` wide and its upper end raises the loss by at most ``rise``. A loss that is NaN
    or infinite counts as raised, a change within rounding does not. Losses that cross L(theta) several times have
    several brackets, and one is found.

    For gradient descent on a quadratic of largest curvature lambda, eta_c is at least 2 / lambda, the more so the more
    the gradient turns from the sharpest direction. At the start of a wide network with mean squares it is 1 to 3
    times 2 / lambda; in narrow ones (width 64) the curvature falls within the step, and it can be 4 to 12 times that.
    With cross-entropy it is often 5 times and more.

    Nothing is left changed, also after an exception: parameters are never written (each loss is that of a copy),
    ``p.grad``, optimizer, buffers and random states stay as they are. Every pass sees the same random numbers
    (dropout masks) as a training step taken now would.

    Args:
        model: a module, in the mode (train or eval) in which it is to be measured.
        loss_fn: ``(output, targets) -> scalar``.
        batch: ``(inputs, targets)`` or a dict; see ``HessianOperator``.
        optimizer: any whose step is linear in the learning rate and needs no closure; only read.
        start: where to start; the result of an earlier step makes it cheap (5 or 6 passes while eta_c moves by less
            than a factor of 2). None starts at the optimizer's learning rate, at 1e-4 if that is 0.
        cap: the largest learning rate to try.
        rise: relative rise of the loss allowed at ``value``; infinite for none.
        tol: relative width of the bracket at which to stop.
        max_passes: the most forward passes.
        parallel: so many learning rates in one batched pass (``torch.func.vmap``), with the memory of as many models
            and activations. It pays where a pass is too small to fill the machine: a rate then costs a sixth at 16
            (a network of 3,000 parameters, batch 16, one core); for products that fill it, it costs slightly more.

    Returns:
        A ``CriticalLR``.

    Raises:
        ValueError: an argument is out of range, the loss is no scalar, the model shares no parameter with the
            optimizer.
        TypeError: an optimizer whose step needs a closure, or is no multiple of its learning rate (Adafactor,
            schedule-free).
        NonFiniteLossError: the loss before the step is NaN or infinite.
        RuntimeError: the first group's lr is 0 and another's is not, so their ratio is unknown.

    Cost: one gradient, ``forward_passes`` forward passes; memory of one copy of the parameters for each of
    ``parallel``, and for a moment of parameters and optimizer state in float64.
    Source: line search of Kalra and Barkeshli, Why warmup the learning rate? (2024), section 6; halving and warm
    start after Kalra et al., critical sharpness (2026), arXiv 2601.16979.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> batch = torch.ones(1, 1), torch.zeros(1, 1)  # the loss is w^2, its curvature 2
    >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> c = critical_learning_rate(model, nn.MSELoss(), batch, sgd, tol=1e-3)
    >>> round(c.lower, 2), round(c.value, 2)
    (1.0, 1.0)
    """
    _check_proportional(optimizer)
    first = learning_rate(optimizer.param_groups[0])
    if isinstance(start, CriticalLR):
        # An update that did not descend (0) or was zero (infinite) says nothing of where to look next.
        start = start.value if 0 < start.value < math.inf else None
    start = (first if 0 < first < math.inf else 1e-4) if start is None else float(start)
    limit = math.inf if cap is None else float(cap)
    if not 0 < start < math.inf or not limit > 0:
        raise ValueError(f"start and cap must be positive, and start finite, got {start} and {cap}.")
    if not rise > 0 or not 0 < tol < 1:
        raise ValueError(f"rise must be positive and tol between 0 and 1, got {rise} and {tol}.")
    if max_passes < 1 or parallel < 1:
        raise ValueError(f"max_passes and parallel must be at least 1, got {max_passes} and {parallel}.")
    line = _Line(model, loss_fn, batch, optimizer)
    # The loss rises from the first bit on, so no learning rate is below the critical one.
    if line.slope < 0:
        return CriticalLR(0.0, 0.0, line.loss, 0.0, 0, False)
    if line.zero:
        return CriticalLR(limit, limit, line.loss, 0.0, 0, True)
    # The loss at ``low`` is not raised, that at ``high`` is. theta itself is the first ``low``.
    low, high, highest = 0.0, math.inf, math.inf
    passes = 0
    while passes < max_passes:
        width = 1 - low / high
        if high == math.inf:
            if low >= limit:
                break
            begin = 2 * low if low else min(start, limit)
            # Ascending, like all three lists: the scan below takes the first rate that raises the loss. The cap may
            # stand in the list several times, hence the set.
            rates = sorted({min(begin * 2.0**i, limit) for i in range(parallel)})
        elif low == 0:
            # Nothing is known below ``high`` yet but theta, so halving finds the size before bisection finds the
            # digits.
            rates = [high / 2.0**i for i in range(parallel, 0, -1)]
        # Written with "not": a loss at ``high`` that is NaN or infinite is also more than the rise allowed.
        elif width > tol or (not highest <= line.loss + rise * abs(line.loss) and width > _FLAT):
            rates = [low + (high - low) * i / (parallel + 1) for i in range(1, parallel + 1)]
        else:
            break
        losses = line.losses(rates)
        passes += len(rates)
        # "not <=" again, so that NaN counts as raised. Within rounding a loss is unchanged, else a flat direction would
        # end the search at random.
        raised = next((i for i, x in enumerate(losses) if not x <= line.loss + line.rounding), len(rates))
        if raised > 0:
            low = rates[raised - 1]
        if raised < len(rates):
            high, highest = rates[raised], losses[raised]
    capped = high == math.inf
    change = 0.0 if capped else (highest - line.loss) / abs(line.loss) if line.loss else math.inf
    return CriticalLR(low if capped else high, low, line.loss, change, passes, capped)


def _check_proportional(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose steps at other rates do not lie on the line ``theta - eta D``."""
    try:
        proportional = rule_of(optimizer).scales_with_lr
    except TypeError:  # most optimizers are proportional, and one that nobody knows is the caller's to judge
        return
    if not proportional:
        raise TypeError(
            f"the step of {type(optimizer).__name__} is no multiple of its learning rate, so one step does not tell "
            "where larger ones lead: search with SGD or Adam."
        )


class _Line:
    """The loss along ``theta - eta D``, by forward passes that leave no trace.

    Attributes:
        loss: at eta = 0.
        slope: ``g'D``, the fall of the loss for a small eta, over eta.
        zero: D = 0.
        rounding: a change of the loss that may be rounding alone.
    """

    def __init__(
        self, model: nn.Module, loss_fn: Callable[..., Tensor], batch: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        check_one_process(model)  # each process would find a rate of its own
        check_recordable(batch)
        self.module, self.batch = LossModule(unwrapped(model), loss_fn), batch
        self.buffers = dict(self.module.named_buffers())
        held = {p for group in optimizer.param_groups for p in group["params"]}
        params = {name: p for name, p in trainable(self.module).items() if p in held}
        if not params:
            raise ValueError("the optimizer holds none of the model's trainable parameters.")
        # ``fork_rng`` without devices would save and restore the state of every GPU there is.
        self.devices = sorted({p.device.index for p in params.values() if p.device.type == "cuda"})
        buffers = {name: b.clone() for name, b in self.buffers.items()}
        # Not ``backward()``: it would write ``p.grad``. Buffers are copies, as batch norm writes into them in training
        # mode.
        with torch.random.fork_rng(self.devices), torch.enable_grad():
            loss = functional_call(self.module, buffers, (batch,))[0]
            if loss.numel() != 1:
                raise ValueError(f"the loss must be a scalar, got shape {list(loss.shape)}.")
            gradients = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        self.loss = float(loss.detach())
        if not math.isfinite(self.loss):
            raise NonFiniteLossError(self.loss)
        # A few units: sums over the batch in float may come out otherwise at nearly the same parameters.
        self.rounding = 8 * torch.finfo(loss.dtype).eps * abs(self.loss)
        given: dict[Tensor, Tensor] = {p: g for p, g in zip(params.values(), gradients, strict=True) if g is not None}
        with torch.random.fork_rng(self.devices):
            updates = next_update(optimizer, given)
        # In float64: near a minimum the terms cancel, and only the sign is asked for.
        self.slope = math.fsum(float((given[p].double() * d).sum()) for p, d in updates.items())
        self.zero = not any(bool(d.any()) for d in updates.values())
        # Parameters without a gradient do not move, and stay the model's own in every pass.
        self.points = {name: p.detach() for name, p in params.items() if p in updates}
        self.directions = {name: updates[p].to(p.dtype) for name, p in params.items() if p in updates}

    @torch.no_grad()
    def losses(self, rates: list[float]) -> list[float]:
        """Return the loss after a step with each learning rate."""
        k = len(rates)
        with torch.random.fork_rng(self.devices):
            if k == 1:
                buffers = {name: b.clone() for name, b in self.buffers.items()}
                return [float(self._loss(rates[0], buffers))]
            copies = {name: b.expand(k, *b.shape).clone() for name, b in self.buffers.items()}
            etas = torch.tensor(rates, dtype=torch.float64, device=next(iter(self.points.values())).device)
            # The same dropout masks for all rates: else noise and not the rate would decide which loss is raised.
            values: list[float] = vmap(self._loss, randomness="same")(etas, copies).tolist()
            return values

    def _loss(self, eta: Any, buffers: dict[str, Tensor]) -> Tensor:
        # The step is rounded as the real one: parameters of low precision may not move at all.
        moved = {name: p - (eta * self.directions[name]).to(p.dtype) for name, p in self.points.items()}
        loss: Tensor = functional_call(self.module, {**moved, **buffers}, (self.batch,))[0]
        return loss.reshape(())


@torch.no_grad()
def probe_loss(model: nn.Module, loss_fn: Callable[..., Tensor], batch: Any) -> float:
    """Return the loss of a batch; the model's buffers and the random state stay as they are.

    Args:
        model: a module, in its present mode.
        loss_fn: ``(output, targets) -> scalar``.
        batch: ``(inputs, targets)`` or a dict; see ``HessianOperator``.

    Returns:
        The loss, which may be NaN or infinite.

    Cost: one forward pass.
    """
    check_one_process(model)
    module = LossModule(unwrapped(model), loss_fn)
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        return float(functional_call(module, buffers, (batch,))[0])
