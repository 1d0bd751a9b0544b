"""Which composite ops are taken apart before a program is built, and into what.

Torch's own table serves the ops that have neither a rule nor a reason to stay whole. The functions here serve ops whose
second derivative torch lacks or gets wrong, composed of ops that have rules.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch.export.graph_signature import InputKind

from .decomposition_table import DecompositionTable
from .layout import memory_of
from .rule import RULES

aten = torch.ops.aten

# Recurrent layers stay whole for the per-op fallback: their decompositions unroll time step by time step.
# detach stays because torch decomposes it to an alias, which no longer stops gradients.
_KEEP = {
    aten.detach.default,
    aten.lstm.input, aten.lstm.data, aten.gru.input, aten.gru.data,
    aten.rnn_tanh.input, aten.rnn_tanh.data, aten.rnn_relu.input, aten.rnn_relu.data,
    aten.max_unpool2d.default, aten.max_unpool3d.default,  # torch's gradient of repeated indices is not index_put's
}  # fmt: skip
_MODES = ("sum", "mean", "max")  # of an embedding bag, as torch numbers them


def decomposed(exported: Any, parameters: set[Any]) -> Any:
    """Return an exported program whose ops have rules as far as can be, composite ones kept whole.

    Attention stays whole but where its mask depends on the parameters (a learned position bias): the rule's kernels
    have no derivative by the mask, so the scores are then computed as such.

    Args:
        exported: from ``torch.export``.
        parameters: ``memory_of`` each of the module's parameters, which may arrive as constants.
    """
    program = _table().apply(exported)
    attention = aten.scaled_dot_product_attention.default
    masks = [node.args[3] for node in program.graph.nodes if node.target is attention and len(node.args) > 3]
    if any(isinstance(mask, fx.Node) and mask in _reached(program, parameters) for mask in masks):
        # All attention of the model then, for the table goes by op; the scores of the others cost memory only.
        program = _table(explicit=True).apply(exported)
    return program


def _reached(program: Any, parameters: set[Any]) -> set[fx.Node]:
    """Return the nodes that depend on a parameter."""
    sources = {
        spec.arg.name
        for spec in program.graph_signature.input_specs
        # A parameter that a closure captured arrives as a constant, on the parameter's memory.
        if spec.kind == InputKind.PARAMETER or memory_of(program.constants.get(spec.target)) in parameters
    }
    reached: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.name in sources or any(before in reached for before in node.all_input_nodes):
            reached.add(node)
    return reached


@functools.cache
def _table(*, explicit: bool = False) -> DecompositionTable:
    """Return the table; with ``explicit`` attention is taken apart too."""
    table: dict[Any, Any] = {
        op: f for op, f in torch.export.default_decompositions().items() if op not in RULES and op not in _KEEP
    }
    table[aten._weight_norm.default] = weight_norm
    table[aten._weight_norm_interface.default] = weight_norm_interface
    for op, f in {
        aten._cdist_forward.default: pairwise_distances,
        aten._pdist_forward.default: distances_within,
        aten.prod.default: product,
        aten.prod.dim_int: product_along,
        aten.cumprod.default: running_product,
        aten._embedding_bag.default: embedding_bag,
        aten._embedding_bag_forward_only.default: embedding_bag,
        aten.grid_sampler_2d.default: decomposition_table[aten.grid_sampler_2d.default],
    }.items():
        if op not in RULES:
            table[op] = f
    if explicit:
        table[aten.scaled_dot_product_attention.default] = explicit_attention
    return DecompositionTable(table)


def weight_norm_interface(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """Weight normalisation from primitives: torch's own second derivative of this op is wrong."""
    dims = [i for i in range(v.ndim) if i != dim % v.ndim]
    norm = torch.sqrt(torch.sum(v * v, dims, keepdim=True))
    return v * (g / norm), norm


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Weight normalisation, the weight alone."""
    return weight_norm_interface(v, g, dim)[0]


def product(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Product of all entries."""
    return product_along(x.reshape(-1), 0, dtype=dtype)


def product_along(x: Tensor, dim: int, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """Products as a tree of multiplications: no entry is divided by, so that zeros are as good as others."""
    x = x if dtype is None else x.to(dtype)
    if x.ndim == 0:
        return x.clone()
    if x.shape[dim] == 0:
        return torch.ones_like(x.sum(dim, keepdim=keepdim))
    while (n := x.shape[dim]) > 1:
        # Halves, not neighbours: each half lies in one piece, and log2 n steps suffice either way.
        pairs = x.narrow(dim, 0, n // 2) * x.narrow(dim, n // 2, n // 2)
        x = pairs if n % 2 == 0 else torch.cat([pairs, x.narrow(dim, n - 1, 1)], dim)
    return x if keepdim else x.squeeze(dim)


def running_product(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Running products by doubling: after step i each entry is the product of the last 2^i."""
    x = x if dtype is None else x.to(dtype)
    if x.ndim == 0:
        return x.clone()
    n, reach = x.shape[dim], 1
    while reach < n:
        # n log2 n multiplications, where a loop over entries would make n steps of the program and a division by x
        # would fail at a zero. The first ``reach`` entries are complete.
        x = torch.cat([x.narrow(dim, 0, reach), x.narrow(dim, reach, n - reach) * x.narrow(dim, 0, n - reach)], dim)
        reach *= 2
    return x.clone() if n <= 1 else x


def pairwise_distances(x: Tensor, y: Tensor, p: float, mode: int | None = None) -> Tensor:  # noqa: ARG001
    """Distances between all rows; torch has no second derivative of its own op. Memory: all differences."""
    # Not |x|^2 + |y|^2 - 2 x y, one of torch's modes: near rows lose their digits in it.
    return torch.linalg.vector_norm(x.unsqueeze(-2) - y.unsqueeze(-3), p, -1)


def distances_within(x: Tensor, p: float = 2.0) -> Tensor:
    """Distances between the rows of one matrix, each pair once."""
    i, j = torch.triu_indices(x.shape[0], x.shape[0], 1, device=x.device).unbind(0)
    return torch.linalg.vector_norm(x[i] - x[j], p, -1)


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,  # noqa: ARG001
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums or means over bags of rows; torch has no second derivative of its own op."""
    if scale_grad_by_freq or _MODES[mode] == "max":
        raise NotImplementedError(f"embedding_bag with mode={_MODES[mode]!r}, scale_grad_by_freq={scale_grad_by_freq}")
    starts = offsets[:-1] if include_last_offset else offsets
    position = torch.arange(indices.shape[0], device=indices.device)
    # The last bag that starts at or before a position: of bags that start together, all but the last one are empty.
    bag = (position[:, None] >= starts[None, :]).sum(1) - 1
    kept = (indices != padding_idx).to(weight.dtype)
    # Multiplied by zero and not left out: how many rows are padding depends on values.
    rows = weight[indices] * kept[:, None]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    total = rows.new_zeros(starts.shape[0], weight.shape[1]).index_add(0, bag, rows)
    sizes = kept.new_zeros(starts.shape[0]).index_add(0, bag, kept)
    if _MODES[mode] == "mean":
        # An empty bag's mean is zero, as in torch.
        total = total / sizes.clamp(min=1)[:, None]
    # The last result says which rows a maximum took: of sums and means nobody reads it.
    return total, bag, sizes.to(indices.dtype), torch.empty_like(offsets)


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention with its scores in memory, so that the mask is differentiated as any other tensor."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(ones.triu(1), -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # Added and not filled in, as torch does: a NaN stays one, also where it is hidden.
        attn_mask = torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill(~attn_mask, -math.inf)
    if attn_mask is not None:
        scores = scores + attn_mask
    dead = (scores == -math.inf).all(-1, keepdim=True)  # a row that may attend to nothing gives zero
    # Filled in front as well as behind: softmax of -inf alone is NaN, and so would its derivative be.
    weights = torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
    return (torch.dropout(weights, dropout_p, train=True) if dropout_p else weights) @ value
