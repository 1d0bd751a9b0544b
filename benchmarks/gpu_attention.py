"""A GPU's figures of attention: its product against autograd twice, and over lengths up to 131,072."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from bench_attention import by_rule, recomputed
from gpu_timing import Row, error_of, row, seconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpkern.rop.rules.attention import Attention, Blocked

# Whole products of causal attention, 12 heads of 64, bfloat16, in ms on one H200: flash-hog with ThunderKittens
# kernels, csrc/tk_bwdbwd/BENCHMARKS.md of its fork kesavanramakrishnan/flash-hog at 751e3c0.
PUBLISHED = {1024: 0.28, 8192: 5.56, 131072: 1144.0}
HEADS, WIDTH = 12, 64
ROWS = 1024  # queries that are compared at a time, for scores in float64 are large
SAMPLED = 64  # queries and keys that are compared where all take too long


def _peak(call: Callable[[], object], device: torch.device) -> float:
    """Return the MiB that a call holds beyond what is held before it."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - held) / 2**20


def attention(device: torch.device, full: bool) -> Iterator[Row]:
    """Product of causal attention, in blocks, against the math path through autograd twice."""
    T, heads, width = (4096, 8, 64) if full else (48, 2, 16)
    six = torch.randn(6, heads, T, width, device=device).unbind()
    point, tangents = six[:3], six[3:]
    peaks = {}
    products = {}
    way = Blocked(width**-0.5)
    for name, make in {
        "blocked": lambda: by_rule(way, way.forward(*point, None, True), tangents),
        "autograd twice": lambda: recomputed(point, tangents),
    }.items():
        products[name] = make()
        products[name]()  # compiles
        if device.type == "cuda":
            peaks[name] = _peak(products[name], device)
    times = seconds(products, device, full)
    wide = recomputed(tuple(t.cpu().double()[:1] for t in point), tuple(t.cpu().double()[:1] for t in tangents))()
    got = products["blocked"]()
    error = max(error_of(a[:, :1].reshape(b.shape).cpu(), b) for a, b in zip(got, wide, strict=True))
    value = min(times["autograd twice"]) / min(times["blocked"])
    scores = heads * T * T * 4 / 2**20
    met = value >= 5 and peaks.get("blocked", 0.0) < scores / 2
    goal = ">= 5x faster than the math path twice, peak below half of the scores"
    yield row(f"attention HVP, T = {T}, {heads} heads", goal, value, met, error, 1e-3, times) | {
        "peak_MiB": peaks,
        "scores_MiB": scores,
    }


@dataclass
class Problem:
    """Attention of one sequence, and half the sum of squares of its result as the loss."""

    point: tuple[Tensor, Tensor, Tensor]  # q [heads, T, d], k and v [heads of keys, T, d]
    tangents: tuple[Tensor, Tensor, Tensor]
    mask: Tensor | None = None  # [T or 1, T]
    causal: bool = False
    sampled: bool = False  # compare the parts of the last queries and keys alone

    @property
    def queries(self) -> int:
        return self.point[0].shape[-2]

    def rule(self) -> Attention:
        return Attention(torch.ops.aten.scaled_dot_product_attention.default, (True, True, True))

    def forward(self, rule: Attention) -> Tensor:
        """Run the forward and the reverse sweep; return the cotangent of the result, ``[1, heads, T, d]``."""
        o = rule.forward(*self.point, self.mask, 0.0, self.causal, None, len(self.point[1]) < len(self.point[0]))
        g = o[None]
        rule.backward(g)
        rule.prepare(g)
        return g

    def product(self, rule: Attention, g: Tensor, tangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run the two tangent sweeps: the parts of the product that belong to q, k and v."""
        found = rule.backward_tangent(rule.tangent(*(d[None] for d in tangents)), g)
        return tuple(t[0] for t in found if t is not None)

    def whole(self) -> tuple[Tensor, ...]:
        rule = self.rule()
        return self.product(rule, self.forward(rule), self.tangents)

    def error(self) -> float:
        """Compare a product with float64: all of it, or what ``sampled`` says."""
        T = self.queries
        got = self.whole()
        if not self.sampled:
            chunks = [self._truth(rows) for rows in torch.arange(T).split(ROWS)]
            want = [torch.cat([c[0] for c in chunks], 1), *(sum(c[i] for c in chunks) for i in (1, 2))]
            return max(error_of(a, b) for a, b in zip(got, want, strict=True))
        assert self.causal  # or earlier queries see the last keys too
        last = slice(T - SAMPLED, T)
        parts = zip(got, self._truth(torch.arange(T)[last]), strict=True)
        return max(error_of(a[:, last], b[:, -SAMPLED:]) for a, b in parts)

    def _truth(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Double backward in float64 through torch's own attention, of these queries' part of the loss."""
        device = self.point[0].device
        rows = rows.to(device)
        added = torch.zeros(len(rows), self.queries, dtype=torch.float64, device=device)
        if self.mask is not None:
            mask = self.mask if len(self.mask) == 1 else self.mask[rows]
            added += torch.zeros_like(added).masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else mask
        if self.causal:
            added.masked_fill_(torch.arange(self.queries, device=device) > rows[:, None], -torch.inf)
        groups = len(self.point[0]) // len(self.point[1])
        parts: list[tuple[Tensor, ...]] = []
        for head in range(len(self.point[1])):  # one at a time: scores in float64 are large
            mine = slice(head * groups, (head + 1) * groups), slice(head, head + 1), slice(head, head + 1)
            q, k, v = (t[s].double() for t, s in zip(self.point, mine, strict=True))
            dq, dk, dv = (t[s].double() for t, s in zip(self.tangents, mine, strict=True))
            leaves = [t.requires_grad_() for t in (q[:, rows], k, v)]
            with sdpa_kernel(SDPBackend.MATH):
                keys = (t.expand(groups, -1, -1) for t in leaves[1:])
                o = torch.nn.functional.scaled_dot_product_attention(leaves[0], *keys, attn_mask=added)
                grads = torch.autograd.grad(0.5 * o.square().sum(), leaves, create_graph=True)
                parts.append(torch.autograd.grad(grads, leaves, (dq[:, rows], dk, dv)))
        return tuple(torch.cat(heads) for heads in zip(*parts, strict=True))


def _problem(T: int, device: torch.device, *, of_keys: int = HEADS, causal: bool = True) -> Problem:
    def normal(heads: int) -> Tensor:
        return torch.randn(heads, T, WIDTH, device=device).bfloat16()

    point, tangents = (tuple(normal(h) for h in (HEADS, of_keys, of_keys)) for _ in range(2))
    return Problem(point, tangents, causal=causal)  # type: ignore[arg-type]


def attention_scan(device: torch.device, full: bool) -> Iterator[Row]:
    """Products of attention in bfloat16 over its length, and with grouped queries and masks."""
    for T, sampled in (
        ((1024, False), (8192, False), (32768, True), (131072, True)) if full else ((48, False), (96, True))
    ):
        problem = _problem(T, device)
        problem.sampled = sampled
        yield _length_row(problem, device, full)
    T = 8192 if full else 48
    yield _beside(
        "12 heads over 4 of keys", "<= 1.1x of 12 over 12", 1.1, _problem(T, device, of_keys=4),
        _problem(T, device), device, full,
    )  # fmt: skip
    open_ = _problem(T, device, causal=False)
    padding = (torch.arange(T, device=device) < 3 * T // 4)[None]
    distance = torch.arange(T, device=device)[None] - torch.arange(T, device=device)[:, None]
    sloping = (-distance.abs() / T).bfloat16()
    for name, goal, limit, mask in (
        ("padding mask", "<= 1.2x of no mask", 1.2, padding),
        ("mask of T x T numbers", "<= 1.5x of no mask", 1.5, sloping),
    ):
        masked = Problem(open_.point, open_.tangents, mask)
        yield _beside(name, goal, limit, masked, open_, device, full)


def _length_row(problem: Problem, device: torch.device, full: bool) -> Row:
    T = problem.queries
    rule = problem.rule()
    g = problem.forward(rule)
    calls = {"whole": problem.whole, "one more product": lambda: problem.product(rule, g, problem.tangents)}
    times = seconds(calls, device, full)
    ms = 1e3 * min(times["whole"])
    published = PUBLISHED.get(T)
    goal = "ms; no figure published" if published is None else f"<= {published:g} ms (flash-hog with TK, H200)"
    # Forward, backward and both tangent sweeps with one vector: 2 + 5 + 5 + 12 products of T x T x d, half masked.
    rate = 24 * HEADS * T * T * WIDTH / (ms * 1e9)
    met = published is None or ms <= published
    return row(f"attention scan, T = {T}", goal, ms, met, problem.error(), 3e-2, times) | {
        "teraflops": rate,
        "peak_MiB": _peak(problem.whole, device) if device.type == "cuda" else None,
    }  # fmt: skip


def _beside(
    name: str, goal: str, limit: float, problem: Problem, plain: Problem, device: torch.device, full: bool
) -> Row:
    times = seconds({"this": problem.whole, "plain": plain.whole}, device, full)
    value = min(times["this"]) / min(times["plain"])
    error = problem.error()
    return row(f"attention, T = {problem.queries}, {name}", goal, value, value <= limit, error, 3e-2, times)
