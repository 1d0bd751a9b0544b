"""Random symmetric operators that solvers find hard, and what a solver's claims about one are worth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from matrices import F64, Dense
from torch import Tensor

from sharpkern.eigen import EigenResult, WarmLanczos, certify, lanczos, lobpcg, power_iteration

SPECTRA: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "uniform": lambda n, g: 2 * torch.rand(n, dtype=F64, generator=g) - 1,
    "clustered": lambda n, g: 1 - 0.03 * torch.rand(n, dtype=F64, generator=g) * (torch.arange(n) % 3),
    "negative-dominant": lambda n, g: torch.rand(n, dtype=F64, generator=g) - 10 * (torch.arange(n) % 4 == 0),
    "negative": lambda n, g: -0.1 - torch.rand(n, dtype=F64, generator=g),
    "low rank": lambda n, g: torch.randn(n, dtype=F64, generator=g) * (torch.arange(n) < 1 + n // 20),
    "zero": lambda n, g: torch.zeros(n, dtype=F64),
    "identity": lambda n, g: torch.randn(1, dtype=F64, generator=g).expand(n).clone(),
    "multiple": lambda n, g: torch.tensor([3.0, 3.0, 1.0, -1.0, -1.0], dtype=F64)[torch.arange(n) % 5],
    "wide": lambda n, g: torch.logspace(-8, 0, n, dtype=F64) * (torch.randn(n, dtype=F64, generator=g)).sign(),
    "outliers": lambda n, g: torch.where(torch.arange(n) < 3, 5.0, 0.1) * torch.randn(n, dtype=F64, generator=g),
}
STARTS = ("none", "random", "top", "bottom", "middle", "orthogonal", "denormal", "largest", "nan", "zero")
REFUSED = ("nan", "zero")  # by the solvers that take a start; WarmLanczos replaces an extra vector of no direction


@dataclass(frozen=True)
class Case:
    """One operator and one question to a solver; ``scale`` is a power of ten."""

    n: int
    dtype: torch.dtype
    spectrum: str
    frame: str
    scale: int
    start: str
    k: int
    tol: float
    max_matvecs: int
    seed: int

    def build(self) -> tuple[Dense, Tensor, Tensor | None]:
        """Return the operator, its eigenvalues in float64, descending, and the start."""
        g = torch.Generator().manual_seed(self.seed)
        n = self.n
        if self.spectrum == "bipartite":
            half = torch.rand(n // 2, n - n // 2, dtype=F64, generator=g)
            A = torch.zeros(n, n, dtype=F64)
            A[: n // 2, n // 2 :], A[n // 2 :, : n // 2] = half, half.t()
        elif self.frame == "axes":
            A = SPECTRA[self.spectrum](n, g).diag()
        else:
            Q = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=g))[0]
            A = Q * SPECTRA[self.spectrum](n, g) @ Q.t()
        A = (10.0**self.scale * (A + A.t()) / 2).to(self.dtype)
        theta, Q = torch.linalg.eigh(A.double())
        return Dense(A), theta.flip(0), self._start(Q, g)

    def _start(self, Q: Tensor, g: torch.Generator) -> Tensor | None:
        noise, finfo = torch.randn(self.n, dtype=F64, generator=g), torch.finfo(self.dtype)
        vectors = {
            "random": noise,
            "top": Q[:, -1],
            "bottom": Q[:, 0],
            "middle": Q[:, self.n // 2],
            "orthogonal": noise - Q[:, -1] * (Q[:, -1] @ noise) if self.n > 1 else noise,
            "denormal": noise.sign() * finfo.smallest_normal / 64,
            "largest": noise.sign() * finfo.max,
            "nan": torch.where(torch.arange(self.n) == 0, math.nan, noise),
            "zero": torch.zeros(self.n),
        }
        return None if self.start == "none" else vectors[self.start].to(self.dtype)


def cases(largest: int = 300, most: int = 80) -> st.SearchStrategy[Case]:
    """Sizes from 1, most of them small, where the corners are; ``most`` products."""
    return st.builds(
        Case,
        n=st.one_of(st.integers(1, 6), st.integers(1, largest // 5), st.integers(1, largest)),
        dtype=st.sampled_from([torch.float32, torch.float64]),
        spectrum=st.sampled_from([*SPECTRA, "bipartite"]),
        frame=st.sampled_from(["dense", "dense", "axes"]),
        scale=st.one_of(st.just(0), st.integers(-30, 30)),
        start=st.sampled_from(STARTS),
        k=st.integers(1, 4),
        tol=st.sampled_from([1e-1, 1e-2, 1e-3, 1e-6]),
        max_matvecs=st.integers(4, most),
        seed=st.integers(0, 2**31),
    )


def warm(op: Dense, k: int, tol: float, v0: Tensor | None, max_matvecs: int) -> EigenResult:
    """The first step of a tracked run, and a second one from its end; v0 is given as an extra vector."""
    solver = WarmLanczos(k, tol, max_matvecs)
    solver.step(op)
    return solver.step(op, None if v0 is None else v0[None])


SOLVERS: dict[str, Callable[..., EigenResult]] = {
    "lanczos": lanczos, "lobpcg": lobpcg, "power_iteration": power_iteration, "WarmLanczos": warm,
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What a result's claims are worth: every bound and every estimate covers a true eigenvalue; and whether it is
    called converged although an eigenvalue that was asked for lies above its bound."""

    covered: bool
    estimated: bool
    converged: bool
    missed: bool


def refused(name: str, case: Case) -> bool:
    return case.start in REFUSED and name != "WarmLanczos"


def judge(result: EigenResult, truth: Tensor) -> Verdict:
    theta = result.eigenvalues
    nearest = (theta[:, None] - truth).abs().min(1).values
    missed = bool((truth[: len(theta)] - theta > result.error_bounds).any())
    return Verdict(
        bool((nearest <= result.error_bounds).all()), bool((nearest <= result.gap_estimates).all()),
        result.converged, result.converged and missed,
    )  # fmt: skip


def solve(name: str, case: Case, op: Dense, start: Tensor | None) -> EigenResult:
    """Ask a solver for as many of the k eigenvalues as it can give."""
    k = min(case.k, case.n) if name != "lobpcg" else max(1, min(case.k, case.n // 3))
    return SOLVERS[name](op, k, case.tol, start, max(case.max_matvecs, k))


def bounded_above(case: Case, op: Dense, truth: Tensor) -> bool:
    """Whether the probabilistic bound holds, at a probability of failure of 1e-6."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    certificate = certify(op, min(case.max_matvecs, 40), 1e-6, generator)
    return float(truth[0]) <= certificate.upper
