"""The Lightning callback with real Trainers, against dense truths."""

from __future__ import annotations

import copy
import csv
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import Problem, dense_hessian
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
