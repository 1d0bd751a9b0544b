"""A program that computes its saved tensors again gives the products of one that keeps them, in less memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from problems import Problem, cnn, double, gpt, hessian_times, mlp, randomise
from problems import relative as error
from torch import Tensor, nn

import sharpkern as sk
from sharpkern.rop import RecomputedProgram
from sharpkern.rop.rule import Rule
from sharpkern.rop.rules import head


class Residual(nn.Module):
    """Blocks with batch norm in training mode and every kind of dropout, whose values cross several cuts."""

    def __init__(self, blocks: int = 4, width: int = 8) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(blocks))
        self.noise = nn.ModuleList([nn.Dropout(0.3), nn.AlphaDropout(0.3), nn.FeatureAlphaDropout(0.3)])

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for i, (linear, norm) in enumerate(zip(self.linears, self.norms, strict=True)):
            x = x + self.noise[i % 3](torch.tanh(norm(linear(x))))
        return x + first.detach() * x


class Attention(nn.Module):
    """Attention with dropout, and a buffer that the forward pass reads and changes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.out = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, dropout_p=0.2) + x)


class Unusual(nn.Module):
    """An op that has no rule, between others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.cumprod(torch.tanh(self.a(x)) + 2, 1).log())


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "mlp": mlp,
    "cnn": cnn,
    "gpt": gpt,
    "noise": lambda: Problem(randomise(Residual()), F.mse_loss, (torch.randn(9, 8), torch.randn(9, 8))),
    "attention": lambda: Problem(randomise(Attention()), F.mse_loss, (torch.randn(3, 5, 6), torch.randn(3, 5, 6))),
    "fallback": lambda: Problem(randomise(Unusual()), F.mse_loss, (torch.randn(6, 5), torch.randn(6, 4))),
}


def program_of(H: sk.HessianOperator) -> RecomputedProgram:
    assert isinstance(H.engine.program, RecomputedProgram)
    return H.engine.program


@pytest.mark.parametrize("kind", ["Hessian", "GGN"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_result_is_that_of_the_program_that_keeps_all(name: str, kind: str, seed: int) -> None:
    problem, cls = PROBLEMS[name](), sk.HessianOperator if kind == "Hessian" else sk.GGNOperator
    states, operators = [], []
    for recompute in (False, True):
        torch.manual_seed(seed)
        operators.append(cls(*problem, recompute=recompute))
        states.append(torch.get_rng_state())
    kept, again = operators
    assert len(program_of(again).segments) > 1
    V = torch.randn(kept.n, 3)
    for _ in range(2):  # with products first, then with the gradient first
        assert torch.equal(kept.loss, again.loss)
        for _ in range(2):  # what a sweep leaves behind plays no part in the next
            assert torch.equal(kept @ V, again @ V)
            assert torch.equal(kept.quadratic_form(V), again.quadratic_form(V))
            assert torch.equal(kept.gradient, again.gradient)
        with torch.no_grad():
            next(problem.model.parameters()).add_(0.1)
        for H in operators:
            torch.manual_seed(seed + 1)
            H.refresh()
        assert torch.equal(kept.gradient, again.gradient)
    assert torch.equal(*states)


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt"])
def test_products_are_those_of_double_backward(name: str) -> None:
    problem = double(PROBLEMS[name]())
    H = sk.HessianOperator(*problem, recompute=True)
    V = torch.randn(H.n, 2, dtype=torch.float64)
    truth = hessian_times(problem, V.t()).t()
    assert error(H @ V, truth) <= 1e-10
    assert error(H.quadratic_form(V), (V * truth).sum(0)) <= 1e-10


@pytest.mark.parametrize("name", ["noise", "attention"])
def test_products_after_training_has_moved_buffers_and_generators(name: str, seed: int) -> None:
    problem, results = PROBLEMS[name](), []
    state = {key: value.clone() for key, value in problem.model.state_dict().items()}
    v = torch.randn(sum(p.numel() for p in problem.model.parameters()))
    for recompute in (False, True):
        problem.model.load_state_dict(state)
        torch.manual_seed(seed)
        H = sk.HessianOperator(*problem, update_buffers=True, recompute=recompute)
        problem.model(problem.batch[0])  # the user's own pass: other masks, and buffers once more
        before = torch.get_rng_state()
        results.append((H @ v, H.gradient, *(b.clone() for b in problem.model.buffers())))
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused head"])
def test_segments_hold_nothing_between_products(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LARGE", 1 if fused else 1 << 40)
    H = sk.HessianOperator(*gpt(), recompute=True)
    program = program_of(H)
    rules = [step.rule for step in program.live]
    assert any(isinstance(rule, head.LinearCrossEntropy) for rule in rules) == fused
    # Rules that a rule holds save tensors of their own.
    rules += [part for rule in rules for part in vars(rule).values() if isinstance(part, Rule)]
    for _ in range(2):
        H @ torch.randn(H.n)
        H.quadratic_form(torch.randn(H.n))
        held = {name for rule in rules for name, value in vars(rule).items() if isinstance(value, Tensor)}
        assert not held and all(step.g is None for step in program.live)
        assert not any(segment.tangents for segment in program.segments)


def test_a_deep_network_is_cut_where_least_crosses() -> None:
    """Of 64 equal layers about the square root is kept; the wide middle of a block is no place for a cut."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 40), nn.Linear(40, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.gelu(self.up(x)))

    model = nn.Sequential(*(Block() for _ in range(64)))
    H = sk.HessianOperator(model, F.mse_loss, (torch.randn(32, 4), torch.randn(32, 4)), recompute=True)
    segments = program_of(H).segments
    assert 6 <= len(segments) <= 64
    assert {len(segment.reads) for segment in segments[1:]} == {1}
    shapes = {tuple(value.shape) for segment in segments[1:] for value in segment.inputs.values()}
    assert shapes == {(32, 4)}


@pytest.mark.parametrize("chunk", [None, 4])
def test_tracking_and_sharpness_are_the_same(chunk: int | None, seed: int) -> None:
    rows = []
    for recompute in (False, True):
        torch.manual_seed(seed)
        model, loss_fn, (x, y) = mlp()
        # In float64: how MKL rounds depends on where its arguments lie in memory, which is not the same in both.
        batch = x.double(), y
        optimizer = torch.optim.Adam(model.double().parameters(), lr=0.01)
        tracker = sk.SharpnessTracker(model, loss_fn, optimizer, chunk=chunk, recompute=recompute)
        rows.append([])
        for _ in range(3):
            rows[-1].append(tracker.step(batch).row())
            optimizer.step()
        top = sk.sharpness(model, loss_fn, batch, recompute=recompute, generator=torch.Generator().manual_seed(0))
        rows[-1].append({"top": top.value})
    for kept, again in zip(*rows, strict=True):
        assert kept.keys() == again.keys()
        for name, value in kept.items():
            if isinstance(value, str | None):
                assert again[name] == value
            else:  # the errors are differences of nearly equal numbers, in which rounding shows first
                assert again[name] == pytest.approx(value, rel=1e-6 if "error" in name else 1e-11), name
