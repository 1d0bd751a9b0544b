"""Looking entries up and putting them in place: repeated indices, empty positions, every argument active or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_truth import check, check_op, product
from test_rules_views import times_place
from torch import Tensor, nn

from sharpkern.rop import UnsupportedModelError, UnsupportedOpError
from sharpkern.rop.rules.indexing import Embedding, Gather, Index, IndexPut, IndexSelect, ScatterTo

aten = torch.ops.aten


@pytest.mark.parametrize("padding", [None, 2, 0, -1])
@pytest.mark.parametrize("shape", [(2, 5), (4,), ()], ids=str)
def test_embedding_with_repeated_rows_and_padding(padding: int | None, shape: tuple[int, ...]) -> None:
    index = torch.randint(0, 4, shape)
    check_op(lambda table: times_place(F.embedding(index, table, padding)), (4, 3), rule=Embedding)


def test_padding_row_of_an_embedding_gets_no_gradient() -> None:
    table = torch.randn(4, 3, dtype=torch.float64)

    def loss(p: Any, index: Tensor) -> Tensor:
        return (F.embedding(index, p["table"], padding_idx=2) ** 3).sum() + (p["table"][0] ** 2).sum()

    program = check({"table": table}, loss, torch.tensor([2, 1, 2, 0]), rule=Embedding)
    program.gradient(gradient := torch.empty(1, 12, dtype=torch.float64))
    assert gradient.view(4, 3)[2].tolist() == [0.0, 0.0, 0.0]
    assert product(program, torch.randn(2, 12, dtype=torch.float64)).view(2, 4, 3)[:, 2].abs().max() == 0


def test_padding_row_is_constant_where_positions_mix() -> None:
    def loss(p: Any, index: Tensor, padding: int | None = 2) -> Tensor:
        return (F.embedding(index, p["table"], padding).sum(0) ** 3).sum()

    def frozen(p: Any, index: Tensor) -> Tensor:
        row = torch.arange(4)[:, None] == 2
        return loss({"table": torch.where(row, p["table"].detach(), p["table"])}, index, None)

    table = torch.randn(4, 3, dtype=torch.float64)
    check({"table": table}, loss, torch.tensor([2, 1, 2, 0]), rule=Embedding, reference=frozen)


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"sparse": True}])
def test_embedding_options_without_a_dense_hessian_are_refused(options: dict[str, bool]) -> None:
    def loss(p: Any, index: Tensor) -> Tensor:
        return (F.embedding(index, p["table"], **options) ** 2).sum()

    with pytest.raises(UnsupportedOpError, match="scale_grad_by_freq"):
        check({"table": torch.randn(4, 3, dtype=torch.float64)}, loss, torch.tensor([1, 0]))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_gather_and_index_select(dim: int) -> None:
    index = torch.randint(0, 3, (2, 3, 2))
    check_op(lambda x: times_place(x.gather(dim, index)), (3, 4, 3), rule=Gather)
    check_op(lambda x: times_place(x.index_select(dim, index[0, 0])), (3, 4, 3), rule=IndexSelect)
    check_op(lambda x: times_place(torch.take_along_dim(x, index[:, :1], 0)), (3, 4, 2))


def test_lookups_in_scalars_and_vectors() -> None:
    zero = torch.tensor(0)
    check_op(lambda x: x.gather(0, zero) * x, (), rule=Gather)
    check_op(lambda x: x.gather(0, zero[None]) * x, (), rule=Gather)
    check_op(lambda x: x.gather(0, torch.tensor(2)), (3,), rule=Gather)
    check_op(lambda x: x.index_select(0, torch.tensor([2, 0, 2])), (3,), rule=IndexSelect)
    check_op(lambda x: x.index_select(0, torch.tensor(2)), (3,), rule=IndexSelect)
    check_op(lambda x: x.index_select(0, zero[None]), (), rule=IndexSelect)


ROWS, COLS = torch.tensor([2, 0, 2, 1]), torch.tensor([1, 1, 0, -1])
COLUMN = torch.tensor([[0], [2]])
MASK = torch.tensor([[True, False, True, True], [False, False, True, False], [True, True, False, False]])
INDICES: dict[str, tuple[Any, ...]] = {
    "first": (ROWS,),
    "second": (slice(None), COLS),
    "pair": (ROWS, COLS),
    "last": (Ellipsis, COLS),
    "broadcast_pair": (COLUMN, COLS),
    "apart": (ROWS, slice(None), COLS),
    "apart_and_broadcast": (COLUMN, slice(None), torch.tensor([1, 0])),
    "after_a_slice": (slice(1, 3), COLS, ROWS),
    "single": (torch.tensor([1]),),
    "scalars": (torch.tensor(1), slice(None), COLS),
    "number_and_index": (1, slice(None), COLS),
    "two_in_the_middle": (slice(None), COLS, ROWS, slice(None)),
}


@pytest.mark.parametrize("name", INDICES)
def test_advanced_indexing(name: str) -> None:
    shape = (3, 4, 5, 2) if name == "two_in_the_middle" else (3, 4, 5)
    check_op(lambda x: times_place(x[INDICES[name]]), shape, rule=Index)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("name", ["first", "pair", "apart", "broadcast_pair", "last"])
@pytest.mark.parametrize("active", ["both", "x", "value", "one value"])
def test_putting_values_at_indices(name: str, accumulate: bool, active: str) -> None:
    unique = {"first": (torch.tensor([2, 0]),), "pair": (torch.tensor([2, 0]), torch.tensor([1, 1]))}
    unique |= {"apart": (torch.tensor([2, 0]), slice(None), torch.tensor([1, 3])), "last": (Ellipsis, ROWS[1:3])}
    index = INDICES[name] if accumulate else unique.get(name, (COLUMN, torch.tensor([1, 0, 3])))
    index = tuple(None if i == slice(None) else i for i in index if i is not Ellipsis)
    index = (None, None, *index) if name == "last" else index
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    places = aten.index.Tensor(x, list(index))
    value = torch.randn_like(places)

    def put(x: Tensor, value: Tensor) -> Tensor:
        return times_place(aten.index_put.default(x, list(index), value, accumulate))

    shape = tuple(places.shape)
    if active == "both":
        check_op(put, (3, 4, 5), shape, rule=IndexPut)
    elif active == "x":
        check_op(lambda x: put(x, value), (3, 4, 5), rule=IndexPut)
    else:
        check_op(lambda v: put(x, v), shape if active == "value" else shape[-1:], rule=IndexPut)


def test_assignment_and_addition_at_indices() -> None:
    def assign(x: Tensor, v: Tensor) -> Tensor:
        y = x.clone()
        y[:, torch.tensor([0, 3])] = v
        y[torch.tensor([1])] += 0.3 * y[torch.tensor([0])]
        return y

    check_op(assign, (3, 4), (), rule=IndexPut)
    check_op(lambda x, s: times_place(x.index_add(0, ROWS, s, alpha=0.7)), (3, 2), (4, 2))
    check_op(lambda x, s: times_place(x.index_copy(0, ROWS[:2], s)), (3, 2), (2, 2))
    check_op(lambda x: times_place(x.index_fill(0, ROWS, 0.3)), (3, 2))


def test_assignment_under_a_boolean_mask() -> None:
    def assign(x: Tensor, v: Tensor) -> Tensor:
        y = x.clone()
        y[MASK] = v
        y[~MASK[:, 0]] = 0.3 * v * v
        return times_place(y)

    def constant(x: Tensor) -> Tensor:
        y = x.clone()
        y[MASK] = 0.7
        return times_place(y)

    check_op(assign, (3, 4), (), rule=IndexPut)
    check_op(constant, (3, 4), rule=IndexPut)


def test_results_of_data_dependent_size_are_named_when_they_stop_the_export() -> None:
    with pytest.raises(UnsupportedModelError, match="boolean mask"):
        check_op(lambda x: (x[MASK] ** 2).sum(), (3, 4))


@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("active", ["both", "x", "src"])
def test_scatters(active: str, dim: int) -> None:
    index = torch.stack([torch.randperm(4)[:2] for _ in range(3)])
    index = index.t().contiguous() if dim == 0 else index
    x_shape, src_shape = ((4, 3), (2, 3)) if dim == 0 else ((3, 4), (3, 2))
    fixed_x, fixed_src = (torch.randn(s, dtype=torch.float64) for s in (x_shape, src_shape))
    for op in (aten.scatter.src, aten.scatter_add.default):

        def f(*args: Tensor, op: Any = op) -> Tensor:
            x = fixed_x if active == "src" else args[0]
            return times_place(op(x, dim, index, fixed_src if active == "x" else args[-1]))

        shapes = {"both": (x_shape, src_shape), "x": (x_shape,), "src": (src_shape,)}[active]
        check_op(f, *shapes, rule=ScatterTo)
    check_op(lambda x: times_place(x.scatter(dim, index, 0.7)), x_shape, rule=ScatterTo)


def test_boolean_masks_keep_k_in_front() -> None:
    """Masks give results of data-dependent size, which seldom export; the rule itself takes them."""
    for indices in ([MASK, None], [None, MASK.t()], [torch.tensor([1, 0, 1]), None, torch.rand(5) > 2]):
        x = torch.randn(3, 4, 5, dtype=torch.float64) if indices[0] is not None else torch.randn(2, 4, 3)
        if indices[-1] is not None and len(indices) == 3:
            indices[-1] = torch.tensor([True, False, True, False, True])
        rule = Index(aten.index.Tensor, (True, None))
        y = rule.forward(x, indices)
        dx = torch.randn(2, *x.shape, dtype=x.dtype)
        want = torch.stack([aten.index.Tensor(d, indices) for d in dx])
        assert torch.equal(rule.tangent(dx), want)
        g = torch.randn(2, *y.shape, dtype=x.dtype)
        assert torch.allclose((rule.backward(g)[0] * dx).sum(), (g * want).sum())


def test_one_embedding_used_as_input_and_output() -> None:
    """A table tied to the head takes cotangents from both of its uses."""
    table = torch.randn(5, 3, dtype=torch.float64)

    def loss(p: Any, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(F.embedding(tokens, p["table"]))
        return F.linear(hidden, p["table"]).logsumexp(-1).pow(2).sum()

    check({"table": table}, loss, torch.tensor([[1, 0, 4], [4, 4, 2]]), rule=Embedding)


def test_module_embedding_exports_to_the_rule() -> None:
    layer = nn.Embedding(4, 3, padding_idx=1).double()
    index = torch.tensor([1, 0, 3])

    def loss(p: Any, _: Any) -> Tensor:
        return (torch.func.functional_call(layer, {"weight": p["w"]}, (index,)) ** 3).sum()

    check({"w": layer.weight.detach() + 0.1}, loss, rule=Embedding)
