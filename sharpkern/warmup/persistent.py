"""Persistent catapult warmup: the learning rate rises to the critical one whenever the last catapult is over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .critical import critical_learning_rate, probe_loss
from .schedule import set_rates


class PersistentCatapultLR:
    """Warmup without a length: hold the learning rate until the loss is back, then go to the critical one again.

        start:      lr = eta_c(theta_0),  L* = L(theta_0)
        each step:  if L(theta_t) < L*:  lr = min(lr_target, max(lr, eta_c(theta_t))),  L* = L(theta_t)

    until the target is reached. eta_c is the smallest learning rate whose step raises the loss, at most by ``rise``:
    each raise starts a small catapult, which lowers the sharpness. L and eta_c are those of one fixed batch, so that
    minibatch noise does not end a catapult. The learning rate never falls. Call ``step()`` after each
    ``optimizer.step()``. Once ``done`` it costs nothing.

    Args:
        optimizer: any that ``critical_learning_rate`` supports; its own lr is ignored.
        lr_target: a number, or one for each parameter group; the groups keep the ratios of their targets.
        probe: ``(model, loss_fn, batch)``.
        rise: relative rise of the loss that a raise of the learning rate may cause in one step.
        lr_start: where the first search starts; None at 1e-4 of the target.
        patience: after so many steps without the loss below L*, search all the same; None waits for ever.

    Attributes:
        done: the target is reached.
        searches: searches so far.
        forward_passes: losses evaluated so far; each search costs a gradient besides.

    Raises:
        ValueError: a number is out of range.
        NonFiniteLossError: the loss of the probe is NaN or infinite when a search begins.

    Cost: a forward pass of the probe for each step until done; searches of 5 to 15 passes.
    Source: Kalra and Barkeshli, Why warmup the learning rate? (2024), algorithm 3; the search from the present
    learning rate, the fixed batch, the monotone learning rate and the patience are ours.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> sgd = torch.optim.SGD(model.parameters())
    >>> probe = model, nn.MSELoss(), (torch.ones(1, 1), torch.zeros(1, 1))  # the loss is w^2: eta_c = 1
    >>> schedule = PersistentCatapultLR(sgd, 0.5, probe)
    >>> schedule.done, schedule.get_last_lr()
    (True, [0.5])
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        lr_target: float | Sequence[float],
        probe: tuple[nn.Module, Callable[..., Tensor], Any],
        *,
        rise: float = 0.1,
        lr_start: float | None = None,
        patience: int | None = None,
    ) -> None:
        groups = len(optimizer.param_groups)
        targets = [float(x) for x in lr_target] if isinstance(lr_target, Sequence) else [float(lr_target)] * groups
        if len(targets) != groups or not all(0 < x < float("inf") for x in targets):
            raise ValueError(f"lr_target must be positive, and one number or {groups}, got {lr_target}.")
        if patience is not None and patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}.")
        self.optimizer, self.probe, self.lr_target = optimizer, probe, targets
        self.rise, self.patience = rise, patience
        self.lr, self.done, self.searches, self.forward_passes = 0.0, False, 0, 0
        # From far below: where the loss crosses L(theta) several times, doubling is then likely to meet the smallest
        # crossing first.
        self._search(1e-4 * targets[0] if lr_start is None else lr_start)

    def step(self) -> None:
        """Raise the learning rate if the loss of the probe is below that of the last search."""
        if self.done:
            return
        self._waited += 1
        loss = probe_loss(*self.probe)
        self.forward_passes += 1
        if loss < self._reference or (self.patience is not None and self._waited >= self.patience):
            self._search(self.lr)

    def get_last_lr(self) -> list[float]:
        """Return the learning rate of each group."""
        share = self.lr / self.lr_target[0]  # at most 1, so no rate is a rounding above its target
        return [share * target for target in self.lr_target]

    def _search(self, start: float) -> None:
        # eta_c is a number for the first group, for others in the ratio of their rates: that of the targets, here as in
        # the schedule.
        set_rates(self.optimizer, self.lr_target)
        try:
            model, loss_fn, batch = self.probe
            found = critical_learning_rate(
                model, loss_fn, batch, self.optimizer, start=start, cap=self.lr_target[0], rise=self.rise
            )
            # Never lower than now: with ``patience`` a search may fall into a catapult, where eta_c can lie below the
            # present rate.
            self.lr = min(self.lr_target[0], max(self.lr, found.value))
        # Also where the search fails: the optimizer must not be left with the targets' rates.
        finally:
            set_rates(self.optimizer, self.get_last_lr())
        self.searches += 1
        self.forward_passes += found.forward_passes
        # The search has evaluated the loss here already: L* costs no pass of its own.
        self._reference, self._waited = found.loss, 0
        self.done = self.lr >= self.lr_target[0]

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs; probe and options are the constructor's."""
        names = ("lr", "done", "searches", "forward_passes", "_reference", "_waited")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict()``'s result, and the optimizer's lr with it."""
        vars(self).update(state)
        set_rates(self.optimizer, self.get_last_lr())
