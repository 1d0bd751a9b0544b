"""The density of the spectrum, by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import kernels
from ..eigen.common import SymmetricOperator, check_whole, random_rows
from .probes import Estimate, identity, products, seeded

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # at run time only where something is drawn: it is no dependency

_DENSE = 2048  # n up to which all eigenvalues are computed where that needs no more products: seconds on one core
_BASIS_BYTES = 1 << 30  # of the bases that grow together; a product of a block costs less than its vectors one by one
_WIDTH = 0.01  # of the spectrum: the default standard deviation of a broadened eigenvalue
_MARGIN = 4.0  # standard deviations around the outermost nodes


@dataclass(frozen=True)
class SpectralDensity:
    """A distribution of eigenvalues, as weighted nodes: the Gauss quadrature of each probe, or the eigenvalues.

    Attributes:
        nodes: ``[m]`` float64, in the units of the operator. The outermost ones are Ritz values: close to the extreme
            eigenvalues, and never beyond them.
        weights: ``[m]`` float64, of sum one.
        probe: ``[m]`` int64, the probe of each node, from 0.
        n: size of the operator: how many eigenvalues the whole weight stands for.
        matvecs: products spent.
        exact: the nodes are all n eigenvalues; standard errors are then zero.
        method: what was done, in words.
    """

    nodes: Tensor
    weights: Tensor
    probe: Tensor
    n: int
    matvecs: int
    exact: bool
    method: str

    def density(self, x: Tensor, sigma: float | None = None) -> Estimate[Tensor]:
        """Return the density at x, each node broadened to a Gaussian; its integral is one.

        Args:
            x: ``[g]``, in the units of the operator.
            sigma: standard deviation of the Gaussians, None for 1% of the nodes' range. Probes cannot resolve a smaller
                one than about the range over the number of steps.

        Returns:
            ``[g]`` float64; its standard error is that of the probes, without what broadening changes.

        Raises:
            ValueError: sigma is not positive.

        Cost: g times the number of nodes.
        """
        width = self.width if sigma is None else sigma
        if not width > 0:
            raise ValueError(f"sigma must be positive, got {sigma}.")
        distance = (x.double().cpu()[:, None] - self.nodes) / width
        return self._averaged(torch.exp(-0.5 * distance.square()) / (width * math.sqrt(2 * math.pi)))

    def cumulative(self, x: Tensor, sigma: float | None = None) -> Estimate[Tensor]:
        """Return the share of eigenvalues up to x, the integral of ``density``.

        Args:
            x: ``[g]``, in the units of the operator.
            sigma: as for ``density``; 0 for the bare steps. Then the value between two nodes is sure only up to the
                weights of both, for a node stands for eigenvalues on both of its sides.

        Returns:
            ``[g]`` float64, from 0 to 1, with the standard error of the probes.

        Raises:
            ValueError: sigma is negative.
        """
        width = self.width if sigma is None else sigma
        if not width >= 0:
            raise ValueError(f"sigma must be 0 or positive, got {sigma}.")
        distance = x.double().cpu()[:, None] - self.nodes
        return self._averaged(torch.special.ndtr(distance / width) if width else (distance >= 0).double())

    def trace_of(self, function: Callable[[Tensor], Tensor]) -> Estimate[float]:
        """Estimate the trace of a function of the operator, the sum of ``function(eigenvalue)``.

        Args:
            function: elementwise on float64 ``[m]``, such as ``torch.square``, ``torch.abs``, or
                ``lambda x: torch.log1p(x.clamp(min=0))``. Polynomials of a degree below twice the steps have no error
                but that of the probes.

        Returns:
            The trace, with the standard error over the probes.

        Source: Ubaru, Chen and Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature (2017).
        """
        mean = self._averaged(function(self.nodes)[None])
        value, error = self.n * float(mean.value), self.n * float(mean.standard_error)
        return Estimate(value, error, self.matvecs, self.exact, self.method)

    @property
    def width(self) -> float:
        """The default ``sigma``: 1% of the nodes' range, or of their size where they are all equal."""
        span, size = float(self.nodes.max() - self.nodes.min()), float(self.nodes.abs().max())
        # Rounding alone sets equal eigenvalues apart; a Gaussian of that width would be a spike that no grid sees.
        return _WIDTH * (span if span > 1e-5 * size else size or 1.0)

    def grid(self, points: int = 512, sigma: float | None = None) -> Tensor:
        """Return ``[points]`` float64 evenly spaced values that hold all nodes with four sigma around them."""
        margin = _MARGIN * (self.width if sigma is None else sigma)
        low, high = float(self.nodes.min()) - margin, float(self.nodes.max()) + margin
        return torch.linspace(low, high, points, dtype=torch.float64)

    def plot(self, axes: Any = None, sigma: float | None = None) -> Figure:
        """Draw the density on a logarithmic axis, with a band of one standard error; needs matplotlib.

        Args:
            axes: matplotlib's, to draw into; None for a new figure.
            sigma: as for ``density``.

        Returns:
            The figure: ``density.plot().savefig("density.png")``.
        """
        if axes is None:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure

            figure = Figure(layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.subplots()
        width = self.width if sigma is None else sigma
        x = self.grid(1024, width)
        p = self.density(x, width)
        # The lowest peak worth seeing is that of one eigenvalue; a tenth of it is below everything.
        floor = 0.1 / (self.n * width * math.sqrt(2 * math.pi))
        low, high = (p.value - p.standard_error).clamp(min=floor), (p.value + p.standard_error).clamp(min=floor)
        axes.plot(x, p.value.clamp(min=floor), label=self.method)
        if bool(p.standard_error.isfinite().all()):
            axes.fill_between(x, low, high, alpha=0.3, linewidth=0, label="one standard error")
        axes.set(xlabel="eigenvalue", ylabel="density", yscale="log", ylim=(floor, None))
        axes.legend()
        return axes.figure

    def _averaged(self, values: Tensor) -> Estimate[Tensor]:
        """Average ``[g, m]`` values at the nodes by weight, and take the spread of the probes' own averages."""
        probes = int(self.probe.max()) + 1
        # Each probe's weights sum to 1 / probes: scaled back, its average is an estimate by itself.
        each = torch.zeros(len(values), probes, dtype=torch.float64)
        each.index_add_(1, self.probe, values * self.weights * probes)
        if self.exact:
            error = torch.zeros(len(values), dtype=torch.float64)
        elif probes == 1:
            error = torch.full((len(values),), math.inf, dtype=torch.float64)
        else:
            error = each.std(1) / math.sqrt(probes)
        return Estimate(each.mean(1), error, self.matvecs, self.exact, self.method)


def spectral_density(
    op: SymmetricOperator, probes: int = 8, steps: int = 64, generator: torch.Generator | None = None
) -> SpectralDensity:
    """Estimate the distribution of all eigenvalues.

    From each random vector Lanczos with full reorthogonalisation gives a Gauss quadrature: the eigenvalues of the
    tridiagonal matrix, weighted by the squares of their eigenvectors' first entries. The probes run side by side, so
    that every product is one of a block.

    Args:
        op: symmetric operator, such as ``HessianOperator``; may be indefinite.
        probes: random vectors. The standard error falls with the root of ``probes * n``.
        steps: of Lanczos, at most n: about half as many eigenvalues at the ends are resolved singly.
        generator: of the probes, on the CPU; None for seed 0.

    Returns:
        A ``SpectralDensity``. Where n is at most ``probes * steps`` (and 2048), all eigenvalues are computed
        instead, from fewer products.

    Raises:
        ValueError: probes or steps is below 1, or the operator's vectors are sharded over processes.
        RuntimeError: a product is not finite.

    Cost: probes * steps products, and per step and probe 4 steps n numbers moved on average. Memory: the bases of as
    many probes as fit into 1 GiB, and of one at least: steps n numbers each.
    Source: Ghorbani, Krishnan and Xiao, An investigation into neural net optimization via Hessian eigenvalue density
    (2019); Ubaru, Chen and Saad (2017); Golub and Welsch, Calculation of Gauss quadrature rules (1969).
    """
    check_whole(op, "the density")
    if probes < 1 or steps < 1:
        raise ValueError(f"probes and steps must be at least 1, got {probes} and {steps}.")
    if op.n <= min(probes * steps, _DENSE):
        return _exact(op)
    generator = seeded(generator)
    together = max(1, min(probes, _BASIS_BYTES // (steps * op.n * op.dtype.itemsize)))
    pairs = []
    for first in range(0, probes, together):
        # Drawn one by one, so that the numbers do not depend on how many fit into memory.
        starts = [random_rows(1, op, generator) for _ in range(first, min(first + together, probes))]
        pairs += _quadratures(op, torch.cat(starts), steps)
    probe = torch.cat([torch.full((len(nodes),), i) for i, (nodes, _) in enumerate(pairs)])
    nodes, weights = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    method = f"stochastic Lanczos quadrature: {probes} probes of {steps} steps"
    return SpectralDensity(nodes, weights / probes, probe, op.n, len(nodes), False, method)


def _exact(op: SymmetricOperator) -> SpectralDensity:
    A = torch.cat([products(op, rows) for _, rows in identity(op)]).double().cpu()
    # The products are symmetric up to rounding only; eigvalsh would read one triangle and ignore the other.
    nodes = torch.linalg.eigvalsh((A + A.t()) / 2)
    weights = torch.full_like(nodes, 1 / op.n)
    probe = torch.zeros(op.n, dtype=torch.int64)
    return SpectralDensity(nodes, weights, probe, op.n, op.n, True, f"exact: all {op.n} eigenvalues")


def _quadratures(op: SymmetricOperator, starts: Tensor, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Run Lanczos from each row, in step; return the nodes and weights of each."""
    # Lists of floats: each entry is read once, and a tensor would be waited for on a GPU all the same.
    bases = torch.empty(len(starts), steps, op.n, dtype=op.dtype, device=op.device)
    diagonals: list[list[float]] = [[] for _ in starts]
    offs: list[list[float]] = [[] for _ in starts]
    rows = starts / torch.linalg.vector_norm(starts, dim=1, keepdim=True, dtype=torch.float64).to(op.dtype)
    running = list(range(len(starts)))
    for j in range(steps):
        bases[running, j] = rows
        following = []
        for i, product in zip(running, products(op, rows), strict=True):
            alpha, beta, row = _next(bases[i, : j + 1], product[None])
            diagonals[i].append(alpha)
            scale = max(map(abs, diagonals[i] + offs[i]))
            # An invariant subspace: what is left is rounding, and its direction says nothing about the operator.
            if j + 1 < steps and beta > 10 * torch.finfo(op.dtype).eps * scale:
                offs[i].append(beta)
                following.append((i, row / beta))
        if not following:
            break
        running, rows = [i for i, _ in following], torch.cat([row for _, row in following])
    return [_gauss(*pair) for pair in zip(diagonals, offs, strict=True)]


def _next(Q: Tensor, product: Tensor) -> tuple[float, float, Tensor]:
    """Project the basis out of a product; return the diagonal entry, the length of what is left, and that."""
    alpha, before = 0.0, float(kernels.gram(product, product))
    for _ in range(2):
        cosines = kernels.gram(product, Q)
        alpha += float(cosines[0, -1])
        product = product - kernels.combine(cosines, Q)
        after = float(kernels.gram(product, product))
        # Rounding is magnified by |before| / |after|. Up to ten is far from where it would show in the tridiagonal
        # matrix, the root of the rounding unit (Simon 1984); each pass reads the whole basis twice.
        if after > 0.01 * before:
            break
    return alpha, math.sqrt(after), product


def _gauss(diagonal: list[float], off: list[float]) -> tuple[Tensor, Tensor]:
    T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    T += torch.diag(torch.tensor(off, dtype=torch.float64), 1) + torch.diag(torch.tensor(off, dtype=torch.float64), -1)
    nodes, vectors = torch.linalg.eigh(T)
    # v is the first basis vector, so first entries are the cosines between v and the Ritz vectors (Golub and Welsch).
    return nodes, vectors[0].square()
