"""The Lightning callback with real Trainers, against dense truths."""

from __future__ import annotations

import copy
import csv
import json
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from problems import Problem, dense_hessian, loss_and_gradient
from ranks import results
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Lightning's own imports warn
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import CSVLogger

    from sharpkern.integrations.lightning import SharpnessCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")


class Network(lightning.LightningModule):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(model: nn.Module, loader: DataLoader, folder: Path, callbacks: list, **options: Any) -> None:
    torch.manual_seed(4)
    trainer = lightning.Trainer(
        default_root_dir=str(folder), callbacks=callbacks, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1, max_epochs=1,
        **{"logger": False} | options,
    )  # fmt: skip
    trainer.fit(model, loader)


def loader_of(rows: int = 24, size: int = 6) -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(rows, 4), torch.randint(3, (rows,))), batch_size=size)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "clip", [pytest.param(None, marks=pytest.mark.slow), "norm", pytest.param("value", marks=pytest.mark.slow)]
)
def test_training_is_the_same_and_gradients_are_the_optimizers(clip: str | None, tmp_path: Path) -> None:
    model, loader = Network(dropout=0.3), loader_of()
    twin = copy.deepcopy(model)
    options = {"accumulate_grad_batches": 2}
    if clip is not None:
        options |= {"gradient_clip_val": 0.01, "gradient_clip_algorithm": clip}
    seen: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        seen.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters()])))

    made = model.configure_optimizers()
    made.register_step_post_hook(note)  # gradients are clipped inside of the step
    model.configure_optimizers = lambda: made
    fit(model, loader, tmp_path, [SharpnessCallback(nn.CrossEntropyLoss(), tol=0.05)], **options)
    fit(twin, loader, tmp_path / "without", [], **options)
    for (key, mine), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), key
    rows = rows_of(tmp_path / "sharpness.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert [row["grad_norm"] for row in rows] == pytest.approx(seen, rel=1e-5)


def test_values_are_true_and_logged(tmp_path: Path) -> None:
    model, loader = Network(), loader_of(rows=18)
    twin = copy.deepcopy(model).double()
    twin.trainer = None
    logger = CSVLogger(str(tmp_path), name="run")
    fit(model, loader, tmp_path, [SharpnessCallback(nn.CrossEntropyLoss(), tol=1e-4, every=2)], logger=logger)
    rows = rows_of(Path(logger.log_dir) / "sharpness.jsonl")
    assert [row["step"] for row in rows] == [1, 3]
    x, y = next(iter(loader))
    dense = dense_hessian(Problem(twin.layers, nn.CrossEntropyLoss(), (x.double(), y)))
    assert rows[0]["sharpness"] == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-4)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        logged = {row["step"]: float(row["sharpness"]) for row in csv.DictReader(file) if row["sharpness"]}
    assert logged == {"1": pytest.approx(rows[0]["sharpness"]), "3": pytest.approx(rows[1]["sharpness"])}


def test_a_module_of_lightnings_becomes_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("sharpkern.curvature.engines._warn", told.append)
    fit(Network(), loader_of(), tmp_path, [SharpnessCallback(nn.CrossEntropyLoss())])
    assert not told


def test_an_offline_run_of_weights_and_biases_gets_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(project="sharpness", offline=True, save_dir=str(tmp_path))
    fit(Network(), loader_of(), tmp_path, [SharpnessCallback(nn.CrossEntropyLoss())], logger=logger)
    (path,) = tmp_path.rglob("sharpness.jsonl")
    last = json.loads(path.read_text().splitlines()[-1])
    assert logger.experiment.summary["sharpness"] == pytest.approx(last["sharpness"])
    wandb.finish()


def test_mixed_precision_is_the_steps_own(tmp_path: Path) -> None:
    fit(Network(), loader_of(), tmp_path, [SharpnessCallback(nn.CrossEntropyLoss())], precision="bf16-mixed")
    assert len(rows_of(tmp_path / "sharpness.jsonl")) == 4


def test_another_loss_or_loop_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not that of the loss given"):
        # The margin loss of other classes: that of the same ones may have nearly the same direction.
        fit(Network(), loader_of(), tmp_path, [SharpnessCallback(lambda z, y: nn.MultiMarginLoss()(-z, y))])
    model = Network()
    model.automatic_optimization = False
    with pytest.raises(ValueError, match="call SharpnessTracker.observe in training_step"):
        fit(model, loader_of(), tmp_path, [SharpnessCallback(nn.CrossEntropyLoss())])


def test_batches_of_another_form(tmp_path: Path) -> None:
    class Pairs(Network):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self(batch["x"]), batch["y"])

    data = [{"x": torch.randn(5, 4), "y": torch.randint(3, (5,))} for _ in range(2)]
    callback = SharpnessCallback(nn.CrossEntropyLoss(), batch=lambda b: (b["x"], b["y"]))
    fit(Pairs(), DataLoader(data, batch_size=None), tmp_path, [callback])
    assert all(row["sharpness"] > 0 for row in rows_of(tmp_path / "sharpness.jsonl"))


class Noting(Network):
    """Keeps the micro-batches of each step, and the first gradient that the optimizer may clip."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        vars(self).setdefault("noted", []).append(batch)
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        vars(self).setdefault("gradient", torch.cat([p.grad.flatten() for p in self.parameters()]))


def two_processes(rank: int, world: int) -> dict[str, Any]:
    """Train with the callback and without; compare with a float64 dense truth of both processes' batches."""
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(world))
    warnings.simplefilter("ignore")
    (folder,) = _from_first([tempfile.mkdtemp()])
    wide = Noting().double()
    start = copy.deepcopy(wide).float()
    wide.load_state_dict(start.state_dict())  # of the same numbers
    loader = loader_of(rows=48)
    options = {"accumulate_grad_batches": 2, "devices": world, "strategy": "ddp", "gradient_clip_val": 0.05}
    told: dict[str, Any] = {}
    for name, dropout, callbacks in (
        ("true", 0.0, [SharpnessCallback(nn.CrossEntropyLoss(), tol=1e-4)]),
        ("with", 0.3, [SharpnessCallback(nn.CrossEntropyLoss(), tol=0.05)]),
        ("without", 0.3, []),
    ):
        model = copy.deepcopy(start)
        model.layers[3].p = dropout
        # Of each process its own folder: the first one's is used by all.
        fit(model, loader, Path(folder, name, str(rank)), callbacks, **options)
        told[name] = [float(t.double().sum()).hex() for t in model.parameters()]
        told[f"{name}: buffers"] = [float(t.double().sum()).hex() for t in model.buffers()]
        told[f"{name}: files"] = sorted(str(f.relative_to(folder)) for f in Path(folder, name).rglob("*.jsonl"))
        if name == "true":
            parts = [(x.double(), y) for x, y in model.noted[:2]]
            problems = [Problem(wide.layers, nn.CrossEntropyLoss(), part) for part in parts]
            seen = model.gradient
    truth = [sum(own) / (2 * world) for own in zip(*(_truth(p) for p in problems), strict=True)]
    for t in truth:
        dist.all_reduce(t)
    loss, gradient, dense = truth
    told["gradient"] = float((gradient - seen).norm() / seen.norm())
    told["loss"], told["top"] = float(loss), float(torch.linalg.eigvalsh(dense)[-1])
    dist.barrier()
    told["rows"] = rows_of(Path(folder, "true", "0", "sharpness.jsonl"))
    return told


def _truth(problem: Problem) -> list[torch.Tensor]:
    loss, gradient = loss_and_gradient(problem)
    return [loss, gradient.detach(), dense_hessian(problem)]


def _from_first(values: list[Any]) -> list[Any]:
    dist.broadcast_object_list(values)
    return values


def test_two_processes_measure_the_loss_of_both_and_train_as_without(seed: int) -> None:
    told = results(two_processes, 2, seed)
    for own in told:
        for what in ("", ": buffers"):
            assert own[f"with{what}"] == own[f"without{what}"], what
        assert own["with"] == told[0]["with"]
        assert own["gradient"] <= 1e-5
        assert [row["step"] for row in own["rows"]] == [1, 2]
        assert own["rows"][0]["loss"] == pytest.approx(own["loss"], rel=1e-5)
        assert own["rows"][0]["sharpness"] == pytest.approx(own["top"], rel=1e-4)
    assert told[0]["true: files"] == ["true/0/sharpness.jsonl"], "only the first process writes"


def test_another_strategy_on_two_devices_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lightning.Trainer, "world_size", 2)
    with pytest.raises(ValueError, match=r"needs a model in DistributedDataParallel, got Network \(plain\)"):
        fit(Network(), loader_of(), tmp_path, [SharpnessCallback(nn.CrossEntropyLoss())])
