"""Whole Hessian-vector products whose rules call the Triton kernels, against float64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sharpkern as sk
from sharpkern.kernels.triton import embedding as triton_embedding
from sharpkern.kernels.triton import linear as triton_linear
from sharpkern.rop.recording import tape
from sharpkern.rop.recording.common import NotReplayableError
from sharpkern.rop.recording.pool import Pool

Loss = Callable[[Mapping[str, Tensor], Any], Tensor]


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARPKERN_BACKEND", "triton")


def truth(loss: Loss, params: Mapping[str, Tensor], batch: Any, block: Tensor) -> Tensor:
    """Double backward for the rows of ``[k, n]``: torch's forward mode is wrong for layer norm's weight."""
    wide = {name: p.detach().cpu().double().requires_grad_() for name, p in params.items()}
    batch = tuple(t.cpu().double() if t.dtype.is_floating_point else t.cpu() for t in batch)
    leaves = list(wide.values())
    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.autograd.grad(loss(wide, batch), leaves, create_graph=True)
        flat = torch.cat([g.reshape(-1) for g in gradient])
        products = [torch.autograd.grad(flat, leaves, v, retain_graph=True) for v in block.cpu().double()]
    return torch.stack([torch.cat([part.reshape(-1) for part in product]) for product in products])


def check(loss: Loss, params: Mapping[str, Tensor], batch: Any, device: str, frozen: Loss | None = None) -> None:
    """Compare blocks of one and three vectors; ``frozen`` is the loss as the truth should see it."""
    on_device = {name: p.to(device).requires_grad_() for name, p in params.items()}
    H = sk.HessianOperator(None, loss, tuple(t.to(device) for t in batch), params=on_device)
    assert not H.fallback_ops
    for k in (1, 3):
        block = torch.randn(k, H.n)
        want = truth(frozen or loss, params, batch, block)
        for _ in range(2):  # the second time may be a replay
            got = H.matmat(block.t().to(device)).t().cpu()
            assert float((got - want).norm() / want.norm()) <= 1e-5


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(device: str, bias: bool) -> None:
    """The first layer's input does not move, the last layer's weight does not; lead dimensions, odd sizes."""
    constant = torch.randn(3, 7)

    def loss(p: Mapping[str, Tensor], batch: Any) -> Tensor:
        h = torch.tanh(F.linear(batch[0], p["w1"], p["b1"] if bias else None))
        h = F.gelu(F.linear(h, p["w2"], p["b2"] if bias else None))
        return F.cross_entropy(F.linear(h, batch[2]).flatten(0, 1), batch[1])

    params = {"w1": torch.randn(6, 5), "w2": torch.randn(7, 6)}
    if bias:
        params |= {"b1": torch.randn(6), "b2": torch.randn(7)}
    batch = torch.randn(2, 4, 5), torch.randint(0, 3, (8,)), constant
    with mock.patch.object(triton_linear, "dual_gemm", wraps=triton_linear.dual_gemm) as kernel:
        check(loss, params, batch, device)
    assert kernel.call_count >= 2 * (3 + 4)  # tangents of three layers; backward tangents of two weights, two inputs


def test_tied_table_norm_and_attention(device: str) -> None:
    def loss(p: Mapping[str, Tensor], batch: Any) -> Tensor:
        x = F.layer_norm(F.embedding(batch[0], p["table"]), (8,), p["scale"])
        x = x + F.scaled_dot_product_attention(x, F.linear(x, p["key"]), x, is_causal=True)
        return F.cross_entropy(F.linear(x, p["table"]).flatten(0, 1), batch[1].flatten())

    tokens = torch.randint(0, 11, (2, 6))
    params = {"table": torch.randn(11, 8), "scale": torch.rand(8) + 0.5, "key": torch.randn(8, 8)}
    check(loss, params, (tokens[:, :-1], tokens[:, 1:]), device)


def test_padding_row_of_an_embedding_is_constant(device: str) -> None:
    def loss(p: Mapping[str, Tensor], batch: Any, padding: int | None = 2) -> Tensor:
        return (F.embedding(batch[0], p["table"], padding).sum(1) ** 3).sum()

    def frozen(p: Mapping[str, Tensor], batch: Any) -> Tensor:
        row = torch.arange(4)[:, None] == 2
        return loss({"table": torch.where(row, p["table"].detach(), p["table"])}, batch, None)

    calls = mock.patch.multiple(
        triton_embedding,
        embedding=mock.Mock(wraps=triton_embedding.embedding),
        embedding_backward=mock.Mock(wraps=triton_embedding.embedding_backward),
    )
    with calls:
        check(loss, {"table": torch.randn(4, 3)}, (torch.tensor([[2, 1], [2, 0], [1, 1]]),), device, frozen)
        assert triton_embedding.embedding.call_count and triton_embedding.embedding_backward.call_count


def test_interpreted_calls_are_not_recorded(device: str) -> None:
    """The interpreter writes through NumPy, which a recording of torch's calls does not see."""
    if device == "cuda":
        pytest.skip("compiled kernels are captured in a CUDA graph")
    with pytest.raises(NotReplayableError, match="interpreter"):
        tape.record(lambda: torch.zeros(1), [], [], Pool(), torch.device("cpu"))
