"""Cells trained together: one batched network, and for each cell the files of a run of its own.

The first step, with its eigenvalue solve, is taken by a run, once for all cells of a seed: they have the same network
and batch. Then nothing is left but gradients, updates and rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..curvature.losses import NonFiniteLossError
from ..tracking.record import Record
from ..tracking.tracker import SharpnessTracker
from ..train.batched import FCNStack, stacked_losses
from ..train.build import ReferenceTask, evaluated_at
from ..train.loop import Run
from ..train.losses import loss_targets
from ..train.metrics import Row
from ..train.models import FCN
from .collect import result_of
from .grid import Cell
from .run import CellEnd, begin, finish, locked, reference_task, report_error, train


@dataclass(frozen=True)
class _Member:
    """A cell after its first step.

    Attributes:
        cell, run: the run's model is no longer its own.
        parameters: copies.
        buffers: of the momentum, if there is one; copies.
    """

    cell: Cell
    run: Run
    parameters: list[Tensor]
    buffers: list[Tensor]


@dataclass(frozen=True)
class _First:
    """What the first step of a seed's first cell computed before its update; see ``Run.measure``."""

    record: Record
    figures: Row
    gradients: list[Tensor]
    tracker: SharpnessTracker


def run_stack(cells: Sequence[Cell]) -> list[CellEnd]:
    """Train cells of one group together; finished ones are left as they are, what was trained alone goes on alone.

    A kill loses the stack's steps: a second call begins again.

    Args:
        cells: which may be stacked (``groups``).
    """
    outcomes: list[CellEnd] = []
    members: list[_Member] = []
    firsts: dict[int, _First] = {}
    with ExitStack() as stack:
        for cell in sorted(cells, key=lambda cell: cell.name):  # one order for all, so that no two wait for each other
            stack.enter_context(locked(cell))
        for cell in cells:
            try:
                # Asked under the lock: another sweep may have finished the cell while this one waited.
                found = result_of(cell) or _start(cell, firsts, stack)
            except Exception as error:  # of this one cell, whatever it is: the others go on
                outcomes.append(report_error(cell, error))
                continue
            if isinstance(found, _Member):
                members.append(found)
            else:
                outcomes.append(CellEnd(cell.name, found["status"]))
        try:
            for member in _train(members) if members else ():
                outcomes.append(_finish(member))
        except Exception as error:
            ended = {outcome.name for outcome in outcomes}
            outcomes += [report_error(m.cell, error) for m in members if m.cell.name not in ended]
    return outcomes


def _start(cell: Cell, firsts: dict[int, _First], stack: ExitStack) -> _Member | dict[str, Any]:
    """Take a cell's first step; return its result if it ends there, or was begun alone.

    Args:
        cell: of the stack.
        firsts: by seed; added to.
        stack: closes the cell's files.
    """
    run, start = begin(cell), time.perf_counter()
    # All members of a stack begin at one step, and this one has a checkpoint of a later step.
    if run.done:
        return train(cell, run)
    stack.callback(run.close)
    parameters = list(run.model.parameters())
    first = firsts.get(run.config.seed)
    if first is None:
        try:
            record, figures = run.measure()
        except NonFiniteLossError:
            return finish(cell, run)
        gradients = [p.grad.clone() for p in parameters if p.grad is not None]
        firsts[run.config.seed] = _First(record, figures, gradients, run.tracker)
    else:
        # Seed, data and batch are those of the first cell, so its solve serves. Only learning rates differ.
        record, figures = run.tracker.adopt(first.tracker, first.record), first.figures
        for p, gradient in zip(parameters, first.gradients, strict=True):
            p.grad = gradient
    # By torch's own optimizer, which also makes the momentum's buffers.
    run.update(record, figures, start)
    buffers = [run.optimizer.state[p].get("momentum_buffer") for p in parameters]
    return _Member(
        # Copies, for the next cell's run takes over this run's model (``Run(like=...)``) and starts it anew.
        cell, run, [p.detach().clone() for p in parameters], [b.clone() for b in buffers if b is not None]
    )  # fmt: skip


def _finish(member: _Member) -> CellEnd:
    try:
        return CellEnd(member.cell.name, finish(member.cell, member.run)["status"])
    except Exception as error:
        return report_error(member.cell, error)


def _train(members: Sequence[_Member]) -> Iterator[_Member]:
    """Train from the second step to the end; yield each member when it has all its rows."""
    config, model = members[0].run.config, members[0].run.model
    assert isinstance(model, FCN)
    networks = FCNStack(model, [m.parameters for m in members])
    buffers = [torch.stack(b) for b in zip(*(m.buffers for m in members), strict=True)]
    members = list(members)
    for step in range(2, config.steps + 1):
        start = time.perf_counter()
        losses, gradients = networks.gradients(*_batch(step, members), config.loss)
        finite = losses.isfinite().tolist()
        diverged = [m for m, is_finite in zip(members, finite, strict=True) if not is_finite]
        # Before evaluation and update, as a run alone: at a loss that is not finite it ends with a row that says so.
        if diverged:
            for member in diverged:
                member.run.diverge()
            members = [m for m, is_finite in zip(members, finite, strict=True) if is_finite]
            left = torch.tensor([i for i, is_finite in enumerate(finite) if is_finite], dtype=torch.long)
            networks.keep(left)
            losses, gradients, buffers = losses[left], [g[left] for g in gradients], [b[left] for b in buffers]
        if members:
            columns: dict[str, list[float]] = {"dead_units": _dead_units(gradients)}
            # In the order of a run alone: accuracies before the update, norms of parameters and moments after it.
            if evaluated_at(step, config):
                columns |= _evaluate(networks, reference_task(members[0].run))
            grad_norms = _norms(gradients)
            _update(networks.parameters, gradients, buffers, members)
            columns |= {"theta_norm": _norms(networks.parameters), "m_norm": _norms(buffers, len(members))}
            # SGD has no second moment; the column is there as in a run alone.
            columns["v_norm"] = [0.0] * len(members)
            records = [
                m.run.tracker.carry(loss, norm)
                for m, loss, norm in zip(members, losses.tolist(), grad_norms, strict=True)
            ]
            seconds = (time.perf_counter() - start) / len(members)
            for i, member in enumerate(members):
                figures: Row = {name: values[i] for name, values in columns.items()}
                member.run.count(records[i], figures, seconds)
        # Only now, because the caller writes results meanwhile, and that time is not the step's.
        yield from diverged
        if not members:
            return
    yield from members


def _batch(step: int, members: Sequence[_Member]) -> tuple[Tensor, Tensor]:
    """Return the step's batch, the same for all or with a leading dimension of members."""
    tasks = {m.run.config.seed: reference_task(m.run) for m in members}
    batches = {seed: task.batch(step) for seed, task in tasks.items()}
    x, y = next(iter(batches.values()))
    # One seed, or full batches: one tensor for all, where a stack of equal ones would be as many times the memory.
    if len(batches) == 1 or len(x) == len(tasks[members[0].run.config.seed].targets):
        return x.flatten(1), y
    pairs = [batches[m.run.config.seed] for m in members]
    return torch.stack([x.flatten(1) for x, _ in pairs]), torch.stack([y for _, y in pairs])


@torch.no_grad()
def _update(
    parameters: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], members: Sequence[_Member]
) -> None:
    """Take the step of ``torch.optim.SGD``, each member with its own learning rate."""
    optimizers = [m.run.optimizer.param_groups[0] for m in members]
    if buffers:
        # As torch's SGD: the buffer holds the sum of decayed gradients. One call for all layers, as a stack saves
        # calls.
        torch._foreach_mul_(buffers, optimizers[0]["momentum"])
        torch._foreach_add_(buffers, gradients)
    rates = torch.tensor([-group["lr"] for group in optimizers], dtype=parameters[0].dtype)
    for p, direction in zip(parameters, buffers or gradients, strict=True):
        # A rate for each network, spread over its own parameter.
        p.addcmul_(direction, rates.view(-1, *[1] * (p.ndim - 1)))


@torch.no_grad()
def _evaluate(networks: FCNStack, task: ReferenceTask) -> dict[str, list[float]]:
    """Return what ``ReferenceTask.evaluate`` does, of each network."""
    result = {}
    for split, inputs, targets in (
        ("train", task.data.train_inputs, task.data.train_targets),
        ("test", task.data.test_inputs, task.data.test_targets),
    ):
        output = torch.cat([networks(x.flatten(1)) for x in inputs.split(1000)], 1)
        result[f"{split}_accuracy"] = (output.argmax(-1) == targets).float().mean(1).tolist()
    result["test_loss"] = stacked_losses(
        output, loss_targets(task.config, targets, task.data), task.config.loss
    ).tolist()
    return result


def _dead_units(gradients: Sequence[Tensor]) -> list[float]:
    """Return what ``optim.dead_units`` does, of each network: weights are ``[networks, out, in]``."""
    # Stacked biases have two dimensions, and are no units.
    dead = ~torch.cat([g.any(2) for g in gradients if g.ndim == 3], 1)
    return [count / dead.shape[1] for count in dead.sum(1).tolist()]


@torch.no_grad()
def _norms(tensors: Sequence[Tensor], empty: int = 0) -> list[float]:
    """Return each network's Euclidean norm over all tensors; that many zeros if there are none."""
    if not tensors:
        return [0.0] * empty
    # In float64, as ``optimizer_norms`` adds them up.
    parts = [torch.linalg.vector_norm(t.flatten(1), dim=1, dtype=torch.float64) for t in tensors]
    norms: list[float] = torch.stack(parts).square_().sum(0).sqrt_().tolist()
    return norms
