"""Cells trained together leave what each would leave alone."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sharpkern import cli
from sharpkern.optimizers.norms import dead_units
from sharpkern.sweep import stacked
from sharpkern.sweep.executors import run_sweep
from sharpkern.sweep.grid import Cell, Sweep, read_sweep
from sharpkern.sweep.groups import groups, run_group
from sharpkern.sweep.run import CellEnd, run_cell
from sharpkern.tracking.record import Record
from sharpkern.train.batched import FCNStack
from sharpkern.train.config import DataConfig, ModelConfig, TrackingConfig, TrainConfig
from sharpkern.train.loop import Run
from sharpkern.train.losses import LossFunction, build_loss
from sharpkern.train.metrics import read
from sharpkern.train.models import ACTIVATIONS, FCN, PARAMETERISATIONS

# Of a figure against that of a single run, relative: float32, sums in another order, over 12 steps of stable training
# (measured: 5e-6 at most). Where rounding puts an input of a ReLU beyond its kink, one example's part in a gradient
# comes or goes.
TOLERANCE = {"tanh": 1e-4, "gelu": 1e-4, "relu": 2e-2}
ONE_UNIT = 1.01 / 9  # a ReLU at its kink may be a dead unit, or not; there are 9 or more
ONE_EXAMPLE = 1.01 / 60  # two outputs may be equal but for rounding
TEXT = """
loss = "{loss}"
steps = 12
eval_every = 5
checkpoint_every = 4
{batch}
[model]
width = 9
depth = {depth}
activation = "{activation}"
parameterisation = "{parameterisation}"
[data]
limit = 60
[optimizer]
momentum = {momentum}
[tracking]
every = 12
[sweep]
lr_unit = "1/sharpness"
[[sweep.grid]]
optimizer.lr = [0.2, 0.5, 1e30]
optimizer.warmup_steps = [1, 6]
seed = {seeds}
[[sweep.grid]] # from 0.3 to 1e30 in the sixth step
optimizer.lr_init = [0.3]
optimizer.power = [1e4]
optimizer.lr = [1e30]
optimizer.warmup_steps = [6]
seed = {seeds}
"""


def sweep_of(folder: Path, out: str, **choices: object) -> Sweep:
    chosen = {
        "loss": "mse", "batch": "", "depth": 3, "activation": "tanh", "parameterisation": "sp", "momentum": 0.0,
        "seeds": random.sample(range(10**6), 2),
    } | choices  # fmt: skip
    path = folder / "sweep.toml"
    path.write_text(TEXT.format(**chosen))
    return read_sweep(path, folder / out)


def close(got: object, want: object, what: str, tolerance: float) -> None:
    if isinstance(want, float):
        assert isinstance(got, float), what
        assert abs(got - want) <= tolerance * abs(want) + 1e-6, f"{what}: {got} in the stack, {want} alone"
    elif isinstance(want, list):
        assert isinstance(got, list) and len(got) == len(want), what
        for a, b in zip(got, want, strict=True):
            close(a, b, what, tolerance)
    else:
        assert got == want, f"{what}: {got} in the stack, {want} alone"


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def same_folder(got: Path, want: Path, activation: str) -> None:
    assert files(got) == files(want)
    for name in ("config.toml", "cell.toml"):
        assert (got / name).read_text().replace(str(got), "") == (want / name).read_text().replace(str(want), "")
    rows, truth = read(got / "metrics.jsonl"), read(want / "metrics.jsonl")
    assert [list(row) for row in rows] == [list(row) for row in truth]
    pairs = [*zip(rows, truth, strict=True)]
    pairs.append((json.loads((got / "result.json").read_text()), json.loads((want / "result.json").read_text())))
    for row, true in pairs:
        assert list(row) == list(true)
        for key in row.keys() - {"seconds"}:
            if key.endswith("accuracy") and true[key] is not None:
                assert abs(row[key] - true[key]) <= ONE_EXAMPLE, key
            elif key == "dead_units" and activation == "relu":
                assert abs(row[key] - true[key]) <= ONE_UNIT, key
            else:
                close(row[key], true[key], f"{got.name}, {key}", TOLERANCE[activation])


def outcomes_by_name(outcomes: list[CellEnd]) -> dict[str, CellEnd]:
    return {outcome.name: outcome for outcome in outcomes}


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"loss": "cross-entropy", "momentum": 0.7, "parameterisation": "mup", "activation": "relu"},
        {"batch": "batch_size = 16", "parameterisation": "ntp"},
        {"batch": "batch_size = 16", "loss": "cross-entropy", "momentum": 0.5, "activation": "gelu", "depth": 2},
        {"batch": "batch_size = 64", "seeds": [random.randrange(10**6)]},
    ],
    ids=lambda choices: ",".join(f"{k}={v}" for k, v in choices.items() if k != "seeds") or "full batch",
)
def test_stacked_cells_leave_what_single_runs_leave(tmp_path: Path, choices: dict[str, object]) -> None:
    together = sweep_of(tmp_path, "together", **choices)
    (group,) = groups(together.cells)
    outcomes = run_group(group)
    alone = read_sweep(tmp_path / "sweep.toml", tmp_path / "alone")
    assert outcomes_by_name(outcomes) == outcomes_by_name([run_cell(cell) for cell in alone.cells])
    for got, want in zip(together.cells, alone.cells, strict=True):
        same_folder(got.folder, want.folder, got.config.model.activation)
        o = got.config.optimizer
        steps = 7 if o.lr_init else 2 if o.lr == 1e30 else 12
        assert len(read(got.folder / "metrics.jsonl")) == steps  # those that diverge do so where they were made to


def results(sweep: Sweep) -> dict[str, dict[str, object]]:
    found = {cell.name: json.loads((cell.folder / "result.json").read_text()) for cell in sweep.cells}
    return {name: {k: v for k, v in result.items() if k != "seconds"} for name, result in found.items()}


def test_killed_stack_begins_again_and_what_is_done_or_was_begun_alone_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = sweep_of(tmp_path, "whole"), read_sweep(tmp_path / "sweep.toml", tmp_path / "killed")
    run_group(groups(whole.cells)[0])

    class Kill(BaseException):
        pass

    count = Run.count

    def dies_at(fatal: int) -> None:
        def counts(run: Run, record: Record, *rest: object) -> object:
            if record.step == fatal:
                raise Kill
            return count(run, record, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(Run, "count", counts)

    dies_at(11)
    with pytest.raises(Kill):
        run_group(groups(killed.cells)[0])
    alone = next(cell for cell in killed.cells if cell.config.optimizer.lr == 0.5)
    dies_at(9)
    with pytest.raises(Kill):
        run_cell(alone)  # its last checkpoint is that of step 8
    done = [cell for cell in killed.cells if (cell.folder / "result.json").exists()]
    assert {cell.config.optimizer.lr for cell in done} == {1e30}
    before = {path: path.stat().st_mtime_ns for cell in done for path in cell.folder.glob("*.json*")}
    begun: list[int] = []

    def counts(run: Run, record: Record, *rest: object) -> object:
        if run.folder == alone.folder:
            begun.append(record.step)
        return count(run, record, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Run, "count", counts)
    list(run_sweep(killed, lambda function, todo: map(function, todo)))
    assert begun == [9, 10, 11, 12]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for name, result in results(whole).items():
        for key, value in result.items():
            close(results(killed)[name][key], value, f"{name}, {key}", TOLERANCE["tanh"])


def test_cell_that_cannot_begin_leaves_its_stack_alone(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, "out")
    (group,) = groups(sweep.cells)
    bad = {cell.name for cell in sweep.cells if cell.config.optimizer.power == 1e4}
    for cell in sweep.cells:
        if cell.name in bad:  # begun by something else
            cell.folder.mkdir(parents=True)
            (cell.folder / "config.toml").write_text("no TOML")
    outcomes = run_group(group)
    assert len(bad) == 2
    assert {o.name for o in outcomes if o.status == "error"} == bad
    for cell in sweep.cells:
        assert (cell.folder / "error.txt").exists() == (cell.name in bad)
        assert (cell.folder / "result.json").exists() == (cell.name not in bad)


def test_error_of_a_stack_is_one_of_each_unfinished_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = sweep_of(tmp_path, "out")

    def no_memory(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(stacked, "_evaluate", no_memory)  # first at step 5
    outcomes = run_group(groups(sweep.cells)[0])
    for cell in sweep.cells:
        o = cell.config.optimizer
        status = "diverged" if o.lr == 1e30 and not o.lr_init else "error"
        assert [out.status for out in outcomes if out.name == cell.name] == [status]
    assert {out.message for out in outcomes if out.status == "error"} == {"no memory"}


def test_processes_share_a_stack_and_the_table_is_that_of_single_runs(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, "out")
    assert cli.main(["sweep", str(tmp_path / "sweep.toml"), "--out", str(tmp_path / "out"), "--processes", "2"]) == 0
    alone = read_sweep(tmp_path / "sweep.toml", tmp_path / "alone")
    list(run_sweep(alone, lambda _, todo: ([run_cell(cell)] for group in todo for cell in group)))
    for got, want in zip(sweep.cells, alone.cells, strict=True):
        same_folder(got.folder, want.folder, got.config.model.activation)


def cells_of(count: int, **changes: object) -> list[Cell]:
    config = TrainConfig(
        data=DataConfig(limit=100), model=ModelConfig(width=16), tracking=TrackingConfig(every=20), steps=20,
    )  # fmt: skip
    for key, value in changes.items():
        config = (
            replace(config, **{key: replace(getattr(config, key), **value)})
            if isinstance(value, dict)
            else replace(config, **{key: value})
        )
    return [Cell(f"{changes} {i}", {}, replace(config, seed=i)) for i in range(count)]


def test_groups_are_even_small_and_hold_every_cell_once() -> None:
    cells = cells_of(70)
    assert [len(group) for group in groups(cells)] == [23, 23, 24]
    assert [len(group) for group in groups(cells, 2)] == [17, 18, 17, 18]
    assert [len(group) for group in groups(cells[:3], 2)] == [1, 2]
    assert [len(group) for group in groups(cells[:3], 8)] == [1, 1, 1]
    assert [cell for group in groups(cells, 2) for cell in group] == cells
    assert [len(group) for group in groups(cells_of(12, data={"limit": 5000}, model={"width": 64}))] == [6, 6]


def test_cells_that_differ_in_more_than_learning_rates_and_seed_are_not_stacked() -> None:
    changes: list[dict[str, object]] = [
        {"model": {"parameterisation": "mup"}}, {"loss": "mse"}, {"batch_size": 10}, {"steps": 19},
        {"optimizer": {"momentum": 0.5}}, {"data": {"limit": 99}}, {"eval_every": 3},
    ]  # fmt: skip
    cells = [*cells_of(2), *(cell for change in changes for cell in cells_of(2, **change))]
    assert [len(group) for group in groups(cells)] == [2] * (len(changes) + 1)
    for same in ({"lr": 0.3}, {"lr_init": 0.01}, {"warmup_steps": 7}, {"critical_start": True}, {"decay": "cosine"}):
        assert len(groups([*cells_of(2), *cells_of(2, optimizer=same)])) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"tracking": {"every": 19}}, {"optimizer": {"name": "adam"}}, {"model": {"kind": "cnn"}}, {"steps": 1},
        {"data": {"limit": None}}, {"model": {"width": 512}, "data": {"limit": 5000}},
    ],
    ids=str,
)  # fmt: skip
def test_cell_that_cannot_or_need_not_be_stacked_is_trained_alone(change: dict[str, object]) -> None:
    assert [len(group) for group in groups(cells_of(3, **change))] == [1, 1, 1]


def test_cells_that_keep_their_checkpoints_are_trained_alone() -> None:
    assert len(groups([replace(cell, keep_checkpoint=True) for cell in cells_of(3)])) == 3


def agree(
    stack: FCNStack, models: list[FCN], x: torch.Tensor, goal: torch.Tensor, loss_fn: LossFunction, loss: str
) -> None:
    losses, gradients = stack.gradients(x, goal, loss)
    assert len(losses) == len(models)
    for i, model in enumerate(models):
        value = loss_fn(model(x if x.ndim == 2 else x[i]), goal if x.ndim == 2 else goal[i])
        torch.testing.assert_close(losses[i], value.detach(), rtol=1e-12, atol=1e-12)
        for got, want in zip(gradients, torch.autograd.grad(value, list(model.parameters())), strict=True):
            torch.testing.assert_close(got[i], want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("loss", ["mse", "cross-entropy"])
@pytest.mark.parametrize("own_batches", [False, True], ids=["one batch", "own batches"])
def test_stacked_gradients_are_those_of_each_network_in_float64(loss: str, own_batches: bool) -> None:
    loss_fn = build_loss(TrainConfig(loss=loss))  # type: ignore[arg-type]
    for parameterisation in PARAMETERISATIONS:
        for activation in ACTIVATIONS:
            models = [
                FCN(6, 4, depth=3, width=5, parameterisation=parameterisation,
                    activation=activation, seed=random.randrange(10**6)).double()
                for _ in range(3)
            ]  # fmt: skip
            for model in models:
                for p in model.parameters():
                    torch.nn.init.normal_(p)  # biases too
            stack = FCNStack(models[0], [list(m.parameters()) for m in models])
            x = torch.randn(*([3] if own_batches else []), 7, 6, dtype=torch.float64)
            y = torch.randint(4, x.shape[:-1])
            goal = torch.randn(*y.shape, 4, dtype=torch.float64) if loss == "mse" else y
            agree(stack, models, x, goal, loss_fn, loss)
            stack.keep(torch.tensor([0, 2]))
            x, goal = (x[[0, 2]], goal[[0, 2]]) if own_batches else (x, goal)
            agree(stack, models[::2], x, goal, loss_fn, loss)


def test_dead_units_of_a_stack_are_those_of_each_network() -> None:
    models = [FCN(4, 3, depth=3, width=5) for _ in range(6)]
    for model in models:
        for p in model.parameters():
            p.grad = torch.randn_like(p) * (torch.rand(len(p), *[1] * (p.ndim - 1)) < 0.5)
        model.layers[0].weight.grad[0, 0] = math.nan  # type: ignore[union-attr, index]
    gradients = [torch.stack([p.grad for p in ps]) for ps in zip(*(m.parameters() for m in models), strict=True)]  # type: ignore[misc]
    assert stacked._dead_units(gradients) == [dead_units(model) for model in models]
