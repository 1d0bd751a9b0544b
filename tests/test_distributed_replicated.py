"""Data parallelism on 2 and 4 gloo processes: against dense matrices of the global batch, and DDP's own steps."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from problems import Problem, dense_hessian, double, loss_and_gradient, mlp
from problems import relative as error
from ranks import results
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sharpkern as sk
from sharpkern.rop.recompute import RecomputedProgram

LIMIT = 60.0


def my_part(batch: tuple[Tensor, Tensor], rank: int, world: int) -> tuple[Tensor, Tensor]:
    """Cut a batch into unequal parts: the first rank gets what the others leave."""
    x, y = batch
    size = len(x) // (world + 1)
    stops = [len(x) - (world - 1 - r) * size for r in range(world)]
    start = 0 if rank == 0 else stops[rank - 1]
    return x[start : stops[rank]], y[start : stops[rank]]


def dense_ggn(problem: Problem) -> Tensor:
    """J' (d2 loss / d output2) J by torch.func."""
    params = dict(problem.model.named_parameters())
    x, y = problem.batch

    def output(p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(problem.model, p, (x,))

    z = output(params).detach()
    J = torch.cat([j.reshape(z.numel(), -1) for j in torch.func.jacrev(output)(params).values()], 1).detach()
    H = torch.func.hessian(lambda z: problem.loss_fn(z, y))(z).reshape(z.numel(), z.numel())
    return J.T @ H @ J


def operators_agree(rank: int, world: int) -> dict[str, Any]:
    problem = double(mlp())
    x, y = problem.batch
    problem = problem._replace(batch=(torch.cat([x, x + 0.5]), torch.cat([y, y.flip(0)])))
    dense, (loss, gradient) = dense_hessian(problem), loss_and_gradient(problem)
    V = torch.randn(len(dense), 3, dtype=torch.float64)
    mine = my_part(problem.batch, rank, world)
    model = DistributedDataParallel(problem.model)
    A = sk.hessian_of(model, problem.loss_fn, mine, time_limit=LIMIT)
    G = sk.DataParallelGGN(model, problem.loss_fn, mine, time_limit=LIMIT)
    ggn = dense_ggn(problem)
    errors = {
        "loss": abs(float(A.loss) - float(loss)),
        "gradient": error(A.gradient, gradient.detach()),
        "product": error(A @ V, dense @ V),
        "form": error(A.quadratic_form(V), (V * (dense @ V)).sum(0)),
        "ggn": error(G @ V, ggn @ V),
        "dense": error(A.to_dense(), dense),
        "trace": abs(sk.trace(A, 3 * len(dense)).value / float(dense.trace()) - 1),
    }
    top = float(torch.linalg.eigvalsh(dense)[-1])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    P = sk.preconditioner(optimizer, gradients={p: g for p, g in zip(A.params.values(), _pieces(A), strict=True)})
    s = P.inv_sqrt(list(A.params.values()))
    warm, blocks = sk.eigen.WarmLanczos(tol=1e-6), sk.eigen.WarmBlockLanczos(tol=1e-6)
    values = {
        "lanczos": sk.lanczos(A, tol=1e-7).eigenvalues[0],
        "lobpcg": sk.lobpcg(A, tol=1e-6).eigenvalues[0],
        "power": sk.power_iteration(A, tol=1e-4, max_matvecs=2000).eigenvalues[0],
        "warm": warm.step(A).eigenvalues[0],
        "warm again": warm.step(A).eigenvalues[0],
        **{f"blocks, step {t}": blocks.step(A).eigenvalues[0] for t in range(9)},  # with a product of the chain
        # its seed is fresh, and another one on every process
        "certified": torch.tensor(sk.certify(A).value),
        "preconditioned": sk.lanczos(sk.PreconditionedOperator(A, P), tol=1e-7).eigenvalues[0],
    }
    tops = {**dict.fromkeys(values, top), "preconditioned": float(torch.linalg.eigvalsh(s[:, None] * dense * s)[-1])}
    # The optimizer's step goes on as ever, and the operator notices it.
    before = [p.clone() for p in A.params.values()]
    model(mine[0]).square().mean().backward()
    optimizer.step()
    moved = any(not torch.equal(p, q) for p, q in zip(before, A.params.values(), strict=True))
    stale = ""
    try:
        A @ V
    except RuntimeError as e:
        stale = str(e)
    return {
        "errors": errors,
        "values": {name: abs(float(v) / tops[name] - 1) for name, v in values.items()},
        "bits": [float(v).hex() for v in values.values()] + [float((A.gradient.double()).sum()).hex()],
        "moved": moved,
        "stale": stale,
    }


def _pieces(A: Any) -> list[Tensor]:
    return [g.view(p.shape) for g, p in zip(A.gradient.split([p.numel() for p in A.params.values()]), A.params.values(),
                                            strict=True)]  # fmt: skip


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_unequal_parts_of_a_batch_give_the_operator_of_the_whole(world: int, seed: int) -> None:
    told = results(operators_agree, world, seed)
    for own in told:
        assert max(own["errors"].values()) <= 1e-12, own["errors"]
        assert max(own["values"].values()) <= 1e-6, own["values"]
        assert own["moved"]
        assert "refresh" in own["stale"]
    assert all(own["bits"] == told[0]["bits"] for own in told), "the processes' results must be equal to the last bit"


def memory_and_parameters(rank: int, world: int) -> dict[str, Any]:
    """Trackers that differentiate pieces, compute parts again, or follow some parameters, beside DDP."""
    problem = double(mlp())
    parts = [my_part(problem.batch, r, world) for r in range(world)]
    dense = torch.stack([dense_hessian(problem._replace(batch=part)) for part in parts]).mean(0)
    model = DistributedDataParallel(problem.model)
    names = [name for name, _ in problem.model.named_parameters()][1:3]
    kept = torch.cat([torch.full((p.numel(),), name in names) for name, p in problem.model.named_parameters()])
    block = dense[kept][:, kept]
    options: dict[str, dict[str, Any]] = {
        "chunk": {"chunk": 1 + rank},
        "recompute": {"recompute": True},
        "both": {"chunk": 2, "recompute": True},
        "names": {"params": names},
        "tensors": {"params": [p for name, p in model.module.named_parameters() if name in names], "chunk": 2},
    }
    found, made = {}, {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for name, option in options.items():
        tracker = sk.SharpnessTracker(model, problem.loss_fn, optimizer, tol=1e-6, **option)
        records = [tracker.observe(parts[rank]) for _ in range(2)]
        found[name] = [r.sharpness for r in records]
        local = tracker.hessian.local
        # Values alone would be the same if an option were forgotten.
        made[name] = {
            "pieces": len(local.batch.batches) if isinstance(local, sk.ChunkedHessian) else 1,
            "recomputes": isinstance(local.engine.program, RecomputedProgram),
        }
    found["sharpness"] = [
        sk.sharpness(model, problem.loss_fn, parts[rank], tol=1e-7, params=names, recompute=True).value
    ]
    try:
        sk.SharpnessTracker(model, problem.loss_fn, optimizer, params=names).step(parts[rank])
    except ValueError as e:
        found["step"] = str(e)
    model(parts[rank][0]).sum().backward()
    stepped = sk.SharpnessTracker(model, problem.loss_fn, optimizer, chunk=2, recompute=True)
    stepped.step(parts[rank])
    mine = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    problem.loss_fn(model(parts[rank][0]), parts[rank][1]).backward()
    theirs = torch.cat([p.grad.flatten() for p in model.parameters()])
    tops = {name: float(torch.linalg.eigvalsh(block if "params" in o else dense)[-1]) for name, o in options.items()}
    # sk.sharpness weighs by examples, and a tracker by processes.
    counts = torch.tensor([len(part[1]) for part in parts], dtype=torch.float64)
    whole = (torch.stack([dense_hessian(problem._replace(batch=part)) for part in parts]) * counts[:, None, None]).sum(
        0
    )
    tops["sharpness"] = float(torch.linalg.eigvalsh((whole / counts.sum())[kept][:, kept])[-1])
    rows = len(parts[rank][1])
    wanted = {
        name: {"pieces": -(-rows // o.get("chunk", rows)), "recomputes": o.get("recompute", False)}
        for name, o in options.items()
    }
    return {"found": found, "tops": tops, "gradient": error(mine, theirs), "made": made, "wanted": wanted}


def test_a_tracker_beside_ddp_takes_chunk_recompute_and_params(seed: int) -> None:
    told = results(memory_and_parameters, 2, seed)
    assert told[0]["found"] == told[1]["found"]
    for own in told:
        assert own["gradient"] <= 1e-12
        assert own["made"] == own["wanted"]
        assert own["wanted"]["chunk"]["pieces"] > 1
        assert "observe" in own["found"].pop("step")
        for name, values in own["found"].items():
            assert values == pytest.approx([own["tops"][name]] * len(values), rel=1e-6), name


def normed() -> nn.Module:
    """Batch norm has buffers that training moves; dropout needs the training's own noise."""
    layers = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3)
    return nn.Sequential(*layers).double()


def tracker_beside_ddp(rank: int, world: int) -> dict[str, Any]:
    model = normed()
    twin = copy.deepcopy(model)
    tracked = DistributedDataParallel(model, static_graph=True)
    plain = DistributedDataParallel(twin)
    first, second = (torch.optim.AdamW(m.parameters(), lr=0.01) for m in (tracked, plain))
    beside = sk.SharpnessTracker(plain, nn.functional.cross_entropy, second, tol=1e-5)
    tracker = sk.SharpnessTracker(tracked, nn.functional.cross_entropy, first, tol=1e-5)
    worst = {"grad": 0.0, "parameter": 0.0, "buffer": 0.0, "sharpness": 0.0, "beside": 0.0, "loss": 0.0}
    bits = []
    for step in range(4):
        batch = torch.randn(4 * world, 5, dtype=torch.float64), torch.randint(0, 3, (4 * world,))
        mine = tuple(t[4 * rank : 4 * rank + 4] for t in batch)
        noise = torch.get_rng_state()  # the same on every process here, but dropout sees other rows
        second.zero_grad()
        loss = nn.functional.cross_entropy(plain(mine[0]), mine[1])
        loss.backward()
        torch.set_rng_state(noise)
        rec = tracker.step(mine)
        torch.set_rng_state(noise)
        seen = beside.observe(mine)
        grads = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (tracked, plain)]
        worst["grad"] = max(worst["grad"], error(*grads))
        own = dense_hessian(Problem(_same_noise(model, noise), nn.functional.cross_entropy, mine))
        torch.distributed.all_reduce(own)
        top = float(torch.linalg.eigvalsh(own / world)[-1])
        torch.distributed.all_reduce(loss.detach())
        worst["sharpness"] = max(worst["sharpness"], abs(rec.sharpness / top - 1))
        worst["beside"] = max(worst["beside"], abs(seen.sharpness / top - 1))
        worst["loss"] = max(worst["loss"], abs(rec.loss - float(loss.detach()) / world))
        bits.append((rec.sharpness, rec.preconditioned_sharpness, rec.ratio, rec.matvecs))
        first.step()
        second.step()
        if step == 1:  # the wrapper's own pass between two tracked ones, first of all with a static graph
            for ddp, optimizer in ((tracked, first), (plain, second)):
                torch.set_rng_state(noise)
                optimizer.zero_grad()
                nn.functional.cross_entropy(ddp(mine[0]), mine[1]).backward()
                optimizer.step()
    worst["parameter"] = max(error(p, q) for p, q in zip(tracked.parameters(), plain.parameters(), strict=True))
    if rank == 0:  # the first process's are those that DDP keeps
        worst["buffer"] = max(
            error(a.double(), b.double()) for a, b in zip(model.buffers(), twin.buffers(), strict=True)
        )
    return {"worst": worst, "bits": bits}


class _same_noise(nn.Module):  # noqa: N801  (a function in all but name)
    """Run a module with a given random state; its buffers are those of the forward pass."""

    def __init__(self, module: nn.Module, noise: Tensor) -> None:
        super().__init__()
        self.module, self.noise = module, noise

    def forward(self, x: Tensor) -> Tensor:
        with torch.random.fork_rng([]):
            torch.set_rng_state(self.noise)
            return self.module(x)


def test_tracker_beside_ddp_trains_as_ddp_does_and_measures_the_global_batch(seed: int) -> None:
    told = results(tracker_beside_ddp, 2, seed)
    for own in told:
        worst = own["worst"]
        assert max(worst["grad"], worst["parameter"], worst["buffer"], worst["loss"]) <= 1e-9, worst
        assert max(worst["sharpness"], worst["beside"]) <= 1e-6, worst
    assert told[0]["bits"] == told[1]["bits"]


def cut(batch: tuple[Tensor, Tensor], *lengths: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(t.split(list(lengths)) for t in batch), strict=True))


def weighted(problem: Problem, parts: list, weights: list[float], world: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over the processes of each one's weighted sum of losses, of gradients, and of dense Hessians."""
    total: list[Any] = [0.0, 0.0, 0.0]
    for part, weight in zip(parts, weights, strict=True):
        own = problem._replace(batch=part)
        for i, t in enumerate((*loss_and_gradient(own), dense_hessian(own))):
            total[i] = total[i] + weight * t.detach()
    for t in total:
        torch.distributed.all_reduce(t)
    return total[0] / world, total[1] / world, total[2] / world


def micro_batches_agree(rank: int, world: int) -> dict[str, Any]:
    problem = double(mlp())
    x, y = problem.batch
    whole = problem._replace(batch=(torch.cat([x, x + 0.5]), torch.cat([y, y.flip(0)])))
    mine = my_part(whole.batch, rank, world)
    lengths = (5, 4, 3) if rank == 0 else (2, 4)
    V = torch.randn(sum(p.numel() for p in problem.model.parameters()), 3, dtype=torch.float64)
    parts, weights = cut(mine, *lengths), torch.rand(len(lengths)).tolist()
    model = DistributedDataParallel(problem.model)
    options = {"weighting": "ranks", "time_limit": LIMIT}
    errors: dict[str, float] = {}

    def compare(what: str, A: Any, truth: tuple[Tensor, Tensor, Tensor]) -> None:
        loss, gradient, dense = truth
        top = float(torch.linalg.eigvalsh(dense)[-1])
        errors.update({
            f"{what}: loss": abs(float(A.loss) - float(loss)),
            f"{what}: gradient": error(A.gradient, gradient),
            f"{what}: product": error(A @ V, dense @ V),
            f"{what}: form": error(A.quadratic_form(V), (V * (dense @ V)).sum(0)),
            f"{what}: eigenvalue": abs(float(sk.lanczos(A, tol=1e-7).eigenvalues[0]) / top - 1),
        })  # fmt: skip

    A = sk.DataParallelHessian(model, problem.loss_fn, sk.MicroBatches(parts, weights), **options)
    truth = weighted(problem, parts, weights, world)
    compare("weights", A, truth)
    A.refresh(mine)
    compare("then a plain batch", A, weighted(problem, [mine], [1.0], world))
    # One process in micro-batches, the other not.
    mixed = (parts, weights) if rank == 1 else ([mine], [1.0])
    A.refresh(sk.MicroBatches(*mixed) if rank == 1 else mine)
    compare("mixed", A, weighted(problem, *mixed, world))
    shares = sk.hessian_of(model, problem.loss_fn, sk.MicroBatches(parts), time_limit=LIMIT)
    compare("shares", shares, (*(t.detach() for t in loss_and_gradient(whole)), dense_hessian(whole)))
    # Errors of one process only.
    spoilt = [(parts[0][0] * torch.inf, parts[0][1]), *parts[1:]] if rank == 1 else parts
    told = {
        "not finite": lambda: A.refresh(sk.MicroBatches(spoilt, weights)),
        "own weights": lambda: shares.refresh(sk.MicroBatches(parts, weights if rank == 1 else None)),
        "ggn": lambda: sk.DataParallelGGN(model, problem.loss_fn, sk.MicroBatches(parts), **options),
    }
    outcomes = {}
    for name, call in told.items():
        try:
            outcomes[name] = f"no error: {call()}"
        except Exception as e:
            outcomes[name] = f"{type(e).__name__}: {e}"
    A.refresh(sk.MicroBatches(parts, weights))
    compare("after an error", A, truth)
    return {"errors": errors, "outcomes": outcomes, "bits": float(A.gradient.sum()).hex()}


def test_micro_batches_give_the_operator_of_their_weighted_sum(seed: int) -> None:
    told = results(micro_batches_agree, 2, seed)
    for rank, own in enumerate(told):
        values = {k: v for k, v in own["errors"].items() if "eigenvalue" in k}
        assert len(values) == 5 and max(values.values()) <= 1e-6, values
        assert max(v for k, v in own["errors"].items() if k not in values) <= 1e-12, own["errors"]
        assert own["outcomes"]["not finite"].startswith("NonFiniteLossError")
        first = "DistributedError: rank 1 failed at 'refresh': ValueError" if rank == 0 else "ValueError"
        assert own["outcomes"]["own weights"].startswith(f"{first}: micro-batches of [")
        assert 'use weighting="ranks"' in own["outcomes"]["own weights"]
        assert own["outcomes"]["ggn"].startswith("ValueError: MicroBatches are for the Hessian")
    assert told[0]["bits"] == told[1]["bits"]


def tracker_of_micro_batches(rank: int, world: int) -> dict[str, Any]:
    model = normed()
    twin = copy.deepcopy(model)
    tracked, plain = (DistributedDataParallel(m) for m in (model, twin))
    first, second = (torch.optim.SGD(m.parameters(), lr=0.05) for m in (tracked, plain))
    tracker, beside = (
        sk.SharpnessTracker(m, nn.functional.cross_entropy, o, tol=1e-5) for m, o in ((tracked, first), (plain, second))
    )
    worst = {"grad": 0.0, "sharpness": 0.0, "loss": 0.0, "buffer": 0.0}
    bits = []
    for _ in range(3):
        batch = torch.randn(9 * world, 5, dtype=torch.float64), torch.randint(0, 3, (9 * world,))
        parts = cut(tuple(t[9 * rank : 9 * rank + 9] for t in batch), 2 + rank, 7 - rank)
        weights, states, dense, total = (torch.rand(2) + 0.1).tolist(), [], 0.0, 0.0
        second.zero_grad()
        noise = torch.get_rng_state()
        for i, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            states.append(sk.rop.sandbox.random_state())
            dense = dense + weight * dense_hessian(
                Problem(_same_noise(twin, states[-1][0]), nn.functional.cross_entropy, part)
            )
            with plain.no_sync() if i == 0 else contextlib.nullcontext():
                loss = weight * nn.functional.cross_entropy(plain(part[0]), part[1])
                loss.backward()
            total = total + loss.detach()
        micro = sk.MicroBatches(parts, weights, random_states=states)
        seen = beside.observe(micro)
        after = torch.get_rng_state()
        torch.set_rng_state(noise)
        rec = tracker.step(micro)
        torch.set_rng_state(after)
        for t in (dense, total):
            torch.distributed.all_reduce(t)
        top = float(torch.linalg.eigvalsh(dense / world)[-1])
        grads = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (tracked, plain)]
        worst["grad"] = max(worst["grad"], error(*grads))
        worst["sharpness"] = max(worst["sharpness"], abs(rec.sharpness / top - 1), abs(seen.sharpness / top - 1))
        worst["loss"] = max(worst["loss"], *(abs(r.loss - float(total) / world) for r in (rec, seen)))
        bits.append((rec.sharpness, rec.ratio, rec.matvecs, rec.batch_sharpness))
        first.step()
        second.step()
    if rank == 0:
        worst["buffer"] = max(
            error(a.double(), b.double()) for a, b in zip(model.buffers(), twin.buffers(), strict=True)
        )
    return {"worst": worst, "bits": bits}


def test_tracker_takes_micro_batches_beside_ddps_accumulation(seed: int) -> None:
    told = results(tracker_of_micro_batches, 2, seed)
    for own in told:
        worst = own["worst"]
        assert max(worst["grad"], worst["loss"], worst["buffer"]) <= 1e-9, worst
        assert worst["sharpness"] <= 1e-6, worst
    assert told[0]["bits"] == told[1]["bits"]


def program_on_one_process(rank: int, world: int) -> Any:
    from sharpkern.curvature import engines
    from sharpkern.rop import UnsupportedModelError

    def refused(*_: Any) -> Any:
        raise UnsupportedModelError("not here")

    if rank == 1:
        engines.export = refused
    problem = double(mlp())
    model = DistributedDataParallel(problem.model)
    tracker = sk.SharpnessTracker(model, problem.loss_fn, torch.optim.SGD(model.parameters(), lr=0.1), tol=1e-5)
    records = [tracker.step(my_part(problem.batch, rank, world)) for _ in range(2)]
    kind = type(tracker.hessian.local.engine).__name__
    return kind, [(r.sharpness, r.batch_sharpness) for r in records]


@pytest.mark.slow
def test_a_model_that_exports_on_one_process_only_is_measured_on_all(seed: int) -> None:
    (first, records), (second, others) = results(program_on_one_process, 2, seed)
    assert first != second == "DoubleBackward"
    assert records == others
    assert all(sharpness > 0 and along is None for sharpness, along in records)
