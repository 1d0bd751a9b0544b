"""The messages in blocks on the page on troubleshooting are what the program says, but for numbers and file names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import sharpkern as sk

PAGE = (Path(__file__).parent.parent / "docs" / "guide" / "troubleshooting.md").read_text()
LOSS = nn.CrossEntropyLoss()


def shape_of(message: str) -> str:
    """Leave out what differs from run to run: line breaks, numbers, files."""
    message = re.sub(r"\S+\.py:\d+", "FILE", " ".join(message.split()))
    return re.sub(r"\d[\d.]*(e[-+]\d+)?", "#", message).rstrip(".")


# The block on the missing compiler is left to test_without_compiler.py: it is said once, at the import.
BLOCKS = [
    block
    for block in map(shape_of, re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL))
    if "compiled module" not in block
]


class Branches(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return 2 * y if y.sum() > 0 else y


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


class Rounds(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[1](Straight.apply(3 * self[0](x)))


class Characters(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).view(8, 4, 5).log_softmax(-1)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 5))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(64, 20), torch.randint(0, 5, (64,))


def ctc(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.ctc_loss(output, targets, torch.full((4,), 8), torch.full((4,), 2))


CTC_BATCH = torch.randn(32, 20), torch.randint(1, 5, (4, 2))


def second_step_is_nan() -> None:
    model = network()
    tracker = sk.SharpnessTracker(model, LOSS, torch.optim.SGD(model.parameters(), lr=0.1))
    tracker.step(batch())
    tracker.step((torch.full((64, 20), torch.nan), batch()[1]))


def moments_of_zero() -> None:
    model, (x, y) = network(), batch()
    x[:, 3] = 0
    sk.SharpnessTracker(model, LOSS, torch.optim.Adam(model.parameters(), eps=0.0)).step((x, y))


def stale_product() -> None:
    model = network()
    H = sk.HessianOperator(model, LOSS, batch())
    with torch.no_grad():
        model[0].weight.add_(1)
    H @ torch.randn(H.n)


SAYS: dict[str, Callable[[], object]] = {
    "branch": lambda: sk.sharpness(Branches(20, 5), LOSS, batch()).value,
    "no second derivative": lambda: sk.sharpness(Characters(20, 5), ctc, CTC_BATCH),
    "loss is nan": second_step_is_nan,
    "failed step": moments_of_zero,
    "too few products": lambda: sk.sharpness(network(), LOSS, batch(), max_matvecs=5).reason,
    "audit passes": lambda: sk.audit(network(), LOSS, batch()).verdict,
    "audit fails": lambda: sk.audit(Rounds(nn.Linear(20, 16), nn.Linear(16, 5)), LOSS, batch()).verdict,
    "no audit": lambda: sk.audit(Characters(20, 5), ctc, CTC_BATCH).verdict,
    "stale operator": stale_product,
}


def said_by(call: Callable[[], object]) -> list[str]:
    """Return what a call returns, raises and warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            said = [str(call())]
        except (RuntimeError, ValueError) as error:
            said = [f"{type(error).__name__}: {error}"]
    return [shape_of(text) for text in [*said, *(f"{w.category.__name__}: {w.message}" for w in caught)]]


@pytest.mark.parametrize("name", SAYS)
def test_the_page_quotes_what_the_program_says(name: str) -> None:
    said = said_by(SAYS[name])
    assert any(text in BLOCKS for text in said), said


def test_every_quoted_message_is_tried() -> None:
    assert len(BLOCKS) == len(SAYS)
