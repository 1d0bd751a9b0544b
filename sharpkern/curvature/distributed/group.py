"""Processes that must do the same at the same time: each step is agreed on before numbers are exchanged.

A collective call that only some processes make hangs, or pairs up with another one and gives a wrong number. So every
public step begins or ends with the exchange of one small header on the CPU, over a gloo group with a time limit. All
processes see the same table of headers, and so all raise or none.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ..losses import NonFiniteLossError

Step = Literal["setup", "refresh", "gradient", "product", "quadratic form", "random vectors", "buffers", "clock"]
_STEPS = ("setup", "refresh", "gradient", "product", "quadratic form", "random vectors", "buffers", "clock")
_SAME, _NEAR, _OWN = 4, 2, 2  # numbers of a header
_TOLERANCE = 1e-4  # of numbers that replicas may have with another rounding
_T = TypeVar("_T")


class DistributedError(RuntimeError):
    """A process failed, is missing, or does something else than the others."""


class Ranks:
    """The processes that share an operator.

    Args:
        group: None for all processes.
        time_limit: seconds that a process may come later than the others to a common step.

    Attributes:
        rank: of this process within the group.   size: how many there are.

    Raises:
        ValueError: ``torch.distributed`` is not initialised, or this process is not in the group.
        DistributedError: the others did not come within ``time_limit``.
    """

    def __init__(self, group: dist.ProcessGroup | None, time_limit: float) -> None:
        self.group, self.time_limit = group, time_limit
        self.order = 0  # a checksum of the labels gathered so far
        # Within the group: a subgroup counts its own ranks.
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        members = dist.get_process_group_ranks(group)
        self.first = members[0]
        # Groups of all processes are numbered; those of some are named by their members, so that only these need come.
        some = self.size < dist.get_world_size()
        options: Any = {"timeout": timedelta(seconds=time_limit), "backend": "gloo", "use_local_synchronization": some}
        # gloo on the CPU whatever trains the model: it has a time limit for each call, and needs no wait for a GPU.
        with self._bounded("setup"):
            self._headers = dist.new_group(members, **options)
            # Apart from the headers: a process that failed between two data exchanges goes to the next header.
            self._cpu_data: dist.ProcessGroup | None = dist.new_group(members, **options)

    @contextmanager
    def _bounded(self, step: str) -> Any:
        try:
            yield
        except (RuntimeError, ValueError) as error:  # gloo's own, among them torch.distributed.DistBackendError
            raise DistributedError(
                f"rank {self.rank} waited for the others at {step!r} in vain: a rank has died, has raised an error "
                f"elsewhere, or did not come within {self.time_limit:g} seconds ({str(error).splitlines()[0][:200]}). "
                "Every rank must make the same calls; if one is only slow, raise time_limit. Start all of them anew."
            ) from error

    def agree(
        self,
        step: Step,
        *,
        same: Mapping[str, float] | None = None,
        near: Mapping[str, tuple[float, float]] | None = None,
        own: Sequence[float] = (),
        failure: Exception | None = None,
        detail: Sequence[str] = (),
    ) -> Tensor:
        """Exchange a header, and raise on every process if one has failed or is somewhere else.

        Args:
            step: where this process is.
            same: name -> number that must be equal everywhere; at most 4.
            near: name -> (number, scale), where a difference of 1e-4 of the scale is allowed; at most 2.
            own: numbers that may differ; at most 2.
            failure: what this process failed with.
            detail: what ``same`` speaks of, item by item; the first one that differs is named in the error.

        Returns:
            ``own`` of every process, ``[size, len(own)]`` float64, on the CPU.

        Raises:
            Exception: this process's own ``failure``.
            NonFiniteLossError: another process has failed with one.
            DistributedError: another process has failed otherwise, is missing, or does not agree.
        """
        same, near = same or {}, near or {}
        header = _header(step, same, near, own, failed=failure is not None)
        # Gathered rather than summed: a table can name who differs, and in what.
        rows = [torch.empty_like(header) for _ in range(self.size)]
        with self._bounded(step):
            dist.all_gather(rows, header, group=self._headers)
        table = torch.stack(rows)
        # First, because a process that has failed does not know the other numbers.
        if bool(table[:, 1].any()):
            self._fail(step, failure)
        names = [*same, *near]
        if (problem := self._disagreement(table, names, len(same))) is not None:
            raise DistributedError(f"the ranks disagree: {problem}{self._first_difference(detail)}.")
        return table[:, -_OWN:][:, : len(own)]

    def _fail(self, step: Step, failure: Exception | None) -> None:
        """Tell everyone what went wrong, and raise."""
        told: list[Any] = [None] * self.size
        loss = failure.loss if isinstance(failure, NonFiniteLossError) else None
        # A process whose connection was closed on it has failed because another one has.
        second_hand = isinstance(failure, DistributedError)
        with self._bounded(step):
            message = None if failure is None else (second_hand, f"{type(failure).__name__}: {failure}", loss)
            dist.all_gather_object(told, message, group=self._headers)
        failed = [(m[0], rank, *m[1:]) for rank, m in enumerate(told) if m is not None]
        consequence, rank, text, loss = min(failed, key=lambda m: m[:2])
        if failure is not None and second_hand <= consequence:
            raise failure
        if loss is not None:
            raise NonFiniteLossError(loss)
        raise DistributedError(f"rank {rank} failed at {step!r}: {text}") from failure

    def _disagreement(self, table: Tensor, names: list[str], exact: int) -> str | None:
        # Numbers of unlike steps mean unlike things.
        steps = table[:, 0].long().tolist()
        if len(set(steps)) > 1:
            return "; ".join(f"rank {r} is at {_STEPS[s]!r}" for r, s in enumerate(steps))
        for i, name in enumerate(names):
            at = 2 + i if i < exact else 2 + _SAME + 2 * (i - exact)
            allowed = 0.0 if i < exact else _TOLERANCE * float(table[:, at + 1].max())
            values = table[:, at]
            # Not finite on all of them is no disagreement: whoever asked will say what is wrong with it.
            alike = (values == values[0]) | (values.isnan() & values[0].isnan())
            if not bool((alike | ((values - values[0]).abs() <= allowed)).all()):
                listed = ", ".join(f"{v:.10g}" for v in values.tolist())
                return f"at {_STEPS[steps[0]]!r}, {name} is {listed} on ranks 0, 1, ..."
        return None

    def _first_difference(self, detail: Sequence[str]) -> str:
        if not detail:  # the same on every process: each step has it or has not
            return ""
        lists: list[Any] = [None] * self.size
        with self._bounded("setup"):
            dist.all_gather_object(lists, list(detail), group=self._headers)
        for rank, other in enumerate(lists):
            for i in range(max(len(other), len(lists[0]))):
                pair = [items[i] if i < len(items) else "nothing" for items in (lists[0], other)]
                if pair[0] != pair[1]:
                    return f" (rank 0 has {pair[0]} where rank {rank} has {pair[1]})"
        return ""

    def together(
        self,
        step: Step,
        work: Callable[[], _T],
        *,
        own: Callable[[_T], Sequence[float]] = lambda _: (),
        after: Callable[[], Mapping[str, float]] | None = None,
        **numbers: Any,
    ) -> tuple[_T, Tensor]:
        """Do this process's share of a step, and agree afterwards, also about a failure.

        An error here becomes an error everywhere, before anyone waits for numbers that will not come.

        Args:
            step: as for ``agree``, and so are ``numbers``.
            work: makes no collective call itself.
            own: of the result: this process's own numbers.
            after: in the place of ``same``: numbers that are known when the work is done.

        Returns:
            The result, and the own numbers of all processes.
        """
        try:
            result = work()
            mine = own(result)  # inside, because it may fail as well, on a batch without a tensor
        except Exception as error:
            self.agree(step, failure=error)
            raise
        if after is not None:
            numbers["same"] = after()
        return result, self.agree(step, own=mine, **numbers)

    def data_group(self, t: Tensor) -> dist.ProcessGroup | None:
        """Return the group that exchanges tensors on a device; on the CPU it has the time limit, too."""
        if self._cpu_data is None:
            raise DistributedError("the connections were closed when a rank failed: make a new operator on all ranks.")
        return self._cpu_data if t.device.type == "cpu" else self.group

    def sum_(self, t: Tensor) -> Tensor:
        """Add up a contiguous tensor over all processes, in place: one all-reduce, the same bits everywhere."""
        if self.size > 1:
            with self._bounded("a sum"):
                dist.all_reduce(t, group=self.data_group(t))
        return t

    def from_first_(self, t: Tensor) -> Tensor:
        """Overwrite a contiguous tensor by the first process's."""
        if self.size > 1:
            with self._bounded("a broadcast"):
                dist.broadcast(t, self.first, group=self.data_group(t))
        return t

    def hang_up(self) -> None:
        """Close the data connections on the CPU, so that no process waits in them for one that has failed.

        Operators on these ``Ranks`` are at their end; ``ranks_of`` makes new ones.
        """
        for known in _made.values():
            for limit in [limit for limit, ranks in known.items() if ranks is self]:
                del known[limit]
        # Forgotten first: gloo closes its connections when nobody holds the group any more.
        group, self._cpu_data = self._cpu_data, None
        if group is not None:
            dist.destroy_process_group(group)

    def gathered(self, t: Tensor, label: int = 0) -> Tensor:
        """Return the tensors of all processes, which have one shape, joined along the first dimension.

        Args:
            t: this process's.
            label: of what is gathered; ``order`` tells whether all processes have gathered the same.
        """
        # Counted before the call: one of another shape does not return.
        self.order = zlib.crc32(label.to_bytes(8, "big"), self.order)
        if self.size == 1:
            return t
        whole = t.new_empty(self.size * t.shape[0], *t.shape[1:])
        with self._bounded("a gather of weights"):
            dist.all_gather_into_tensor(whole, t.contiguous(), group=self.data_group(t))
        return whole

    def scattered_sum(self, t: Tensor, label: int = 0) -> Tensor:
        """Add up over all processes, and return this one's part along the first dimension; ``label`` as above."""
        self.order = zlib.crc32(label.to_bytes(8, "big"), self.order)
        if self.size == 1:
            return t
        part = t.new_empty(t.shape[0] // self.size, *t.shape[1:])
        with self._bounded("a sum of shards"):
            dist.reduce_scatter_tensor(part, t.contiguous(), group=self.data_group(t))
        return part

    def clock(self) -> float:
        """Return the first process's clock in seconds: what depends on time must not differ between processes."""
        return float(self.agree("clock", own=[time.perf_counter()])[0, 0])


_made: WeakKeyDictionary[dist.ProcessGroup, dict[float, Ranks]] = WeakKeyDictionary()


def ranks_of(group: dist.ProcessGroup | None, time_limit: float) -> Ranks:
    """Return the ``Ranks`` of a group, made once: each holds two groups of connections.

    Raises:
        ValueError: ``torch.distributed`` is not initialised, or ``time_limit`` is not positive.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("torch.distributed is not initialised: call torch.distributed.init_process_group() first.")
    if not (time_limit > 0 and math.isfinite(time_limit)):
        raise ValueError(f"time_limit must be a positive number of seconds, got {time_limit}.")
    group = group if group is not None else dist.group.WORLD
    assert group is not None
    # By group, and not for good: after destroy_process_group a new default group is another object.
    known = _made.setdefault(group, {})
    if time_limit not in known:
        known[time_limit] = Ranks(group, time_limit)
    return known[time_limit]


def checksum(lines: Sequence[str]) -> float:
    """Return a number that tells lists of lines apart."""
    return float(zlib.crc32("\n".join(lines).encode()))


def _header(
    step: Step,
    same: Mapping[str, float],
    near: Mapping[str, tuple[float, float]],
    own: Sequence[float],
    *,
    failed: bool,
) -> Tensor:
    assert len(same) <= _SAME
    assert len(near) <= _NEAR
    assert len(own) <= _OWN
    # Always of one length: processes at different steps must be able to read each other's.
    flat = [x for pair in near.values() for x in pair]
    row = [float(_STEPS.index(step)), float(failed)]
    row += [*same.values()] + [0.0] * (_SAME - len(same)) + flat + [0.0] * (2 * _NEAR - len(flat))
    return torch.tensor([*row, *own, *[0.0] * (_OWN - len(own))], dtype=torch.float64)
