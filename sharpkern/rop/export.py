"""Export a loss to a short functional list of ATen calls, composite ops kept whole."""

from __future__ import annotations

import contextlib
import functools
import io
import linecache
import logging
import operator
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from .decompositions import decomposed
from .layout import memory_of
from .sandbox import differentiable_checkpoints

aten = torch.ops.aten

_CHECKS = {aten._linalg_check_errors.default}
_TORCH, _PACKAGE = (str(Path(file).parent) for file in (torch.__file__, str(Path(__file__).parent)))


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

    @functools.cached_property
    def rounding(self) -> float:
        """Machine epsilon of the coarsest floating dtype that the model computes in; its own casts count."""
        values = [t for node in self.nodes for t in pytree.tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)]
        return max(torch.finfo(t.dtype).eps for t in values if t.dtype.is_floating_point)


def export(module: nn.Module, batch: Any) -> Graph:
    """Export ``module(batch) -> (loss, outputs)``.

    Args:
        module: a ``LossModule`` or ``FunctionalLoss``.
        batch: example batch; its shapes become part of the program.

    Raises:
        UnsupportedModelError: the model has a data-dependent branch or another construct that does not export; the
            message says where it stands.
        ValueError: the loss is not a scalar of floating dtype.
    """
    quiet = _quiet("torch.export", "torch.fx", "torch._dynamo", "torch._subclasses")
    with warnings.catch_warnings(), quiet, _sources_forgotten():
        warnings.simplefilter("ignore")
        try:
            with contextlib.redirect_stderr(io.StringIO()), differentiable_checkpoints():  # torch prints whole graphs
                # Non-strict: the user's code runs as Python, so that what dynamo cannot read exports too. What such a
                # trace freezes, ``curvature/watch.py`` looks after.
                exported = torch.export.export(module, (batch,), strict=False)
                # Before the decompositions, which inline these regions.
                _detach_no_grad_regions(exported.graph_module)
                exported = decomposed(exported, {memory_of(p) for p in module.parameters()})
        except Exception as error:  # torch.export has no common base class for what a user's code can trip
            raise UnsupportedModelError(f"{type(error).__name__}: {_first_sentence(error)}{_place(error)}") from error
    return _read(exported, module)


@contextlib.contextmanager
def _sources_forgotten() -> Iterator[None]:
    """Drop the texts of the graph modules that are made within the block.

    Torch keeps each for ever, for tracebacks: some 30 kB per export, in a run that exports again and again.
    """
    kept = getattr(getattr(fx.graph_module, "_loader", None), "eval_cache", {})
    before = set(kept)
    try:
        yield
    finally:
        for name in kept.keys() - before:
            kept.pop(name, None)  # two threads may export at once
            linecache.cache.pop(name, None)


def _read(exported: Any, module: nn.Module) -> Graph:
    graph = Graph([], {}, {}, {}, [], None, [], {})  # type: ignore[arg-type]
    _read_inputs(graph, exported, module)
    _read_outputs(graph, exported)
    _read_nodes(graph, exported)
    return graph


def _read_inputs(graph: Graph, exported: Any, module: nn.Module) -> None:
    """Say what each placeholder stands for."""
    # With every name of a tied tensor: the export may have an input for each.
    own = dict(module.named_parameters(remove_duplicate=False))
    # A closure's parameter arrives as a constant, on the parameter's memory: it is the parameter all the same.
    captured = {memory_of(p): p for p in own.values()}
    for spec in exported.graph_signature.input_specs:
        if spec.kind == InputKind.PARAMETER:
            graph.parameters[spec.arg.name] = own[spec.target]
        elif spec.kind == InputKind.BUFFER:
            graph.buffers[spec.arg.name] = spec.target
        elif spec.kind == InputKind.USER_INPUT:
            # A leaf that is no tensor has become a constant of the program, and takes no place in it.
            graph.user_inputs.append(None if isinstance(spec.arg, ConstantArgument) else spec.arg.name)
        # Tokens order effects, such as prints; they carry no number.
        elif spec.kind != InputKind.TOKEN:
            constant = _tensor(exported.constants[spec.target])
            if (parameter := captured.get(memory_of(constant))) is not None:
                graph.parameters[spec.arg.name] = parameter
            else:
                graph.constants[spec.arg.name] = constant


def _tensor(constant: Any) -> Tensor:
    """Return a lifted constant; an object that is no tensor may hold a state that the program would not move."""
    if isinstance(constant, Tensor):
        return constant
    if "Generator" in type(constant).__name__:
        raise UnsupportedModelError("the model draws from a torch.Generator of its own")
    raise UnsupportedModelError(f"the model holds an object that is no tensor ({type(constant).__name__})")


def _read_outputs(graph: Graph, exported: Any) -> None:
    """Find the loss, the model's outputs, and the buffers that change."""
    by_name = {node.name: node for node in exported.graph.nodes}
    user: list[fx.Node] = []
    for out in exported.graph_signature.output_specs:
        if out.kind == OutputKind.BUFFER_MUTATION:
            graph.mutations[out.target] = by_name[out.arg.name]
        elif out.kind == OutputKind.USER_OUTPUT and not isinstance(out.arg, ConstantArgument):
            user.append(by_name[out.arg.name])
        # The program would have to write to the user's own tensors at every forward sweep.
        elif out.kind not in (OutputKind.USER_OUTPUT, OutputKind.TOKEN):
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


def _read_nodes(graph: Graph, exported: Any) -> None:
    """Keep the calls; refuse what no sweep can pass."""
    dropped: set[fx.Node] = set()
    for node in exported.graph.nodes:
        if (node.target is torch.ops.higher_order.with_effects and node.args[1] in _CHECKS) or (
            node.target is operator.getitem and node.args[0] in dropped
        ):
            dropped.add(node)
            continue  # torch 2.14 orders the checks of linear algebra by tokens; a failed one gives numbers not finite
        _check_node(node)
        if node.op == "call_function" and node.meta.get("val") is None:
            continue  # an assertion: no result
        if node.op == "get_attr":
            graph.constants[node.name] = _attribute(exported.graph_module, str(node.target))
        graph.nodes.append(node)


def _check_node(node: fx.Node) -> None:
    value = node.meta.get("val")
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        raise UnsupportedModelError(f"the model uses {node.target.name()}, which has no rule{_line(node)}")
    if _is_complex(value):
        raise UnsupportedModelError(f"the model computes with complex numbers ({node.target}){_line(node)}")
    if isinstance(value, torch.SymInt | torch.SymBool | torch.SymFloat):
        raise UnsupportedModelError(
            "the model makes tensors whose size depends on values, as indexing with a boolean mask does: "
            f"torch.where or a masked sum has a fixed size{_line(node)}"
        )


def _is_complex(value: Any) -> bool:
    return any(isinstance(t, Tensor) and t.is_complex() for t in pytree.tree_leaves(value))


def _line(node: fx.Node) -> str:
    """Say where in the user's code a node comes from."""
    places = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [place for place in places if not _is_torchs(place[0])]
    # The last one is the innermost frame of the user's: nearest to the cause.
    return f", at {own[-1][0]}:{own[-1][1]}" if own else ""


def _place(error: BaseException) -> str:
    """Say where in the user's code an error was raised."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_torchs(frame.filename)]
    return f", at {own[-1].filename}:{own[-1].lineno}" if own else ""


def _is_torchs(file: str) -> bool:
    # "<" begins the names of code without a file, which torch generates.
    return file.startswith((_TORCH, _PACKAGE, "<"))


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
            # But for the new node's own input, which would then be itself.
            item.replace_all_uses_with(stop, delete_user_cb=lambda user, stop=stop: user is not stop)
    graph_module.recompile()


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
            # By level, which loggers below inherit; a filter would not see what these pass up.
            logger.setLevel(logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        for logger, level in zip(self.loggers, self.levels, strict=True):
            logger.setLevel(level)
