"""The norm in which an optimizer descends: its unit ball, the dual norm, and the steepest direction.

    diagonal P (SGD, Adam, ...)   |d|^2 = d' P d                                ellipsoid
    sign (Lion)                   |d| = max_i |d_i|                             cube
    spectral (Muon)               |d| = max over matrices of |D|_2 / s          s: Muon's factor for the matrix's shape

Without momentum and weight decay an optimizer of the last two kinds steps by ``lr`` times the steepest direction of its
ball, whatever the gradient's size; SGD and the others step by the steepest direction times the dual norm.

Source: Bernstein and Newhouse, Old optimizer, new norm: an anthology (2024).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .preconditioner import Gradients, preconditioner
from .rules import Group, rule_of
from .threshold import relative_lr


class UnitBall(Protocol):
    """Vectors ``[n]`` of norm at most 1; those of parameters that the optimizer does not hold are 0."""

    def norm(self, d: Tensor) -> float:
        """Return the norm of d ``[n]``; infinite where a component is not 0 that has to be."""

    def dual_norm(self, g: Tensor) -> float:
        """Return the largest ``g'd`` in the ball, for g ``[n]``."""

    def steepest(self, rows: Tensor) -> Tensor:
        """Return the d of the ball with the largest ``g'd``, for every row g of ``[k, n]``."""


class Ellipsoid:
    """``d' P d <= 1``.

    Args:
        inv_sqrt: ``P^-1/2``, ``[n]``; 0 for components that have to be 0.
    """

    def __init__(self, inv_sqrt: Tensor) -> None:
        self.inv_sqrt = inv_sqrt

    def norm(self, d: Tensor) -> float:
        return float(torch.linalg.vector_norm(_quotients(d, self.inv_sqrt)))

    def dual_norm(self, g: Tensor) -> float:
        return float(torch.linalg.vector_norm(g * self.inv_sqrt))

    def steepest(self, rows: Tensor) -> Tensor:
        return torch.nn.functional.normalize(rows * self.inv_sqrt, dim=1) * self.inv_sqrt


class Cube:
    """``|d_i| <= r_i``.

    Args:
        radii: r, ``[n]``.
    """

    def __init__(self, radii: Tensor) -> None:
        self.radii = radii

    def norm(self, d: Tensor) -> float:
        return float(_quotients(d, self.radii).abs().max())

    def dual_norm(self, g: Tensor) -> float:
        return float((g * self.radii).abs().sum())

    def steepest(self, rows: Tensor) -> Tensor:
        # A vertex also where g_i is 0 and every d_i is as good: products with vertices tell more than with zeros.
        return torch.where(rows >= 0, self.radii, -self.radii)


class SpectralBall:
    """``|D|_2 <= r`` for the matrices D that d is made of.

    Args:
        blocks: of each matrix, where it starts in d, its shape, and r.
    """

    def __init__(self, blocks: Sequence[tuple[int, torch.Size, float]]) -> None:
        self.blocks = list(blocks)

    def _parts(self, rows: Tensor) -> list[Tensor]:
        """Cut ``[k, n]`` into ``[k, rows, columns]``."""
        return [rows[:, at : at + shape.numel()].unflatten(1, shape) for at, shape, _ in self.blocks]

    def norm(self, d: Tensor) -> float:
        parts = self._parts(d[None])
        if int(d.count_nonzero()) > sum(int(part.count_nonzero()) for part in parts):
            return math.inf  # outside of the matrices
        return max(
            float(_quotients(torch.linalg.matrix_norm(part, 2), part.new_tensor(radius)))
            for part, (_, _, radius) in zip(parts, self.blocks, strict=True)
        )

    def dual_norm(self, g: Tensor) -> float:
        parts = zip(self._parts(g[None]), self.blocks, strict=True)
        return math.fsum(radius * float(torch.linalg.matrix_norm(part, "nuc")) for part, (_, _, radius) in parts)

    def steepest(self, rows: Tensor) -> Tensor:
        result = torch.zeros_like(rows)
        for part, (at, shape, radius) in zip(self._parts(rows), self.blocks, strict=True):
            # The exact polar factor, which Newton-Schulz approaches: the ball is what Muon is meant to descend in.
            u, _, vh = torch.linalg.svd(part, full_matrices=False)
            result[:, at : at + shape.numel()] = radius * (u @ vh).flatten(1)
        return result


def unit_ball(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], *, gradients: Gradients = None
) -> Ellipsoid | Cube | SpectralBall:
    """Return the unit ball of an optimizer's norm, on flat vectors in the order of the parameters given.

    A group's lr counts in units of the first group's, so that one lr speaks for all: a group with twice the lr may move
    twice as far.

    Args:
        optimizer: one of the table in ``optimizers.rules``; only read.
        params: the order of the vectors, such as ``operator.params.values()``. Those that the optimizer does not hold
            (Muon holds matrices only) stay where they are.
        gradients: for P of a diagonal optimizer, as for ``preconditioner``.

    Returns:
        An ``Ellipsoid`` for a diagonal P, a ``Cube`` for Lion, a ``SpectralBall`` for Muon. Tensors in float32, or in
        float64 where all parameters are.

    Raises:
        TypeError: the optimizer has no rule.
        ValueError: the optimizer holds none of the parameters.
        RuntimeError: see ``preconditioner``, for a diagonal P.
    """
    # By identity: tensors compare by value.
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in groups for p in params):
        raise ValueError(f"the optimizer holds none of the {len(params)} parameters given.")
    geometry = rule_of(optimizer).geometry
    if geometry == "diagonal":
        return _ellipsoid(optimizer, params, groups, gradients)
    if geometry == "sign":
        # In steps of fixed length, a group with twice the lr goes twice as far: its lr is a radius, and not a weight
        # on the square of a distance as in an ellipsoid.
        radii = [relative_lr(optimizer, groups[id(p)]) if id(p) in groups else 0.0 for p in params]
        return Cube(torch.cat([_filled(p, radius) for p, radius in zip(params, radii, strict=True)]))
    blocks, at = [], 0
    for p in params:
        if id(p) in groups:
            group = groups[id(p)]
            blocks.append((at, p.shape, relative_lr(optimizer, group) * _muon_factor(group, p.shape)))
        at += p.numel()
    return SpectralBall(blocks)


def _ellipsoid(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], groups: Mapping[int, Group], gradients: Gradients
) -> Ellipsoid:
    # One parameter at a time: P knows none of the others'.
    P = preconditioner(optimizer, gradients=gradients)
    return Ellipsoid(torch.cat([P.inv_sqrt([p]) if id(p) in groups else _filled(p, 0.0) for p in params]))


def _filled(p: Tensor, value: float) -> Tensor:
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    return torch.full((p.numel(),), value, dtype=dtype, device=p.device)


def _muon_factor(group: Group, shape: torch.Size) -> float:
    """Return by what Muon multiplies lr for a matrix, from its group's ``adjust_lr_fn``."""
    rows, columns = shape
    if group["adjust_lr_fn"] == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def _quotients(d: Tensor, radii: Tensor) -> Tensor:
    """Return ``d / r``, 0 for 0 / 0."""
    # A component that must be 0, and is, has no part in the norm; one that is not makes it infinite.
    return torch.where(d == 0, torch.zeros_like(d), d / radii)
