"""Parameters under fully_shard on 2 and 4 gloo processes: against dense matrices, FSDP's own steps, counted bytes."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from problems import Problem, TinyGPT, dense_hessian, double, loss_and_gradient, mlp, randomise
from problems import relative as error
from ranks import results
from test_distributed_replicated import dense_ggn, my_part
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sharpkern as sk

LIMIT = 60.0


def shard(model: nn.Module, units: list[nn.Module], world: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (world,))
    for unit in units:
        fully_shard(unit, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def part_of(whole: Tensor, params: dict[str, Any], rank: int, world: int) -> Tensor:
    """Cut this rank's part out of whole vectors ``[..., n]``, by torch.chunk."""
    pieces, start = [], 0
    for p in params.values():
        piece = whole[..., start : start + p.numel()].unflatten(-1, p.shape)
        chunks = piece.chunk(world, dim=whole.ndim - 1)
        if rank < len(chunks):
            pieces.append(chunks[rank].flatten(whole.ndim - 1))
        start += p.numel()
    return torch.cat(pieces, -1) if pieces else whole[..., :0]


def small_gpt() -> Problem:
    """A tied head outside of the blocks, attention, an embedding, and dimensions that 2 and 4 do not divide."""
    tokens = torch.randint(0, 5, (5, 5))
    model = randomise(TinyGPT(vocabulary=5, d=4, heads=2, blocks=1, context=4))

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return Problem(model, loss, (tokens[:, :-1], tokens[:, 1:]))


def operators_agree(rank: int, world: int) -> dict[str, Any]:
    errors: dict[str, float] = {}
    values: dict[str, float] = {}
    bits: list[str] = []
    for name, problem in (("mlp", double(mlp())), ("gpt", double(small_gpt()))):
        model = problem.model
        dense, (loss, gradient) = dense_hessian(problem), loss_and_gradient(problem)
        ggn = dense_ggn(problem) if name == "mlp" else None
        V = torch.randn(2, len(dense), dtype=torch.float64)
        units = [m for m in model if list(m.parameters())] if name == "mlp" else list(model.blocks)
        shard(model, units, world)
        mine = my_part(problem.batch, rank, world)
        A = sk.hessian_of(model, problem.loss_fn, mine, time_limit=LIMIT)

        def compare(what: str, got: Tensor, want: Tensor, name: str = name, A: Any = A) -> None:
            part = part_of(want, A.params, rank, world)
            errors[f"{name} {what}"] = float((got - part).abs().max() / want.abs().max()) if part.numel() else 0.0

        v = part_of(V, A.params, rank, world)
        errors[f"{name} loss"] = abs(float(A.loss) - float(loss))
        compare("gradient", A.gradient, gradient.detach())
        compare("product", (A @ v.t().contiguous()).t(), V @ dense)
        errors[f"{name} form"] = error(A.quadratic_form(v.t().contiguous()), (V @ dense * V).sum(1))
        if ggn is not None:
            G = sk.ShardedGGN(model, problem.loss_fn, mine, time_limit=LIMIT)
            compare("ggn", (G @ v.t().contiguous()).t(), V @ ggn)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        whole = (sk.trace, sk.diagonal, sk.spectral_density, sk.layer_sharpness, type(A).to_dense, type(A).to_scipy)
        for function, *more in (*((f,) for f in whole), (sk.generalised_sharpness, optimizer),
                                (sk.update_curvature, optimizer, {})):  # fmt: skip
            with pytest.raises(ValueError, match="whole vectors"):
                function(A, *more)
        spectrum = torch.linalg.eigvalsh(dense)
        top = float(spectrum[-1])
        found = {"lanczos": sk.lanczos(A, tol=1e-7)}
        if name == "mlp" and world == 2:
            warm = sk.eigen.WarmLanczos(tol=1e-7)
            found |= {"warm": warm.step(A), "warm again": warm.step(A), "lobpcg": sk.lobpcg(A, tol=1e-7)}
            blocks = sk.eigen.WarmBlockLanczos(tol=1e-7)
            found |= {f"blocks, step {t}": blocks.step(A) for t in range(9)}  # with a product of the chain
            # Too few products for the value, so it is held to its own bound: an eigenvalue lies within.
            power = sk.power_iteration(A, k=2, tol=1e-3, max_matvecs=20)
            gap = float((spectrum - float(power.eigenvalues[0])).abs().min())
            values["power outside of its bound"] = max(0.0, gap / float(power.error_bounds[0]) - 1)
            bits += [float(x).hex() for x in power.eigenvalues]
            certificate = sk.certify(A, matvecs=25)
            values["certified"] = abs(certificate.value / top - 1)
        for solver, r in found.items():
            values[f"{name} {solver}"] = abs(float(r.eigenvalues[0]) / top - 1)
            bits += [float(x).hex() for x in r.eigenvalues]
            squares = r.eigenvectors[0].square().sum()
            torch.distributed.all_reduce(squares)
            errors[f"{name} {solver} unit"] = abs(float(squares) - 1)
    return {"errors": errors, "values": values, "bits": bits}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_uneven_shards_give_the_operator_of_one_process(world: int, seed: int) -> None:
    told = results(operators_agree, world, seed)
    for own in told:
        assert max(own["errors"].values()) <= 1e-12, own["errors"]
        assert max(own["values"].values()) <= 1e-6, own["values"]
    assert all(own["bits"] == told[0]["bits"] for own in told), "eigenvalues must be equal to the last bit"


class Net(nn.Module):
    """Units with noise and buffers, a frozen layer, keyword arguments, a weight read from outside of its module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.3))
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.attention = nn.MultiheadAttention(7, 1, batch_first=True)
        self.last = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x) + torch.tanh(self.frozen(self.first(x)))
        h = h + self.attention(h[:, None], key=h[:, None], value=h[:, None], need_weights=False)[0][:, 0]
        return nn.functional.linear(h, self.last.weight) + self.last.bias.tanh()


def tracker_under_fully_shard(rank: int, world: int) -> dict[str, Any]:
    torch.manual_seed(1 + int(torch.randint(0, 10**6, ())))
    model = Net().double()
    whole, twin = copy.deepcopy(model), copy.deepcopy(model)
    for m in (model, twin):
        shard(m, [m.first, m.attention], world)
    # The gradient of the keys' bias is rounding alone. With the default eps Adam would make steps of it.
    eps = 1e-5
    first, second = (torch.optim.AdamW(m.parameters(), lr=0.01, eps=eps) for m in (model, twin))
    tracker = sk.SharpnessTracker(model, nn.functional.cross_entropy, first, tol=1e-6)
    beside = sk.SharpnessTracker(twin, nn.functional.cross_entropy, second, tol=1e-6)
    worst = dict.fromkeys(("grad", "parameter", "buffer", "sharpness", "adapted", "beside", "loss", "norm"), 0.0)
    bits = []

    def note(what: str, value: float) -> None:
        worst[what] = max(worst[what], value)

    for _ in range(3):
        batch = torch.randn(4 * world, 5, dtype=torch.float64), torch.randint(0, 3, (4 * world,))
        mine = tuple(t[4 * rank : 4 * rank + 4] for t in batch)
        # The truth: a whole copy on every process, whose losses are averaged.
        whole.load_state_dict({k: getattr(t, "full_tensor", lambda t=t: t)() for k, t in model.state_dict().items()})
        noise = torch.get_rng_state()
        own = dense_hessian(Problem(whole, nn.functional.cross_entropy, mine))
        torch.set_rng_state(noise)
        rec = tracker.step(mine)
        torch.set_rng_state(noise)
        second.zero_grad()
        loss = nn.functional.cross_entropy(twin(mine[0]), mine[1])
        loss.backward()
        torch.set_rng_state(noise)
        seen = beside.observe(mine)
        torch.distributed.all_reduce(own)
        torch.distributed.all_reduce(loss.detach())
        grads = [
            torch.cat([p.grad.full_tensor().flatten() for p in m.parameters() if p.requires_grad])
            for m in (model, twin)
        ]
        note("grad", error(*grads))
        note("norm", abs(rec.grad_norm / float(grads[1].norm()) - 1))
        note("loss", abs(rec.loss - float(loss.detach()) / world))
        top = float(torch.linalg.eigvalsh(own / world)[-1])
        note("sharpness", abs(rec.sharpness / top - 1))
        note("beside", abs(seen.sharpness / top - 1))
        first.step()
        second.step()
        # P of the step just taken, from sharded state: this segfaulted.
        params = [p for p in model.parameters() if p.requires_grad]
        v = torch.cat([first.state[p]["exp_avg_sq"].full_tensor().flatten() for p in params])
        t = float(first.state[params[0]]["step"])
        s = ((1 - 0.9**t) * ((v / (1 - 0.999**t)).sqrt() + eps)) ** -0.5
        mine_of_s = part_of(s, {str(i): p for i, p in enumerate(params)}, rank, world)
        note("adapted", error(sk.preconditioner(first).inv_sqrt(params), mine_of_s))
        top = float(torch.linalg.eigvalsh(s[:, None] * own / world * s)[-1])
        note("adapted", abs(rec.preconditioned_sharpness / top - 1))
        bits.append((rec.sharpness.hex(), rec.preconditioned_sharpness.hex(), rec.ratio, rec.matvecs, rec.grad_norm))
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    note("parameter", max(error(p.full_tensor(), q.full_tensor()) for p, q in pairs))
    note("buffer", max(error(a.double(), b.double()) for a, b in zip(model.buffers(), twin.buffers(), strict=True)))
    stale = ""
    try:
        tracker.hessian.apply_rows(torch.zeros(1, tracker.hessian.n, dtype=torch.float64))
    except RuntimeError as e:
        stale = str(e)
    return {"worst": worst, "bits": bits, "stale": stale}


def test_tracker_trains_as_fully_shard_does_and_measures_the_global_batch(seed: int) -> None:
    told = results(tracker_under_fully_shard, 2, seed)
    for own in told:
        worst = own["worst"]
        exact = ("grad", "parameter", "buffer", "loss", "norm")
        assert max(worst[name] for name in exact) <= 1e-9, worst
        assert max(worst[name] for name in ("sharpness", "adapted", "beside")) <= 1e-6, worst
        assert "refresh" in own["stale"]
    assert told[0]["bits"] == told[1]["bits"]


class _Bytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, by looking at the results of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def hold(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        if storage._cdata in self.live:
            return
        self.live[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if type(t) is Tensor:
                self.hold(t)
        return out


def peak_of_a_solve(rank: int, world: int) -> list[float]:
    """Return the peak of all live bytes in a solve, in units of the model's, and those of the parameters alone."""
    layers = [nn.Linear(64, 64) for _ in range(12)]
    model = nn.Sequential(*[m for layer in layers for m in (layer, nn.Tanh())])
    size = sum(p.numel() * 4 for p in model.parameters())
    shard(model, layers, world)
    batch = torch.randn(1, 64), torch.randn(1, 64)  # one example: activations are a hundredth of a layer's weights
    gc.collect()
    counted = _Bytes()
    for p in model.parameters():
        counted.hold(p._local_tensor)
    own = counted.now
    with counted:
        A = sk.ShardedHessian(model, nn.functional.mse_loss, batch, time_limit=LIMIT)
        sk.lanczos(A, tol=1e-9, max_matvecs=5, max_basis=5)
    return [own / size, counted.peak / size]


@pytest.mark.slow
def test_memory_of_parameters_and_vectors_falls_with_the_processes(seed: int) -> None:
    (alone,), four = results(peak_of_a_solve, 1, seed), results(peak_of_a_solve, 4, seed)
    print("peak of one process:", alone, "of four:", four)
    # 5 vectors, their products, and what a solver keeps besides
    assert alone[0] == 1.0
    assert alone[1] >= 1 + 10, "the count must see parameters, basis and products"
    assert max(own[1] for own in four) <= 0.35 * alone[1]
