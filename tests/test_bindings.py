"""Torch's own functions do what the overloads do whose place they take in a tape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sharpkern.rop.recording.bindings import BINDINGS
from sharpkern.rop.recording.tape import Tape

aten = torch.ops.aten
LEADING = {"mm": 2, "addmm": 2, "bmm": 3, "baddbmm": 3}


def normal(*shape: int) -> Tensor:
    """Every other column of a wider tensor: strides of its own."""
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]


def calls(name: str) -> list[tuple[list[Any], dict[str, Any]]]:
    """Arguments without the tensor to write to, plain and with every option."""
    if name in LEADING:
        batch = (3,) * (LEADING[name] - 2)
        pair = [normal(*batch, 4, 5), normal(*batch, 5, 6)]
        return [(pair, {}), *([(pair, {"beta": 0.5, "alpha": -2.0})] if "add" in name else [])]
    if name == "sum":
        return [([normal(4, 6), dims], options) for dims, options in (([0], {}), ([1], {"dtype": torch.float64}))] + [
            ([normal(4, 6), [0, 1], True], {}),
            ([normal(4, 6), None, False], {"dtype": None}),
        ]
    if name in ("neg", "copy"):
        return [([normal(4, 6)], {})]
    given = [normal(4, 6), normal(6)]
    return [(given, {}), ([normal(4, 6), 2.5], {}), *([(given, {"alpha": 3.0})] if name in ("add", "sub") else [])]


@pytest.mark.parametrize("overload", BINDINGS, ids=str)
def test_a_binding_gives_the_same_to_the_bit(overload: Any, seed: int) -> None:
    name = overload._schema.name.removeprefix("aten::")
    in_place = name.endswith("_")
    for args, options in calls(name.rstrip("_")):
        found = []
        for function in (overload, BINDINGS[overload]):
            torch.manual_seed(seed)
            if not in_place:
                first = [torch.randn(6)] if "add" in name and name != "add" else []
                like = overload_of(overload)(*first, *args, **options)
                out = torch.full_like(like, torch.nan)
                assert function(*first, *args, **options, out=out) is out
            else:
                shape = args[0].shape if name in ("copy_", "add_", "sub_", "mul_") else (*args[0].shape[:-1], 6)
                out = torch.randn(shape)
                tail = args[-1:] if name in ("add_", "sub_", "mul_") else args
                assert function(out, *tail, **options) is out
            found.append(out)
        assert not found[0].isnan().any()
        assert torch.equal(*found)


def overload_of(out: Any) -> Any:
    """The overload that makes its own result."""
    return getattr(aten, out._schema.name.removeprefix("aten::"))


def test_a_tape_calls_the_bindings() -> None:
    from sharpkern.rop.recording.pool import Pool

    x, y = torch.randn(4, 4), torch.empty(4, 4)
    tape = Tape(lambda x, y: y.copy_(torch.mm(x, x).mul_(2)), [x], [y], Pool())
    assert {function for function, *_ in tape._calls} == {torch.mm, torch.Tensor.mul_, torch.Tensor.copy_}
    x = torch.randn(4, 4)
    tape.replay([x], [y])
    assert torch.allclose(y, 2 * x @ x)
