"""Training runs with the true top eigenvalues at every step, kept outside the repository, to replay solvers on.

A run stores parameters, batches and preconditioners of every step; the truth is a float64 Lanczos at those
parameters. A replay feeds every solver the same float32 operator, so solvers differ in nothing but what they
do with it. Tuning seeds and held-out seeds differ in data, weights and batches.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

import sharpkern as sk
from sharpkern.curvature.operators import HessianOperator
from sharpkern.curvature.parameters import gradients_of
from sharpkern.curvature.preconditioned import PreconditionedOperator
from sharpkern.eigen import SymmetricOperator, lanczos
from sharpkern.optimizers.preconditioner import Preconditioner
from sharpkern.tracking.popups import PopUps
from sharpkern.train.models import FCN

TUNING_SEEDS, HELD_OUT_SEEDS = (0,), (101, 102)
EXAMPLES = 400
TOP = 2  # eigenvalues stored per step


@dataclass(frozen=True)
class Spec:
    """What to train. ``lr`` is in units of 1 / initial sharpness, for Adam absolute."""

    name: str
    optimizer: str
    loss: str
    activation: str
    parameterisation: str
    lr: float
    warmup: int
    batch: int | None = None
    full_hessian: bool = False  # of all examples, though the step uses a mini-batch
    zero_readout: bool = False
    teacher: bool = False  # Gaussian inputs and a random network's outputs, instead of digits
    steps: int = 300
    width: int = 24
    depth: int = 4
    seed: int = 0


SPECS = (
    Spec("GD MSE ReLU sp", "sgd", "mse", "relu", "sp", 24.0, 120),
    Spec("GD MSE tanh mup", "sgd", "mse", "tanh", "mup", 4.0, 150),
    Spec("GD MSE GELU zero readout", "sgd", "mse", "gelu", "sp", 12.0, 80, zero_readout=True),
    Spec("GD MSE tanh sp, no warmup", "sgd", "mse", "tanh", "sp", 1.9, 1),
    Spec("GD MSE GELU sp, teacher", "sgd", "mse", "gelu", "sp", 12.0, 150, teacher=True),
    Spec("GD CE tanh sp", "sgd", "ce", "tanh", "sp", 16.0, 100),
    Spec("GD CE GELU mup", "sgd", "ce", "gelu", "mup", 1.0, 100),
    Spec("SGD 64 MSE ReLU sp", "sgd", "mse", "relu", "sp", 20.0, 100, batch=64),
    Spec("SGD 64 CE tanh mup", "sgd", "ce", "tanh", "mup", 1.5, 100, batch=64),
    Spec("SGD 64 MSE GELU sp, full H", "sgd", "mse", "gelu", "sp", 30.0, 100, batch=64, full_hessian=True),
    Spec("momentum MSE tanh sp", "momentum", "mse", "tanh", "sp", 12.0, 120),
    Spec("momentum 64 CE ReLU sp", "momentum", "ce", "relu", "sp", 3.0, 80, batch=64),
    Spec("Adam MSE tanh zero readout", "adam", "mse", "tanh", "sp", 0.01, 100, zero_readout=True),
    Spec("Adam CE GELU sp", "adam", "ce", "gelu", "sp", 0.03, 80),
    Spec("Adam 64 CE ReLU mup", "adam", "ce", "relu", "mup", 0.04, 80, batch=64),
    Spec("Adam 64 MSE GELU sp", "adam", "mse", "gelu", "sp", 0.02, 80, batch=64),
)

# Kinds of runs that no rule or constant was chosen on, with any seed.
UNSEEN_SPECS = (
    Spec("GD MSE tanh sp, catapult", "sgd", "mse", "tanh", "sp", 3.4, 1, steps=100, width=48),
    Spec("GD MSE ReLU zero readout, deep", "sgd", "mse", "relu", "sp", 20.0, 60, steps=150, depth=6, zero_readout=True),
    Spec("SGD 64 CE ReLU sp, no warmup", "sgd", "ce", "relu", "sp", 2.5, 1, batch=64, steps=120, width=48),
    Spec("momentum MSE GELU mup", "momentum", "mse", "gelu", "mup", 3.0, 60, steps=120, width=64),
    Spec("Adam CE ReLU wide, no warmup", "adam", "ce", "relu", "sp", 0.003, 1, steps=100, width=128),
    Spec("Adam 32 CE ReLU wide", "adam", "ce", "relu", "sp", 0.005, 30, batch=32, steps=100, width=96),
    Spec("Adam MSE tanh wide", "adam", "mse", "tanh", "sp", 0.004, 20, steps=100, width=96, depth=3),
)
UNSEEN_SEEDS = (201,)


@dataclass
class Trajectory:
    """A stored run: rows are steps, everything before the update."""

    spec: Spec
    params: list[Tensor] = field(default_factory=list)  # [n] float32
    batches: list[Tensor | None] = field(default_factory=list)  # indices of examples; None for all
    lr: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    momentum: list[Tensor] = field(default_factory=list)  # [n], zeros before the first step
    inv_sqrt: list[Tensor] = field(default_factory=list)  # P^-1/2, [n]; empty but for Adam
    truth: dict[str, list[Tensor]] = field(default_factory=dict)  # series -> [TOP] float64, descending


@dataclass
class Moment:
    """One step of one series as a solver sees it."""

    step: int
    operator: SymmetricOperator
    probes: dict[str, Tensor]  # [n], in the operator's coordinates: gradient, update, momentum
    hint: Tensor | None  # [1, n] of the pop-up guard, with a preconditioner
    truth: Tensor  # [TOP]


def problem(spec: Spec, dtype: torch.dtype) -> tuple[FCN, Any, Tensor, Tensor]:
    """Model, loss, inputs, targets."""
    generator = torch.Generator().manual_seed(spec.seed + 1)
    if spec.teacher:
        x = torch.randn(EXAMPLES, 64, generator=generator)
        goal = FCN(64, 10, depth=2, width=16, activation="tanh", seed=spec.seed + 7)
        with torch.no_grad():
            y = goal(x)
    else:
        images, labels = load_digits(return_X_y=True)
        chosen = torch.randperm(len(images), generator=generator)[:EXAMPLES].numpy()
        x = torch.tensor(images[chosen], dtype=torch.float32)
        x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
        y = torch.tensor(labels[chosen])
        y = F.one_hot(y, 10).float() if spec.loss == "mse" else y
    model = FCN(
        64, 10, depth=spec.depth, width=spec.width, activation=spec.activation,
        parameterisation=spec.parameterisation, zero_readout=spec.zero_readout, seed=spec.seed,
    )  # fmt: skip
    loss = F.mse_loss if spec.loss == "mse" else F.cross_entropy
    return model.to(dtype), loss, x.to(dtype), y.to(dtype) if y.is_floating_point() else y


def _set(model: FCN, flat: Tensor) -> None:
    with torch.no_grad():
        for p, part in zip(model.parameters(), sk.unflatten(flat, model).values(), strict=True):
            p.copy_(part)


def _truth(op: SymmetricOperator, before: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Top eigenvalues, from the last step's vectors and two new random ones."""
    random = torch.randn(2, op.n, dtype=op.dtype, generator=generator)
    start = random if before is None else torch.cat([before, random])
    result = lanczos(op, 2, tol=1e-5, v0=start, max_matvecs=1500, generator=generator, max_basis=120)
    assert result.converged, result.reason  # residual 1e-5: eigenvalue error near 1e-10 / relative gap
    return result.eigenvalues, result.eigenvectors


def train(spec: Spec) -> Trajectory:
    """Run and measure."""
    model, loss_fn, x, y = problem(spec, torch.float32)
    exact, _, x64, y64 = problem(spec, torch.float64)
    generator = torch.Generator().manual_seed(spec.seed + 2)
    result = Trajectory(spec)
    hessian, reference = HessianOperator(model, loss_fn, (x, y)), HessianOperator(exact, loss_fn, (x64, y64))
    if spec.optimizer == "adam":
        target = spec.lr
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=spec.lr)
    else:
        target = spec.lr / float(_truth(reference, None, generator)[0][0])
        momentum = 0.9 if spec.optimizer == "momentum" else 0.0
        optimizer = torch.optim.SGD(model.parameters(), lr=target, momentum=momentum)
    vectors: dict[str, Tensor | None] = {"H": None, "P": None}
    for t in range(spec.steps):
        for group in optimizer.param_groups:
            group["lr"] = target * min(1.0, (t + 1) / spec.warmup)
        flat = sk.flatten([p.detach() for p in model.parameters()])
        chosen = None if spec.batch is None else torch.randperm(EXAMPLES, generator=generator)[: spec.batch]
        part = slice(None) if chosen is None else chosen
        measured = slice(None) if spec.full_hessian else part
        _set(exact, flat.double())
        try:
            hessian.refresh((x[part], y[part]))
        except sk.NonFiniteLossError:  # diverged: the run ends here
            break
        reference.refresh((x64[measured], y64[measured]))
        gradients = gradients_of(hessian)
        operators: dict[str, SymmetricOperator] = {"H": reference}
        if spec.optimizer == "adam":
            P = sk.preconditioner(optimizer, gradients=gradients)
            s = P.inv_sqrt(list(model.parameters()))
            result.inv_sqrt.append(s)
            operators["P"] = PreconditionedOperator(reference, _diagonal(reference, s))
        for name, operator in operators.items():
            values, vectors[name] = _truth(operator, vectors[name], generator)
            result.truth.setdefault(name, []).append(values)
        states = [optimizer.state.get(p, {}) for p in model.parameters()]
        held = [s.get("exp_avg", s.get("momentum_buffer")) for s in states]
        result.params.append(flat)
        result.batches.append(chosen)
        result.lr.append(optimizer.param_groups[0]["lr"])
        result.loss.append(float(hessian.loss))
        result.momentum.append(sk.flatten(held).clone() if held[0] is not None else torch.zeros_like(flat))
        for p in model.parameters():
            p.grad = gradients[p]
        optimizer.step()
    return result


def _diagonal(operator: HessianOperator, inv_sqrt: Tensor) -> Preconditioner:
    """A stored P^-1/2 as a preconditioner of the operator's parameters."""
    params = list(operator.params.values())
    parts = inv_sqrt.to(operator.dtype).split([p.numel() for p in params])
    return Preconditioner(params, dict(zip(params, parts, strict=True)))


def load(spec: Spec) -> Trajectory:
    """Read a run from the cache, or train it. The cache is a folder of the temporary directory."""
    key = sha256(f"{sorted(asdict(spec).items())}{EXAMPLES}".encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / "sharpkern-tracking" / f"{key}.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        return Trajectory(spec, **state)
    result = train(spec)
    path.parent.mkdir(exist_ok=True)
    state = {name: value for name, value in vars(result).items() if name != "spec"}
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)
    return result


def runs(seeds: tuple[int, ...], specs: tuple[Spec, ...] = SPECS) -> list[Trajectory]:
    """All runs of some seeds."""
    return [load(replace(spec, seed=seed)) for seed in seeds for spec in specs]


def replay(run: Trajectory, series: str = "H") -> Iterator[Moment]:
    """Walk through a run; the operator is the same object at every step, refreshed.

    Args:
        run: a stored run.
        series: "H", or "P" for the preconditioned Hessian of an Adam run.
    """
    model, loss_fn, x, y = problem(run.spec, torch.float32)
    hessian = HessianOperator(model, loss_fn, (x, y))
    last, popups = run.params[0], PopUps()
    for t, flat in enumerate(run.params):
        _set(model, flat)
        chosen = slice(None) if run.spec.full_hessian or run.batches[t] is None else run.batches[t]
        hessian.refresh((x[chosen], y[chosen]))
        probes = {"gradient": hessian.gradient, "update": flat - last, "momentum": run.momentum[t]}
        last = flat
        operator: SymmetricOperator = hessian
        hint = None
        if series == "P":
            s = run.inv_sqrt[t]
            operator = PreconditionedOperator(hessian, _diagonal(hessian, s))
            hint = popups.look(operator, hessian.gradient)
            probes = {name: v / s if name == "update" else v * s for name, v in probes.items()}
        yield Moment(t, operator, probes, hint, run.truth[series][t])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for held_out, seeds in ((False, TUNING_SEEDS), (True, HELD_OUT_SEEDS)):
        for run in runs(seeds):
            for series, values in run.truth.items():
                top = torch.stack(values)
                kappa = {"sgd": 2.0, "momentum": 3.8, "adam": 38.0}[run.spec.optimizer]
                ratio = torch.tensor(run.lr) * top[:, 0] / kappa
                gap = (1 - top[:, 1] / top[:, 0]).median()
                print(
                    f"{'held out' if held_out else 'tuning':8} {run.spec.name:28} {run.spec.seed:4} {series} "
                    f"loss {run.loss[0]:8.2e} -> {run.loss[-1]:8.2e}  sharpness {top[0, 0]:8.2e} -> {top[-1, 0]:8.2e}  "
                    f"max ratio {ratio.max():5.2f}  above edge {(ratio > 1).float().mean():4.0%}  median gap {gap:5.1%}"
                )
