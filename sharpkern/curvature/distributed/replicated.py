"""Data parallelism: every process holds the whole model and a part of the batch; products are averaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...eigen.common import Space
from ...rop import ReplayedProgram
from ..base import ParameterOperator
from ..chunked import ChunkedHessian, MicroBatches
from ..dataset import examples_of
from ..engines import Engine
from ..operators import GGNOperator, HessianOperator, LossCurvature
from ..wrappers import check_uncoupled, inside, kind_of, unwrapped
from .group import Ranks, Step, checksum, ranks_of

Weighting = Literal["examples", "ranks"]
TIME_LIMIT = 300.0  # seconds: an export of a large model takes minutes on a slow process


class DataParallelHessian(ParameterOperator):
    """The Hessian of the loss over the batches of all processes, each of which holds the whole model.

    Every process makes the same calls and gets the same results; vectors are whole on each. So all solvers and
    ``PreconditionedOperator`` work on it as on a ``HessianOperator``.

    Args:
        model: a module, the same on every process, or ``DistributedDataParallel``, whose forward pass is not used.
        loss_fn: as for ``HessianOperator``, averaged over the examples.
        batch: this process's part of the batch; or ``MicroBatches`` of it, whose weighted sum is this process's loss
            (``ChunkedHessian``). The other processes may have another number of them, or none.
        params: as for ``HessianOperator``.
        update_buffers: let the forward pass change the model's buffers; those of the first process are first copied to
            the others, as DDP does it.
        verify: compare programs with the eager model; see ``HessianOperator``.
        recompute: keep less of the forward pass; see ``HessianOperator``.
        weighting: "examples" weighs each process by the length of its batch: the loss is the mean over all examples.
            "ranks" weighs all alike, as DDP averages gradients. The two agree for batches of one length.
            ``MicroBatches`` with weights of their own need "ranks", because their loss is no mean over examples.
        group: the processes; None for DDP's own, or all.
        time_limit: seconds that a process may come later than the others; beyond, all raise.

    Attributes:
        loss: 0-d, of all processes together.   gradient: ``[n]``, likewise.   local: this process's own operator.
        all_programs: whether the products of every process come from a program; the same on all.
        params, products, n, shape, dtype, device: as of a ``HessianOperator``.

    Raises:
        ValueError: as ``HessianOperator``; ``torch.distributed`` is not initialised; a model that is not replicated,
            or whose processes do more than average gradients (synchronised batch norm, DDP's communication hooks);
            ``weighting="examples"`` with ``MicroBatches`` whose weights are not their shares of the examples.
        NonFiniteLossError: the loss of any process is NaN or infinite.
        DistributedError: a process failed, is missing, or disagrees: other parameters, shapes, vectors or calls.

    Cost: of a product, this process's own (see ``ChunkedHessian`` for micro-batches); one all-reduce of its ``k n``
    numbers; an exchange of 12 numbers.
    """

    _kind: ClassVar[Callable[..., LossCurvature]] = HessianOperator

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        batch: Any,
        *,
        params: Mapping[str, Tensor] | Iterable[str] | Iterable[Tensor] | None = None,
        update_buffers: bool = False,
        verify: bool = True,
        recompute: bool = False,
        weighting: Weighting = "examples",
        group: dist.ProcessGroup | None = None,
        time_limit: float = TIME_LIMIT,
    ) -> None:
        if weighting not in ("examples", "ranks"):
            raise ValueError(f"weighting must be 'examples' or 'ranks', got {weighting!r}.")
        module, own_group = _replica(model)
        self.ranks = ranks_of(group if group is not None else own_group, time_limit)
        if self.ranks.size > 1:
            check_uncoupled(module)
        self.space: Space = _Replicas(self.ranks, self)
        self.weighting = weighting
        # A generator of names would be empty the second time.
        chosen = params if params is None or isinstance(params, Mapping | str) else list(params)
        self._options: dict[str, Any] = {"params": chosen, "verify": verify, "recompute": recompute}
        self._loss_fn = loss_fn
        # A plain model has no wrapper that would keep buffers equal, so they are left alone.
        self._sends_buffers = module is not unwrapped(model) and bool(unwrapped(model).broadcast_buffers)
        self._module, self.products = module, 0
        # Before the forward pass, as DDP: statistics of the other processes are overwritten, not averaged.
        if update_buffers:
            self._send_buffers()
        self._primal("setup", lambda: self._start(batch, update_buffers=update_buffers))

    def _start(self, batch: Any, *, update_buffers: bool) -> LossCurvature | ChunkedHessian:
        """Make this process's own operator."""
        kind: Any = type(self)._kind
        options = self._options if kind is GGNOperator else {**self._options, "update_buffers": update_buffers}
        if isinstance(batch, MicroBatches):
            if kind is not HessianOperator:
                raise ValueError("MicroBatches are for the Hessian: a GGN takes this process's batch as a whole.")
            kind = ChunkedHessian
        self.local: LossCurvature | ChunkedHessian = kind(self._module, self._loss_fn, batch, **options)
        return self.local

    def refresh(self, batch: Any = None, *, update_buffers: bool = False) -> None:
        """Run the primal sweeps of every process at the present parameter values; see ``HessianOperator.refresh``.

        Args:
            batch: None keeps the last one. Of a plain batch and ``MicroBatches`` either may follow the other.
            update_buffers: let the forward passes change the model's buffers.

        Raises:
            ValueError, NonFiniteLossError, DistributedError: as the constructor.
        """
        if update_buffers:
            self._send_buffers()

        def work() -> LossCurvature | ChunkedHessian:
            if batch is not None and isinstance(batch, MicroBatches) != isinstance(self.local, ChunkedHessian):
                return self._start(batch, update_buffers=update_buffers)
            self.local.refresh(batch, update_buffers=update_buffers)
            return self.local

        self._primal("refresh", work)

    def _primal(self, step: Step, work: Callable[[], LossCurvature | ChunkedHessian]) -> None:
        """Run a process's own primal sweeps, compare what must be equal, and average the loss."""
        count = _counted if self.weighting == "examples" else lambda _: 1
        local, own = self.ranks.together(step, work, own=lambda h: [count(h.batch), float(h.loss)])
        self.params, self.n, self.dtype, self.device = local.params, local.n, local.dtype, local.device
        names = [f"{name} {list(p.shape)} {p.dtype}" for name, p in self.params.items()]
        same = {"the parameters' checksum": checksum(names)}
        if self.weighting == "examples":
            same["the batch's shape beyond its length, as a checksum,"] = checksum(shapes_of(local.batch))
        near = {"the sum of all parameters": _sum_and_scale(self.params.values())}
        mine = [float(isinstance(local.engine, ReplayedProgram))]
        programs = self.ranks.agree(step, same=same, near=near, own=mine, detail=[*names, *shapes_of(local.batch)])
        self.all_programs = bool(programs.all())
        # From the table that all have, so that all divide by the same total.
        counts = own[:, 0]
        self._weight = float(counts[self.ranks.rank] / counts.sum())
        self.loss = (own[:, 1] @ counts / counts.sum()).to(local.loss)
        self._gradient: Tensor | None = None

    @property
    def engine(self) -> Engine:
        """What gives this process's own products."""
        return self.local.engine

    @property
    def gradient(self) -> Tensor:
        """The loss's gradient ``[n]`` at the last ``refresh``; every process must ask for it at the same time.

        Raises:
            RuntimeError: it is asked for the first time after parameters or batch have changed in place.
        """
        # Not at each refresh: an operator that only multiplies never needs it.
        if self._gradient is None:
            self._gradient = self._average("gradient", lambda: self.local.gradient)
        return self._gradient

    def apply_rows(self, block: Tensor) -> Tensor:
        product = self._average("product", lambda: self.local.apply_rows(block), block)
        self.products += block.shape[0]
        return product

    def form_rows(self, block: Tensor) -> Tensor:
        return self._average("quadratic form", lambda: self.local.form_rows(block), block)

    def _average(self, step: Step, work: Callable[[], Tensor], block: Tensor | None = None) -> Tensor:
        # A process that has left a solver's loop early would go on with another product, of the same shape.
        same, near = {"the number of products so far": float(self.products)}, {}
        # Unlike vectors of one shape would be averaged without complaint.
        if block is not None:
            same["the number of vectors"] = float(block.shape[0])
            near["the sum of the vectors"] = _sum_and_scale([block])
        own, _ = self.ranks.together(step, work, same=same, near=near)
        return self.ranks.sum_(own * self._weight)  # a copy: what an engine returns may be its own memory

    def _send_buffers(self) -> None:
        """Copy the first process's buffers to the others, where DDP would before a forward pass."""
        buffers = list(self._module.buffers())
        if not self._sends_buffers or not buffers:
            return
        self.ranks.agree("buffers", same={"the number of buffers": float(len(buffers))})
        for b in buffers:
            sent = self.ranks.from_first_(b.detach().contiguous())
            if sent.data_ptr() != b.data_ptr():
                b.data.copy_(sent)


class DataParallelGGN(DataParallelHessian):
    """The generalised Gauss-Newton matrix over the batches of all processes; arguments as ``DataParallelHessian``.

    Raises:
        ValueError: as ``GGNOperator`` and ``DataParallelHessian``.
    """

    _kind = GGNOperator


class _Replicas:
    """Whole vectors on every process: products agree to the last bit, so inner products do; random starts are sent."""

    whole = True

    def __init__(self, ranks: Ranks, op: DataParallelHessian) -> None:
        self.ranks, self.op = ranks, op

    @property
    def n(self) -> int:
        return self.op.n

    def total(self, partial: Tensor) -> Tensor:
        # An all-reduce gives the same bits everywhere (tested), and kernels are deterministic: no exchange is needed.
        return partial

    def random_rows(self, rows: int, generator: torch.Generator) -> Tensor:
        # Sent, because generators may have other seeds: a certificate's is fresh on each process.
        self.ranks.agree("random vectors", same={"the number of vectors": float(rows)})
        drawn = torch.randn(rows, self.n, dtype=self.op.dtype, generator=generator)
        return self.ranks.from_first_(drawn.to(self.op.device))


def _replica(model: nn.Module) -> tuple[nn.Module, dist.ProcessGroup | None]:
    """Return the module below DDP, or the model itself, and DDP's group."""
    kind = kind_of(model)
    if kind == "fsdp2":
        raise ValueError("this model's parameters are sharded by fully_shard: use ShardedHessian or ShardedGGN.")
    if kind == "plain":
        return unwrapped(model), None
    # Compiled outside, inside, or both.
    ddp: Any = unwrapped(model)
    _check_hooks(ddp)
    return inside(model), ddp.process_group


def _check_hooks(ddp: Any) -> None:
    if getattr(ddp, "_comm_hooks", None):
        raise ValueError(
            "DDP has a communication hook, so its gradients are not the plain average that is computed here: "
            "leave the hook out, or pass ddp.module to say that the plain average is wanted."
        )


def _sum_and_scale(tensors: Iterable[Tensor]) -> tuple[float, float]:
    """Return a sum that tells other values, and how large it may be.

    Not compared bit by bit: replicas on unlike machines differ by rounding, which grows with the number of elements.
    """
    parts = [t.detach() for t in tensors]
    total = torch.stack([t.sum().double() for t in parts]).sum()
    size = torch.stack([torch.linalg.vector_norm(t).double() for t in parts]).sum()
    value, scale = torch.stack([total, size]).tolist()  # one wait for the device
    rounding = torch.finfo(parts[0].dtype).eps * math.sqrt(sum(t.numel() for t in parts))
    return value, scale * (1 + 1e4 * rounding)


def _counted(batch: Any) -> int:
    """Return how many examples a process's batch holds, if its loss is their mean.

    Raises:
        ValueError: it is that of micro-batches that are not weighted by their length.
    """
    if not isinstance(batch, MicroBatches):
        return examples_of(batch)
    counts = [examples_of(part) for part in batch.batches]
    if not all(math.isclose(w * sum(counts), n, rel_tol=1e-6) for w, n in zip(batch.weights, counts, strict=True)):
        raise ValueError(
            f"micro-batches of {counts} examples have the weights {batch.weights}, so that their loss is no mean over "
            'examples: use weighting="ranks", which averages the losses over the processes as DDP averages gradients.'
        )
    return sum(counts)


def shapes_of(batch: Any) -> list[str]:
    """Describe the tensors of a batch, but for their length; of micro-batches those of the first."""
    batch = batch.batches[0] if isinstance(batch, MicroBatches) else batch
    return [
        f"a batch of [..., {', '.join(map(str, t.shape[1:]))}] {t.dtype}"
        for t in pytree.tree_leaves(batch)
        if isinstance(t, Tensor)
    ]
