"""Export a loss to a short functional list of ATen calls, composite ops kept whole."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from .rule import RULES

aten = torch.ops.aten

# Recurrent layers stay whole for the per-op fallback: their decompositions unroll time step by time step.
# detach stays because torch decomposes it to an alias, which no longer stops gradients.
_KEEP = {
    aten.detach.default,
    aten.lstm.input, aten.lstm.data, aten.gru.input, aten.gru.data,
    aten.rnn_tanh.input, aten.rnn_tanh.data, aten.rnn_relu.input, aten.rnn_relu.data,
}  # fmt: skip


class UnsupportedModelError(RuntimeError):
    """The model cannot be exported to a program of ATen ops; the message names the construct."""


def tensors_of(output: Any) -> list[Tensor]:
    """List the tensors of a model's output (a tensor, or a nest of tuples, lists and mappings)."""
    leaves = pytree.tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [t for t in leaves if isinstance(t, Tensor)]


@dataclass
class Graph:
    """An exported loss: its nodes and what each placeholder and output stands for."""

    nodes: list[fx.Node]
    parameters: dict[str, Tensor]  # placeholder name -> the module's own tensor
    buffers: dict[str, str]  # placeholder name -> qualified name
    constants: dict[str, Any]  # placeholder name -> tensor lifted by the export
    user_inputs: list[str | None]  # flat position in the batch -> placeholder name
    loss: fx.Node
    outputs: list[fx.Node]  # the model's outputs
    mutations: dict[str, fx.Node]  # qualified buffer name -> its value after the forward pass


def export(module: nn.Module, batch: Any) -> Graph:
    """Export ``module(batch) -> (loss, outputs)``.

    Args:
        module: a ``LossModule`` or ``FunctionalLoss``.
        batch: example batch; its shapes become part of the program.

    Raises:
        UnsupportedModelError: the model has a data-dependent branch or another construct that does not export.
        ValueError: the loss is not a scalar of floating dtype.
    """
    with warnings.catch_warnings(), _quiet("torch.export", "torch.fx", "torch._dynamo", "torch._subclasses"):
        warnings.simplefilter("ignore")
        try:
            exported = torch.export.export(module, (batch,), strict=False)
            _detach_no_grad_regions(exported.graph_module)
            exported = exported.run_decompositions(dict(_decompositions()))  # a copy: torch removes entries
        except Exception as error:  # torch.export has no common base class for what a user's code can trip
            raise UnsupportedModelError(f"{type(error).__name__}: {_first_sentence(error)}") from error
    return _read(exported, module)


def _read(exported: Any, module: nn.Module) -> Graph:
    own = dict(module.named_parameters(remove_duplicate=False))
    graph = Graph([], {}, {}, {}, [], None, [], {})  # type: ignore[arg-type]
    for spec in exported.graph_signature.input_specs:
        if spec.kind == InputKind.PARAMETER:
            graph.parameters[spec.arg.name] = own[spec.target]
        elif spec.kind == InputKind.BUFFER:
            graph.buffers[spec.arg.name] = spec.target
        elif spec.kind == InputKind.USER_INPUT:
            graph.user_inputs.append(None if isinstance(spec.arg, ConstantArgument) else spec.arg.name)
        else:
            graph.constants[spec.arg.name] = exported.constants[spec.target]
    by_name = {node.name: node for node in exported.graph.nodes}
    user: list[fx.Node] = []
    for out in exported.graph_signature.output_specs:
        if out.kind == OutputKind.BUFFER_MUTATION:
            graph.mutations[out.target] = by_name[out.arg.name]
        elif out.kind == OutputKind.USER_OUTPUT and not isinstance(out.arg, ConstantArgument):
            user.append(by_name[out.arg.name])
        elif out.kind != OutputKind.USER_OUTPUT:
            raise UnsupportedModelError(f"the model changes its input or parameter {out.target!r} in place")
    if not user:
        raise ValueError("loss_fn must return a scalar tensor that depends on the model; got a constant.")
    graph.loss, graph.outputs = user[0], user[1:]
    value = graph.loss.meta["val"]
    if value.ndim != 0 or not value.dtype.is_floating_point:
        raise ValueError(
            f"loss_fn must return a floating scalar, got shape {list(value.shape)} and {value.dtype}: "
            "reduce it, for example with .mean()."
        )
    for node in exported.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise UnsupportedModelError(f"the model uses {node.target.name()}, which has no rule")
        if node.op == "call_function" and node.meta.get("val") is None:
            continue  # an assertion: no result
        if isinstance(node.meta.get("val"), torch.SymInt | torch.SymBool | torch.SymFloat):
            raise UnsupportedModelError(
                "the model makes tensors whose size depends on values, as indexing with a boolean mask does: "
                "torch.where or a masked sum has a fixed size"
            )
        if node.op == "get_attr":
            graph.constants[node.name] = _attribute(exported.graph_module, str(node.target))
        graph.nodes.append(node)
    return graph


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _detach_no_grad_regions(graph_module: fx.GraphModule) -> None:
    """Make ``torch.no_grad()`` regions explicit: decomposing inlines them and forgets that they stop gradients."""
    wrap = torch.ops.higher_order.wrap_with_set_grad_enabled
    for node in list(graph_module.graph.nodes):
        if node.target is not wrap or node.args[0]:
            continue
        for item in list(node.users):
            with graph_module.graph.inserting_after(item):
                stop = graph_module.graph.call_function(aten.detach.default, (item,))
            stop.meta = dict(item.meta)
            item.replace_all_uses_with(stop, delete_user_cb=lambda user, stop=stop: user is not stop)
    graph_module.recompile()


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Torch's decompositions for the ops that have neither a rule nor a reason to stay whole."""
    table = {op: fn for op, fn in torch.export.default_decompositions().items() if op not in RULES and op not in _KEEP}
    table[aten._weight_norm.default] = _weight_norm
    table[aten._weight_norm_interface.default] = _weight_norm_interface
    return table


def _weight_norm_interface(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """Weight normalisation from primitives: torch's own second derivative of this op is wrong."""
    dims = [i for i in range(v.ndim) if i != dim % v.ndim]
    norm = torch.sqrt(torch.sum(v * v, dims, keepdim=True))
    return v * (g / norm), norm


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return _weight_norm_interface(v, g, dim)[0]


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no message"


class _quiet:
    """Silence the loggers that torch.export writes its own reports to."""

    def __init__(self, *names: str) -> None:
        self.loggers = [logging.getLogger(name) for name in names]

    def __enter__(self) -> None:
        self.levels = [logger.level for logger in self.loggers]
        for logger in self.loggers:
            logger.setLevel(logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        for logger, level in zip(self.loggers, self.levels, strict=True):
            logger.setLevel(level)
