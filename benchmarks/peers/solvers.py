"""Ways to find the largest eigenvalue from a random start, as their users call them; one setting each to trade cost for
error. A solver takes a workload, a setting and a seed, and returns the value and the products that it spent.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor
from workloads import Workload

import sharpkern as sk
from sharpkern.eigen import lanczos, lobpcg

from . import autograd_kept, fused
from .common import Operator, Peer, math_attention

Found = tuple[float, int]
RESIDUALS = (0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 1e-4, 1e-5)  # relative residual at which to stop


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def arpack(op: Operator, tol: float, v0: Tensor, ncv: int = 8) -> tuple[float, Tensor]:
    """``scipy.sparse.linalg.eigsh``; its default basis of 20 vectors costs 20 products at the least, 8 does better."""
    linear = LinearOperator(
        (op.n, op.n), lambda v: op.matmat(torch.as_tensor(v).reshape(-1, 1))[:, 0].numpy(), dtype="float32"
    )
    try:
        values, vectors = eigsh(linear, 1, which="LA", tol=tol, v0=v0.numpy(), ncv=ncv)
    except ArpackNoConvergence as error:
        values, vectors = error.eigenvalues, error.eigenvectors
    if not len(values):
        return float("nan"), v0
    return float(values[0]), torch.as_tensor(vectors[:, 0])


class Fused:
    """sharpkern: Lanczos on its own products."""

    settings: tuple[Any, ...] = RESIDUALS

    def __init__(self, work: Workload) -> None:
        self.peer = fused.PEER(work)

    def solve(self, setting: Any, seed: int) -> Found:
        self.peer.prepare()
        result = lanczos(self.peer.operator, tol=setting, generator=_seeded(seed))
        return float(result.eigenvalues[0]), result.matvecs


class KeptLobpcg:
    """LOBPCG over a kept autograd graph, one product an iteration (sharpkern's solver, which keeps its products)."""

    settings: tuple[Any, ...] = RESIDUALS

    def __init__(self, work: Workload) -> None:
        self.peer: Peer = autograd_kept.PEER(work)

    def solve(self, setting: Any, seed: int) -> Found:
        self.peer.prepare()
        result = lobpcg(Operator(self.peer), tol=setting, generator=_seeded(seed))
        return float(result.eigenvalues[0]), result.matvecs


class KeptArpack(KeptLobpcg):
    """SciPy's ``eigsh`` over a kept autograd graph."""

    def solve(self, setting: Any, seed: int) -> Found:
        self.peer.prepare()
        op = Operator(self.peer)
        value, _ = arpack(op, setting, torch.randn(op.n, generator=_seeded(seed)))
        return value, op.products


class Curvlinops(KeptArpack):
    """curvlinops and ``eigsh``."""

    def __init__(self, work: Workload) -> None:
        from . import curvlinops_hessian

        self.peer = curvlinops_hessian.PEER(work)


class PyHessian:
    """PyHessian's power iteration, on its own graph; its setting is the change of the Rayleigh quotient."""

    settings: tuple[Any, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)

    def __init__(self, work: Workload) -> None:
        self.work = work

    def solve(self, setting: Any, seed: int) -> Found:
        value, products, _ = pyhessian(self.work, setting, seed)
        return value, products


def pyhessian(work: Workload, tol: float, seed: int) -> tuple[float, int, list[Tensor]]:
    """Value, products (its default limit of 100), and the gradients that PyHessian has on the way."""
    module: Any = import_module("pyhessian.hessian")

    torch.manual_seed(seed)
    for p in work.model.parameters():
        p.grad = None
    with math_attention():
        tool = module.hessian(work.model, work.loss_fn, data=work.batch, cuda=False)
    count = 0
    multiply = module.hessian_vector_product

    def counted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return multiply(*arguments)

    module.hessian_vector_product = counted
    try:
        values, _ = tool.eigenvalues(tol=tol)
    finally:
        module.hessian_vector_product = multiply
    gradients = [g.detach() for g in tool.gradsH]
    for p in work.model.parameters():
        p.grad = None
    return float(values[0]), count, gradients


class Eigenthings:
    """hessian-eigenthings' Lanczos, which always runs the number of steps it is given."""

    settings: tuple[Any, ...] = (3, 4, 6, 8, 12, 16, 24, 40)

    def __init__(self, work: Workload) -> None:
        from . import eigenthings_hessian

        self.peer = eigenthings_hessian.PEER(work)

    def solve(self, setting: Any, seed: int) -> Found:
        from hessian_eigenthings import lanczos as their_lanczos

        with math_attention():
            result = their_lanczos(self.peer.operator, k=1, max_iter=setting, which="LA", seed=seed)
        return float(result.eigenvalues[0]), setting


class CriticalSharpness:
    """2 over the critical learning rate of gradient descent, by forward passes; not an eigenvalue, hence no peer.

    Args:
        work: the workload.
        lr: where the search begins.
    """

    def __init__(self, work: Workload, lr: float) -> None:
        self.work, self.rule = work, torch.optim.SGD(work.model.parameters(), lr=lr)

    def solve(self, setting: Any, seed: int) -> Found:  # noqa: ARG002
        """Forward passes stand in for products."""
        found = sk.critical_learning_rate(*self.work, self.rule)
        return found.sharpness, found.forward_passes


SOLVERS: dict[str, tuple[Callable[[Workload], Any], str | None]] = {
    "sharpkern": (Fused, None),
    "PyHessian": (PyHessian, "pyhessian"),
    "curvlinops + eigsh": (Curvlinops, "curvlinops"),
    "hessian-eigenthings": (Eigenthings, "hessian_eigenthings"),
    "kept graph + eigsh": (KeptArpack, None),
    "kept graph + LOBPCG": (KeptLobpcg, None),
}


def load(work: Workload, names: list[str] | None = None) -> dict[str, Any]:
    """Build the solvers whose packages are here."""
    wanted = {name: SOLVERS[name] for name in names or SOLVERS}
    return {name: build(work) for name, (build, package) in wanted.items() if not package or find_spec(package)}
