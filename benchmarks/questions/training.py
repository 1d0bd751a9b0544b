"""What does the sharpness at every step cost a training run, and how wrong is it?

One run of gradient descent or Adam; at every step each contender starts from the same parameters and optimizer state,
and is timed for the whole step: gradient, sharpness, update. The truth of every step is in float64.

Critical sharpness, the cheap rival by forward passes, starts from the value of the step before. It is another quantity
(2 over the learning rate along the update at which the loss stops to fall); its distance from the sharpness is shown as
its error.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from peers import autograd_kept, truth
from peers.common import Operator
from peers.solvers import arpack, pyhessian
from points import at
from torch import Tensor
from workloads import Workload

import sharpkern as sk
from sharpkern.curvature.parameters import gradients_of
from sharpkern.eigen import lobpcg

from . import Effort
from .cold import RIVAL

PLAIN = "no tracking"
Step = Callable[[], tuple[float, int] | None]  # gradient in p.grad; the sharpness, and the products it took


def ask(workload: str, point: str, optimizer: str, steps: int, effort: Effort) -> dict[str, Any]:
    """Train on from a point, timing every contender at every step."""
    work, lr, of_threshold = at(workload, point)
    params = list(work.model.parameters())
    adam = optimizer == "adam"
    rule: torch.optim.Optimizer = torch.optim.Adam(params, lr=1e-3) if adam else torch.optim.SGD(params, lr=lr)
    contenders = _contenders(work, rule, adam=adam)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in contenders if name != PLAIN}
    exact: list[float] = []
    follower = truth.Follower()
    for index in range(steps + 1):  # the first step exports and starts cold: it is not counted
        before, state = [p.detach().clone() for p in params], _state(rule)
        scale = _inverse_root(work, rule) if adam else None
        if index:
            exact.append(follower.top(work, scale))
        for name, step in contenders.items():
            with torch.no_grad():
                for p, old in zip(params, before, strict=True):
                    p.copy_(old)
                    p.grad = None
            _restore(rule, state)
            start = time.perf_counter()
            value = step()
            rule.step()
            taken = time.perf_counter() - start
            if index:
                seconds[name].append(taken)
                if value is not None:
                    found[name].append(value)
    errors, products = {}, {}
    for name, values in found.items():
        each = sorted(abs(v / e - 1) for (v, _), e in zip(values, exact, strict=True))
        errors[name] = each[int(0.95 * (len(each) - 1))]
        products[name] = sum(count for _, count in values) / len(values)
    return {
        "question": "training", "workload": workload, "point": point, "of_threshold": of_threshold,
        "optimizer": optimizer, "steps": steps, "base": PLAIN, "quick": effort.quick, "seconds": seconds,
        "errors": errors, "products": products, "another_quantity": [RIVAL],
    }  # fmt: skip


def _contenders(work: Workload, rule: torch.optim.Optimizer, *, adam: bool) -> dict[str, Step]:
    """All follow the largest eigenvalue of H, or of P^-1/2 H P^-1/2 for Adam."""
    found: dict[str, Step] = {PLAIN: lambda: _plain(work)}
    for tol in (0.1, 0.01):
        found[f"sharpkern, tol {tol}"] = _tracker(work, rule, tol, adam=adam)
    for tol in (0.3, 0.1):
        for warm in (False, True):
            how = "warm start" if warm else "fixed start"
            found[f"LOBPCG, {how}, tol {tol}"] = _kept(work, rule, tol, warm=warm, adam=adam, arnoldi=False)
    found["eigsh, warm start, tol 0.1"] = _kept(work, rule, 0.1, warm=True, adam=adam, arnoldi=True)
    found[RIVAL] = _critical(work, rule)
    if not adam and find_spec("pyhessian"):
        found["PyHessian, cold"] = lambda: _pyhessian(work)
    return found


def _plain(work: Workload) -> None:
    x, y = work.batch
    work.loss_fn(work.model(x), y).backward()


def _tracker(work: Workload, rule: torch.optim.Optimizer, tol: float, *, adam: bool) -> Step:
    """``tracker.step``; for Adam it measures both sharpnesses."""
    tracker = sk.SharpnessTracker(work.model, work.loss_fn, rule, tol=tol)

    def step() -> tuple[float, int]:
        record = tracker.step(work.batch)
        value = record.preconditioned_sharpness if adam else record.sharpness
        assert value is not None
        return value, record.matvecs

    return step


def _kept(work: Workload, rule: torch.optim.Optimizer, tol: float, *, warm: bool, adam: bool, arnoldi: bool) -> Step:
    """A solver over a kept autograd graph, whose gradients serve the update too."""
    peer = autograd_kept.PEER(work)
    first = torch.randn(peer.n, generator=torch.Generator().manual_seed(0))
    start = first

    def step() -> tuple[float, int]:
        nonlocal start
        peer.prepare()
        for p, g in zip(peer.params, peer.gradients, strict=True):
            p.grad = g.detach()
        scale = None
        if adam:
            gradients = {p: p.grad for p in peer.params if p.grad is not None}
            scale = sk.preconditioner(rule, gradients=gradients).inv_sqrt(peer.params).float()
        op = Operator(peer, scale)
        if arnoldi:
            value, vector = arpack(op, tol, start, ncv=4)
        else:
            result = lobpcg(op, tol=tol, v0=start)
            value, vector = float(result.eigenvalues[0]), result.eigenvectors[0]
        start = vector.contiguous() if warm else first
        return value, op.products

    return step


def _critical(work: Workload, rule: torch.optim.Optimizer) -> Step:
    """It has a gradient of its own on the way, which does not serve the update: its interface keeps it."""
    last: sk.CriticalLR | None = None

    def step() -> tuple[float, int]:
        nonlocal last
        last = sk.critical_learning_rate(*work, rule, start=last)
        _plain(work)
        return last.sharpness, last.forward_passes

    return step


def _pyhessian(work: Workload) -> tuple[float, int]:
    """Its defaults; its gradients serve the update too."""
    value, products, gradients = pyhessian(work, 1e-3, 0)
    for p, g in zip(work.model.parameters(), gradients, strict=True):
        p.grad = g
    work.model.train()
    return value, products


def _inverse_root(work: Workload, rule: torch.optim.Optimizer) -> Tensor:
    H = sk.HessianOperator(*work)
    P = sk.preconditioner(rule, gradients=gradients_of(H))
    return P.inv_sqrt(list(work.model.parameters()))


def _state(rule: torch.optim.Optimizer) -> dict[Tensor, dict[str, Tensor]]:
    return {p: {key: t.clone() for key, t in state.items()} for p, state in rule.state.items() if state}


def _restore(rule: torch.optim.Optimizer, state: dict[Tensor, dict[str, Tensor]]) -> None:
    if not state:
        rule.state.clear()
    for p, kept in state.items():
        for key, t in kept.items():
            rule.state[p][key].copy_(t)
