"""Blocks of the pool do not overlap while they are held, and are used again once they are not."""

from __future__ import annotations

import gc
import random

import torch
from torch import Tensor, nn

import sharpkern as sk
from sharpkern.rop.recording.pool import Pool

DTYPES = [torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16]


def filled(t: Tensor, number: int) -> Tensor:
    return t.fill_(number % 2 if t.dtype == torch.bool else number)


def test_held_tensors_keep_their_values_whatever_comes_and_goes(seed: int) -> None:
    pool, choice = Pool(), random.Random(seed)
    held: list[tuple[Tensor, Tensor]] = []
    for number in range(400):
        if held and choice.random() < 0.5:
            held.pop(choice.randrange(len(held)))
        t = filled(pool.empty(choice.choice([1, 5, 100, 3000, 40000]), choice.choice(DTYPES)), number % 100)
        held.append((t.view(-1, 1) if choice.random() < 0.5 else t, t.clone()))
    for t, copy in held:
        assert torch.equal(t.flatten(), copy)


def test_a_block_is_used_again_once_no_view_of_it_is_left() -> None:
    pool = Pool()
    t = pool.empty(1 << 16, torch.float32)
    address, view = t.data_ptr(), t.view(256, 256).t()
    del t
    other = pool.empty(1 << 16, torch.float32)
    assert other.data_ptr() != address
    before = pool.nbytes
    del view
    assert pool.empty(1 << 16, torch.float32).data_ptr() == address
    assert pool.nbytes == before


def test_neighbours_that_are_free_become_one_block() -> None:
    pool = Pool()
    whole = pool.empty(1 << 18, torch.uint8)
    address = whole.data_ptr()
    del whole
    parts = [pool.empty(1 << 16, torch.uint8) for _ in range(4)]
    assert {p.data_ptr() - address for p in parts} == {0, 1 << 16, 2 << 16, 3 << 16}
    for order in ([2, 0, 1, 3], [3, 2, 1, 0], [0, 2, 3, 1]):
        for i in order:
            parts[i] = torch.empty(0)
        assert pool.empty(1 << 18, torch.uint8).data_ptr() == address
        parts = [pool.empty(1 << 16, torch.uint8) for _ in range(4)]


def test_an_alias_shares_memory_and_does_not_hold_the_block() -> None:
    pool = Pool()
    t = pool.empty(100, torch.float32).fill_(2)
    view = t[10:70].view(6, 10).t()
    alias = pool.alias(view)
    assert alias.data_ptr() == view.data_ptr()
    assert (alias.shape, alias.stride()) == (view.shape, view.stride())
    assert t in pool
    address = t.data_ptr()
    del t, view
    assert pool.empty(100, torch.float32).data_ptr() == address


def test_tensors_outlive_their_pool() -> None:
    pool = Pool()
    t = pool.empty(1 << 20, torch.float32).fill_(3)
    alias = pool.alias(t)
    del pool
    gc.collect()
    torch.empty(1 << 20).fill_(7)
    assert bool((t == 3).all())
    assert bool((alias == 3).all())


def test_what_a_product_needs_in_between_is_not_kept_for_every_layer() -> None:
    """Saved are each layer's input and cotangent; tangents live from one layer to the next."""
    depth, width, rows = 24, 32, 512
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())]
    H = sk.HessianOperator(nn.Sequential(*layers), nn.MSELoss(), (torch.randn(rows, width), torch.randn(rows, width)))
    for _ in range(2):
        H @ torch.randn(H.n)
    activation = rows * width * 4
    assert 2 * depth * activation <= H._engine._memory.nbytes <= (2 * depth + 8) * activation
