"""Parameters under ``fully_shard`` (FSDP2): vectors are sharded alike, and weights are whole one unit at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...optimizers.parts import is_spread
from ...rop.double_backward import DoubleBackward
from ...rop.sandbox import without_trace
from ..base import ParameterOperator
from ..dataset import examples_of
from ..eager import check_loss
from ..freshness import Freshness
from ..losses import LossModule, NonFiniteLossError
from ..operators import check_batch
from ..parameters import trainable
from ..wrappers import check_uncoupled, is_fully_sharded, kind_of, unwrapped
from .group import Ranks, checksum, ranks_of
from .replicated import TIME_LIMIT, Weighting, shapes_of
from .shards import Shard
from .skeleton import twin_of


class ShardedHessian(ParameterOperator):
    """The Hessian of the loss over the batches of all processes, for a model under ``fully_shard`` (FSDP2).

    A vector is spread as the parameters are: ``n`` is the length of this process's part, the concatenated local parts
    of the parameters, and ``space.n`` that of the whole. All solvers and ``PreconditionedOperator`` work on it; their
    vectors are parts, their eigenvalues the same on every process. Products go through autograd, unit by unit: weights
    are gathered, used, freed, and gathered again for the backward pass.

    Args:
        model: under ``fully_shard`` over a mesh of one dimension, with all trainable parameters sharded.
        loss_fn: as for ``HessianOperator``, averaged over the examples.
        batch: this process's part of the batch.
        update_buffers: let the forward pass change the model's buffers, each process its own.
        weighting: "examples" weighs each process by the length of its batch: the loss is the mean over all examples.
            "ranks" weighs all alike, as FSDP averages gradients. The two agree for batches of one length.
        time_limit: seconds that a process may come later than the others; beyond, all raise.

    Attributes:
        loss: 0-d, of all processes together.   gradient: ``[n]``, this process's part.
        params: name -> DTensor.   products, n, shape, dtype, device: of the parts.

    Raises:
        ValueError: ``torch.distributed`` is not initialised; a kind of parallelism or a precision policy that is not
            supported; trainable parameters that are not sharded; a bad batch or loss.
        NonFiniteLossError: the loss of any process is NaN or infinite.
        DistributedError: a process failed, is missing, or disagrees.

    Cost: of a product, about six gradients without communication; each weight is gathered twice, each vector once, and
    two sums of shards are handed out. Memory: activations at the borders of units and one unit's weights besides the
    shards.
    """

    _needs_outputs: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        batch: Any,
        *,
        update_buffers: bool = False,
        weighting: Weighting = "examples",
        time_limit: float = TIME_LIMIT,
    ) -> None:
        if weighting not in ("examples", "ranks"):
            raise ValueError(f"weighting must be 'examples' or 'ranks', got {weighting!r}.")
        self.model = unwrapped(model)
        self.weighting, self.products = weighting, 0
        self._loss_fn = loss_fn
        # Frozen ones too: they are gathered like the others.
        first = _sharded_parameters(self.model)
        self.ranks = ranks_of(next(iter(first.values())).device_mesh.get_group(), time_limit)
        self.batch: Any = None
        self.refresh(batch, update_buffers=update_buffers)

    def refresh(self, batch: Any = None, *, update_buffers: bool = False) -> None:
        """Compute loss and gradient at the present parameter values; every process must do so at the same time.

        Raises:
            ValueError, NonFiniteLossError, DistributedError: as the constructor.
        """
        # Nothing is gathered before all processes have come this far with parameters and batches of the same shapes.
        _, counts = self.ranks.together("setup", lambda: self._prepare(batch), own=lambda n: [n])
        names = [f"{name} {list(s.parameter.shape)} {s.parameter.dtype}" for name, s in self._shards.items()]
        same = {"the parameters' checksum": checksum(names)}
        if self.weighting == "examples":
            same["the batch's shape beyond its length, as a checksum,"] = checksum(shapes_of(self.batch))
        self.ranks.agree("setup", same=same, detail=[*names, *shapes_of(self.batch)])
        # The loss is weighted before it is differentiated, so that handing out sums is all that is left to do.
        share = counts[:, 0] if self.weighting == "examples" else torch.ones_like(counts[:, 0])
        self._weight = float(share[self.ranks.rank] / share.sum())
        loss = self._with_gathers("refresh", lambda: self._primal(update_buffers=update_buffers))
        self.loss = loss
        # The parts count no versions when an optimizer writes to their DTensors; the DTensors do.
        self._freshness.renew([*self._inputs, *self.params.values()])

    def _prepare(self, batch: Any) -> float:
        """Look at model and batch; return how many examples there are."""
        everything = _sharded_parameters(self.model)
        if self.ranks.size > 1:
            check_uncoupled(self.model)
        shards = {name: Shard(p, self.ranks, i) for i, (name, p) in enumerate(everything.items())}
        # Made anew at each refresh, which takes microseconds a module: the model may have changed its mode.
        twin = twin_of(self.model, {id(s.parameter): s for s in shards.values()})
        self._module = LossModule(twin, self._weighted)
        self._shards = {name: s for name, s in shards.items() if s.part.requires_grad}
        self.params: dict[str, Tensor] = {name: s.parameter for name, s in self._shards.items()}
        self.batch = self.batch if batch is None else self._module.accepted(batch)
        leaves, spec = pytree.tree_flatten(self.batch)
        self._inputs = [x for x in leaves if isinstance(x, Tensor)]
        parts = {name: s.part for name, s in self._shards.items()}
        # It sees leaves that happen to be parts, and a module that gathers them: nothing in it knows of processes.
        self._engine = DoubleBackward(self._module, spec, parts, keep_outputs=self._needs_outputs)
        layout = self._engine.layout
        self.n, self.dtype, self.device = layout.n, layout.dtype, layout.device
        self.space = _Sharded(self.ranks, list(self._shards.values()), self.dtype, self.device)
        self._freshness = Freshness(list(parts.values()))
        check_batch(self._inputs, self.device)
        return float(examples_of(self.batch))

    def _weighted(self, output: Any, targets: Any) -> Tensor:
        """Return this process's loss, weighted so that the sum over processes is the loss of all."""
        loss = self._loss_fn(output, targets)
        # Without gradients it is only looked at whether the model returns the loss itself: a product would hide that.
        return check_loss(loss) * self._weight if torch.is_grad_enabled() else loss

    def _primal(self, *, update_buffers: bool) -> Tensor:
        if self._needs_outputs:
            with torch.no_grad(), without_trace([self._module], {self.device}):
                self._module.check_outputs(self.batch)
        leaves = pytree.tree_leaves(self.batch)
        own = self._engine.forward(self._module, leaves, update_buffers=update_buffers)
        # Known to all before anyone decides whether it is finite.
        loss = self.ranks.sum_(own.double())
        if not math.isfinite(float(loss)):
            raise NonFiniteLossError(float(loss))
        return loss.to(own.dtype)

    @property
    def engine(self) -> DoubleBackward:
        """What gives the products."""
        return self._engine

    @property
    def gradient(self) -> Tensor:
        """This process's part of the loss's gradient at the last ``refresh``, ``[n]``."""
        return self._engine.gradient()

    def apply_rows(self, block: Tensor) -> Tensor:
        product = self._with_gathers("product", lambda: self._product(block), block)
        self.products += block.shape[0]
        return product

    def form_rows(self, block: Tensor) -> Tensor:
        def form() -> Tensor:
            return self._engine.quadratic_form(block, gauss_newton=self._needs_outputs)

        return self.ranks.sum_(self._with_gathers("quadratic form", form, block))

    def _product(self, block: Tensor) -> Tensor:
        return self._engine.hvp(block)

    def _with_gathers(self, step: Any, work: Callable[[], Tensor], block: Tensor | None = None) -> Tensor:
        """Run what gathers weights on the way: agreed on before, and afterwards compared in the order of gathers."""
        before = {"the number of products so far": float(self.products)}
        if block is not None:
            before["the number of vectors"] = float(block.shape[0])
            # A stale operator on one process is an error on all, before the others start to gather.
            self.ranks.together(step, self._check_fresh, same=before)
        self.ranks.order = 0

        def order() -> dict[str, float]:
            # Where a model's path depends on its data, a process may have gathered another weight of the same shape.
            return {"the order in which weights were used, as a checksum,": float(self.ranks.order)}

        return self.ranks.together(step, lambda: self._interruptible(work), after=order)[0]

    def _interruptible(self, work: Callable[[], Tensor]) -> Tensor:
        try:
            return work()
        except NonFiniteLossError:
            raise  # seen by all at the same place: nobody waits
        except Exception:
            self.ranks.hang_up()
            raise

    def _check_fresh(self) -> None:
        if not self._freshness.holds():
            raise RuntimeError("parameters or batch changed in place since the last refresh(): call refresh() first.")


class ShardedGGN(ShardedHessian):
    """The generalised Gauss-Newton matrix of a model under ``fully_shard``; arguments as ``ShardedHessian``.

    Raises:
        ValueError: as ``GGNOperator`` and ``ShardedHessian``.
    """

    _needs_outputs = True

    def _product(self, block: Tensor) -> Tensor:
        return self._engine.ggn(block)


class _Sharded:
    """Vectors of which each process holds a part."""

    whole = False

    def __init__(self, ranks: Ranks, shards: list[Shard], dtype: torch.dtype, device: torch.device) -> None:
        self.ranks, self.shards, self.dtype, self.device = ranks, shards, dtype, device
        self.n: int = sum(s.parameter.numel() for s in shards)

    def total(self, partial: Tensor) -> Tensor:
        return self.ranks.sum_(partial)

    def random_rows(self, rows: int, generator: torch.Generator) -> Tensor:
        # Drawn whole, one parameter at a time: the vectors do not depend on how many processes there are, and
        # generators of one seed stay alike. Equal seeds for the parts would make all parts the same.
        return torch.stack([self._row(generator) for _ in range(rows)])

    def _row(self, generator: torch.Generator) -> Tensor:
        whole = (torch.randn(s.parameter.shape, dtype=self.dtype, generator=generator) for s in self.shards)
        parts = [s.chosen(w).reshape(-1).to(self.device) for s, w in zip(self.shards, whole, strict=True)]
        return torch.cat(parts)


def _sharded_parameters(model: nn.Module) -> dict[str, Any]:
    """Bring a model to its sharded state, and return the sharded parameters by name.

    Raises:
        ValueError: it is not under ``fully_shard`` as this file needs it.
    """
    if kind_of(model) != "fsdp2":
        raise ValueError("this model is not under fully_shard: use HessianOperator, or DataParallelHessian.")
    for m in model.modules():
        if is_fully_sharded(m):
            unit: Any = m
            _check_policy(unit)
            unit.reshard()  # after a forward pass the root's parameters may still be whole
    kind_of(model)  # placements show only now
    if whole := [name for name, p in trainable(model).items() if not is_spread(p)]:
        raise ValueError(
            f"trainable parameters are not sharded: {whole[:5]}. Call fully_shard on the whole model too, or freeze "
            "them."
        )
    return {name: p for name, p in model.named_parameters() if is_spread(p)}


def _check_policy(unit: Any) -> None:
    policy = unit._get_fsdp_state()._mp_policy
    if policy.param_dtype or policy.reduce_dtype or policy.output_dtype:
        raise ValueError(
            f"fully_shard's mixed precision is not supported ({policy}): leave mp_policy out, and use torch.autocast "
            "around the model, which is followed."
        )
