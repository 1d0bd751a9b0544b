"""Products and solvers on a GPU: numbers against float64 on the CPU, graphs, waiting, memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from problems import PROBLEMS, Problem, double, hessian_times
from torch import Tensor

import sharpkern as sk
from sharpkern.kernels.precision import tf32_products
from sharpkern.rop.recording.cuda_graph import CUDAGraph

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(problem: Problem) -> Problem:
    """A copy in float32 on the GPU."""
    batch = torch.utils._pytree.tree_map_only(Tensor, lambda t: _narrow(t).cuda(), problem.batch)
    return Problem(copy.deepcopy(problem.model).float().cuda(), problem.loss_fn, batch)


def _narrow(t: Tensor) -> Tensor:
    return t.float() if t.dtype.is_floating_point else t


def operator(problem: Problem) -> sk.HessianOperator:
    return sk.HessianOperator(problem.model, problem.loss_fn, problem.batch)


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@pytest.mark.parametrize("name", PROBLEMS)
def test_products_follow_vectors_parameters_and_batches(name: str) -> None:
    """Each graph is captured once and replayed on what parameters, batch and vectors then hold."""
    truth = double(PROBLEMS[name]())
    mine = on_gpu(truth)
    H = operator(mine)
    for _ in range(3):
        for k in (1, 3):
            for _ in range(2):
                V = torch.randn(k, H.n, dtype=torch.float64)
                want = hessian_times(truth, V)
                got = H.matmat(V.t().float().cuda()).t().cpu()
                assert float((got - want).norm() / want.norm()) <= 1e-4
        with torch.no_grad():
            for p, q in zip(truth.model.parameters(), mine.model.parameters(), strict=True):
                p.add_(0.05 * torch.randn_like(p))
                q.copy_(p)
        truth = Problem(truth.model, truth.loss_fn, double(PROBLEMS[name]()).batch)
        batch = on_gpu(truth).batch
        H.refresh(batch)
    assert not H.fallback_ops
    assert isinstance(H._engine._recordings["hvp", 1], CUDAGraph)


@pytest.mark.parametrize("name", PROBLEMS)
def test_products_on_a_stream_of_the_callers_own(name: str) -> None:
    """The recording, its replays and what is written between them are in the order of that stream."""
    truth = double(PROBLEMS[name]())
    with torch.cuda.stream(torch.cuda.Stream()):
        mine = on_gpu(truth)
        H = operator(mine)
        for _ in range(3):
            with torch.no_grad():
                for p, q in zip(truth.model.parameters(), mine.model.parameters(), strict=True):
                    p.add_(0.05 * torch.randn_like(p))
                    q.copy_(p)
            H.refresh()
            V = torch.randn(2, H.n, dtype=torch.float64)
            got = H.matmat(V.t().float().cuda()).t().cpu()
            want = hessian_times(truth, V)
            assert float((got - want).norm() / want.norm()) <= 1e-4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_model_on_another_device_than_the_current_one(name: str) -> None:
    """Kernels and recordings go to the tensors' device; operators on two devices do not disturb each other."""
    truth = double(PROBLEMS[name]())
    operators = []
    for device in ("cuda:0", "cuda:1"):
        move = lambda t, device=device: _narrow(t).to(device)  # noqa: E731
        batch = torch.utils._pytree.tree_map_only(Tensor, move, truth.batch)
        model = copy.deepcopy(truth.model).float().to(device)
        operators.append(sk.HessianOperator(model, truth.loss_fn, batch))
    assert torch.cuda.current_device() == 0
    for _ in range(3):
        V = torch.randn(2, operators[0].n, dtype=torch.float64)
        want = hessian_times(truth, V)
        for H in operators:
            got = H.matmat(V.t().float().to(H.device)).t()
            assert got.device == H.device
            assert float((got.cpu() - want).norm() / want.norm()) <= 1e-4
    first, second = (float(sk.lanczos(H, tol=1e-4).eigenvalues[0]) for H in operators)
    assert first == pytest.approx(second, rel=1e-3)


def test_tf32_is_only_in_its_block() -> None:
    truth = double(PROBLEMS["mlp"]())
    H, V = operator(on_gpu(truth)), torch.randn(1, operator(truth).n, dtype=torch.float64)
    want, v = hessian_times(truth, V)[0], V[0].float().cuda()

    def off() -> float:
        return float((H.matvec(v).cpu() - want).norm() / want.norm())

    for _ in range(2):
        with tf32_products():
            assert 1e-5 <= off() <= 1e-2
        assert off() <= 1e-5


def waits(call: Callable[[], object]) -> int:
    """How often the host waits for the GPU in a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def test_a_product_does_not_wait() -> None:
    problem = on_gpu(PROBLEMS["gpt"]())
    H = operator(problem)
    v = torch.randn(H.n, device="cuda")
    H.matvec(v)
    assert waits(lambda: H.matvec(v)) == 0
    assert waits(lambda: v.sum().item()) == 1  # the counter counts


@pytest.mark.parametrize("solver", [sk.lanczos, sk.power_iteration])
def test_a_solve_waits_at_most_once_a_product(solver: Callable[..., sk.EigenResult]) -> None:
    H = operator(on_gpu(PROBLEMS["mlp"]()))
    solver(H, max_matvecs=20)
    matvecs = H.products
    count = waits(lambda: solver(H, max_matvecs=20))
    assert count <= H.products - matvecs + 10  # start and end wait a few times


def test_attention_needs_no_matrix_of_scores() -> None:
    T, d = 4096, 64

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        q, k, v = (x @ p[name] for name in ("q", "k", "v"))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum()

    params = {name: (torch.randn(d, d, device="cuda") / d**0.5).requires_grad_() for name in ("q", "k", "v")}
    H = sk.HessianOperator(
        None, lambda p, batch: loss(p, batch[0]), (torch.randn(1, T, d, device="cuda"),), params=params
    )
    v = torch.randn(H.n, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    H.matvec(v)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - held < T * T * 4 / 2
