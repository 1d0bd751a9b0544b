"""Operators in several threads, and kernels in a forked child: what one thread, or the parent, would have got."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from problems import PROBLEMS, cast, mlp
from torch import Tensor, nn

import sharpkern as sk
from sharpkern import kernels
from sharpkern.kernels import precision
from sharpkern.kernels.cpu import native

THREADS = 8
PRODUCTS = 30  # of each thread


@pytest.fixture(autouse=True)
def _switch_often() -> Any:
    """Let threads take turns a hundred times more often than usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(before)


def at_once(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Run jobs in threads that start together."""
    barrier = threading.Barrier(len(jobs))

    def run(job: Callable[[], Any]) -> Any:
        barrier.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(run, job) for job in jobs]]


class Branching(nn.Module):
    """Does not export: double backward gives its products."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return y if float(y.detach().sum()) > -1e9 else 2 * y


class Gamma(nn.Module):
    """Has an op that goes through the fallback."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.lgamma(self.layer(x).square() + 1)


def made(kind: str) -> sk.HessianOperator | sk.GGNOperator:
    if kind in PROBLEMS:
        return sk.HessianOperator(*cast(PROBLEMS[kind](), torch.float32))
    model = {"branching": Branching, "fallback": Gamma}[kind]()
    batch = torch.randn(12, 5), torch.randint(0, 3, (12,))
    with pytest.warns() if kind == "branching" else warnings_as_errors():
        return sk.HessianOperator(model, nn.functional.cross_entropy, batch)


class warnings_as_errors:  # noqa: N801  (they are errors in these tests already)
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


KINDS = ["mlp", "gpt", "branching", "fallback"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_operator_in_eight_threads_gives_the_products_of_one(kind: str) -> None:
    H = made(kind)
    V = torch.randn(THREADS, PRODUCTS, H.n)
    serial = [[H @ v for v in rows] for rows in V]
    forms = [[H.quadratic_form(v) for v in rows[:5]] for rows in V]
    H.refresh()  # the primal sweeps again: what threads find are recordings, or none yet

    def products(rows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return [H @ v for v in rows], [H.quadratic_form(v) for v in rows[:5]]

    results = at_once([lambda rows=rows: products(rows) for rows in V])
    for (got, got_forms), want, want_forms in zip(results, serial, forms, strict=True):
        for a, b in zip([*got, *got_forms], [*want, *want_forms], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_threads_that_meet_a_new_operator_record_it_once_and_right() -> None:
    """Nobody has multiplied before: the first products, which are recorded, meet each other."""
    problem = cast(mlp(), torch.float32)
    for _ in range(3):
        H, twin = sk.HessianOperator(*problem), sk.HessianOperator(*problem)
        V = torch.randn(THREADS, H.n, 3)
        results = at_once([lambda W=W, H=H: H @ W for W in V])
        for got, W in zip(results, V, strict=True):
            torch.testing.assert_close(got, twin @ W, rtol=1e-5, atol=1e-6)


def test_refresh_between_products_gives_one_point_or_the_other() -> None:
    model, loss_fn, (x, y) = cast(mlp(), torch.float32)
    batches = [(x, y), (x.flip(1) * 2, y)]
    H = sk.HessianOperator(model, loss_fn, batches[0])
    v = torch.randn(H.n)
    wanted = [sk.HessianOperator(model, loss_fn, batch) @ v for batch in batches]

    def refresh() -> list[Tensor]:
        for i in range(PRODUCTS):
            H.refresh(batches[i % 2])
        return []

    for products in at_once([refresh, *[lambda: [H @ v for _ in range(PRODUCTS)] for _ in range(THREADS - 1)]]):
        for got in products:
            assert min(float((got - want).norm() / want.norm()) for want in wanted) <= 1e-5


def test_different_operators_side_by_side() -> None:
    """Recorded and not, of models of their own and of one and the same; two of them are made meanwhile."""
    problem = cast(mlp(), torch.float32)
    operators = [made(kind) for kind in ("mlp", "gpt", "branching", "fallback")]
    operators += [sk.HessianOperator(*problem), sk.GGNOperator(*problem)]
    work = [(H, torch.randn(PRODUCTS, H.n)) for H in operators]
    serial = [[H @ v for v in V] for H, V in work]
    late = torch.randn(PRODUCTS, operators[4].n)
    wanted = [operators[4] @ v for v in late]

    def own() -> list[Tensor]:
        H = sk.HessianOperator(*problem)  # exported while the others multiply
        return [H @ v for v in late]

    jobs: list[Callable[[], Any]] = [lambda H=H, V=V: [H @ v for v in V] for H, V in work]
    results = at_once([*jobs, own, own])
    for got, want in zip(results, [*serial, wanted, wanted], strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_new_operator_class_is_locked_by_itself() -> None:
    class Counting(sk.HessianOperator):
        inside = most = 0

        def apply_rows(self, block: Tensor) -> Tensor:
            Counting.inside += 1
            Counting.most = max(Counting.most, Counting.inside)
            time.sleep(1e-4)
            result = super().apply_rows(block)
            Counting.inside -= 1
            return result

    H = Counting(*cast(mlp(), torch.float32))
    v = torch.randn(H.n)
    at_once([lambda: [H @ v for _ in range(5)] for _ in range(THREADS)])
    assert Counting.most == 1


@pytest.mark.skipif(native.REASON is not None, reason=str(native.REASON))
def test_recorder_sees_the_calls_of_its_own_thread() -> None:
    V = torch.randn(2, 50)
    seen: list[Any] = []
    with native.recorded(lambda *call: seen.append(call)):
        at_once([lambda: kernels.gram(V, V) for _ in range(2)])
        assert not seen
        kernels.gram(V, V)
    assert len(seen) == 1


def test_tf32_blocks_of_threads_leave_the_setting_as_it_was() -> None:
    before = precision.allows_tf32()
    begun, entered, left = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with precision.tf32_products():
            begun.set()
            entered.wait()
        left.set()

    def second() -> None:
        begun.wait()
        with precision.tf32_products():
            entered.set()
            left.wait()
            assert precision.allows_tf32()

    at_once([first, second])
    assert precision.allows_tf32() == before and not precision.within_tf32_products()


@pytest.mark.skipif(native.REASON is not None, reason=str(native.REASON))
def test_other_threads_run_while_a_kernel_does() -> None:
    """Where the interpreter lock was kept, this thread would stand still during the call, but for a switch or two."""
    V = torch.randn(8, 2_000_000)
    kernels.gram(V, V)
    inside = threading.Event()
    moments: set[int] = set()

    def call() -> None:
        inside.set()
        kernels.gram(V, V)
        inside.clear()

    for _ in range(20):  # on a busy machine the other thread may get no turn
        thread = threading.Thread(target=call)
        moments.clear()
        thread.start()
        inside.wait()
        while inside.is_set():
            moments.add(time.perf_counter_ns() // 1_000_000)
        thread.join()
        if len(moments) >= 10:
            break
    assert len(moments) >= 10, f"active in {len(moments)} milliseconds of a call that takes about a hundred"


def vector_kernels(V: Tensor, W: Tensor, C: Tensor) -> list[bytes]:
    results = [kernels.gram(V, V), *kernels.power_step(V, W), kernels.combine(C, V), kernels.scale(V, W[0])]
    return [t.numpy().tobytes() for t in results]  # no op of torch, which may wait for threads of its own


def child(queue: Any, *operands: Tensor) -> None:
    queue.put((torch.get_num_threads(), vector_kernels(*operands)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.skipif(native.REASON is not None, reason=str(native.REASON))
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_kernels_in_a_forked_child_do_not_wait_for_the_parents_threads() -> None:
    """The parent has OpenMP's threads, from a kernel on two of them; the child does not."""
    operands = torch.randn(3, 20_003), torch.randn(3, 20_003), torch.randn(3, 3).double()
    threads = torch.get_num_threads()
    context = multiprocessing.get_context("fork")
    try:
        torch.set_num_threads(2)
        wanted = vector_kernels(*operands)
        found: Any = context.Queue()
        process = context.Process(target=child, args=(found, *operands), daemon=True)
        process.start()
        assert found.get(timeout=60) == (2, wanted)
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()
        torch.set_num_threads(threads)
