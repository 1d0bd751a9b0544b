"""Blocks of a curvature operator: the sharpness of each layer by itself, all with one export."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby

import torch
from torch import Tensor

from ..curvature.base import ParameterOperator
from ..curvature.sharpness import Sharpness
from ..eigen import lanczos
from ..eigen.common import check_whole
from ..rop.layout import Layout


class BlockOperator(ParameterOperator):
    """The diagonal block of an operator that belongs to some of its parameters, all others held fixed.

    Its products are the whole operator's, of vectors that are zero elsewhere: nothing is exported for it.

    Args:
        operator: an operator with ``params``, such as ``HessianOperator``; it may be refreshed later.
        names: of the parameters; their order does not matter.

    Attributes:
        params: name -> parameter, of the block.   n, shape, dtype, device: of the block.

    Raises:
        ValueError: no name, or one that the operator does not have.

    Cost: a product of the whole operator, and 2 (n + block's n) numbers moved.
    """

    def __init__(self, operator: ParameterOperator, names: Iterable[str]) -> None:
        check_whole(operator, "a block of layers")
        wanted = [names] if isinstance(names, str) else list(names)
        if unknown := [name for name in wanted if name not in operator.params]:
            raise ValueError(f"not among the operator's parameters: {unknown}. It has {list(operator.params)}.")
        if not wanted:
            raise ValueError("a block needs at least one parameter, got none.")
        self.operator = operator
        whole = Layout(operator.params)
        # In the operator's order, so that vectors of a block are cut as vectors of the whole are.
        places = [i for i, name in enumerate(whole.names) if name in wanted]
        self.params = {whole.names[i]: whole.tensors[i] for i in places}
        self.n, self.dtype, self.device = Layout(self.params).n, operator.dtype, operator.device
        # Neighbours are one piece: a layer's weight and bias are copied together.
        self._pieces = []
        for _, run in groupby(enumerate(places), lambda pair: pair[1] - pair[0]):
            members = [i for _, i in run]
            self._pieces.append(slice(whole.offsets[members[0]], whole.offsets[members[-1] + 1]))

    def apply_rows(self, block: Tensor) -> Tensor:
        # Not the engine's own choice of parameters: that would be another program, exported and recorded anew.
        product = self.operator.apply_rows(self._embedded(block))
        return torch.cat([product[:, piece] for piece in self._pieces], dim=1)

    def form_rows(self, block: Tensor) -> Tensor:
        return self.operator.form_rows(self._embedded(block))

    def _embedded(self, block: Tensor) -> Tensor:
        whole = block.new_zeros(len(block), self.operator.n)
        parts = block.split([piece.stop - piece.start for piece in self._pieces], dim=1)
        for piece, part in zip(self._pieces, parts, strict=True):
            whole[:, piece] = part
        return whole


def layer_sharpness(
    operator: ParameterOperator,
    layers: Mapping[str, Iterable[str]] | None = None,
    tol: float = 1e-3,
    *,
    max_matvecs: int = 200,
    generator: torch.Generator | None = None,
) -> dict[str, Sharpness]:
    """Return the largest eigenvalue of each layer's diagonal block: how sharp the loss is in this layer alone.

    Args:
        operator: an operator with ``params``, such as ``HessianOperator(model, loss_fn, batch)``.
        layers: layer -> names of its parameters; layers may share some. None: a layer is a module that has parameters
            of its own, and a parameter of the outermost module is a layer by itself.
        tol: relative residual at which to stop.
        max_matvecs: the most products to spend, for each layer; a layer of fewer parameters needs no more than those.
        generator: of the random starts, on the CPU; None for seed 0.

    Returns:
        layer -> ``Sharpness``; its ``vector`` has the layer's own length: ``BlockOperator.unflatten`` cuts it. By
        interlacing, no value is above the sharpness of the whole.

    Raises:
        ValueError: an empty layer, an unknown parameter, or a bad tolerance.
        RuntimeError: a product is not finite.

    Cost: for each layer what ``sharpness`` costs, without the export.
    """
    names = _by_module(operator.params) if layers is None else layers
    # All blocks first: a misspelt name must not cost the layers before it.
    blocks = {layer: BlockOperator(operator, members) for layer, members in names.items()}
    found = {}
    for layer, block in blocks.items():
        r = lanczos(block, tol=tol, max_matvecs=max_matvecs, generator=generator)
        value, bound = float(r.eigenvalues[0]), float(r.error_bounds[0])
        found[layer] = Sharpness(value, bound, r.eigenvectors[0], r.matvecs, r.converged, r.reason)
    return found


def _by_module(params: Mapping[str, Tensor]) -> dict[str, list[str]]:
    layers: dict[str, list[str]] = {}
    # A tied weight has one name and belongs to the module that owns it first.
    for name in params:
        layers.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return layers
