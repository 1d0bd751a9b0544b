"""The Hugging Face callback with real Trainers on tiny models, against float64 dense truths."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import results
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from sharpkern.integrations.transformers import SharpnessCallback  # noqa: E402

VOCABULARY, LENGTH = 17, 6


def text(count: int) -> list[dict[str, torch.Tensor]]:
    """Make examples with padding on the right, whose labels are not counted."""
    examples = []
    for _ in range(count):
        ids = torch.randint(VOCABULARY, (LENGTH,))
        real = torch.arange(LENGTH) < int(torch.randint(3, LENGTH + 1, ()))
        example = {"input_ids": ids, "attention_mask": real.long(), "labels": torch.where(real, ids, -100)}
        examples.append(example)
    return examples


def images(count: int) -> list[dict[str, torch.Tensor]]:
    return [{"pixel_values": torch.randn(1, 8, 8), "labels": torch.randint(3, ())} for _ in range(count)]


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0,
                                eos_token_id=0)
    )  # fmt: skip


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
                                 num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8)
    )  # fmt: skip


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
                                num_attention_heads=2, max_position_embeddings=8)
    )  # fmt: skip


def t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2,
                              dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0)
    )  # fmt: skip


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
                               image_size=8, patch_size=4, num_channels=1, num_labels=3)
    )  # fmt: skip


MODELS = {"gpt2": (gpt2, text), "llama": (llama, text), "bert": (bert, text), "t5": (t5, text), "vit": (vit, images)}


def trainer_for(model: nn.Module, data: list, folder: Path, kind: Any = transformers.Trainer, **options: Any) -> Any:
    arguments = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3, "learning_rate": 1e-3,
        "max_grad_norm": 0.5, "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
        "save_strategy": "no", "lr_scheduler_type": "constant", "seed": 3,
    } | options  # fmt: skip
    return kind(
        model=model, args=transformers.TrainingArguments(output_dir=str(folder), **arguments), train_dataset=data
    )


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def flat_hessian(total: torch.Tensor, params: list[torch.Tensor]) -> torch.Tensor:
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(total, params, create_graph=True)])
    unit = torch.eye(len(gradient), dtype=gradient.dtype)
    rows = torch.autograd.grad(gradient, params, unit, retain_graph=True, is_grads_batched=True, materialize_grads=True)
    return torch.cat([r.flatten(1) for r in rows], 1)


class Truth(transformers.TrainerCallback):
    """Computes, at the first step, the dense float64 Hessian of what the Trainer minimises, without dropout."""

    def __init__(self, trainer: Any, batches: list) -> None:
        self.trainer, self.batches = trainer, batches

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = copy.deepcopy(self.trainer.model).double().train()
        params = list({id(p): p for p in model.parameters() if p.requires_grad}.values())
        total = 0.0
        _, items = self.trainer.get_batch_samples(iter(self.batches), len(self.batches), torch.device("cpu"))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            for b in self.batches:
                wide = {k: t.double() if t.is_floating_point() else t for k, t in b.items()}
                if self.trainer.model_accepts_loss_kwargs and b["labels"].ndim == 2:
                    total = total + model(**wide, num_items_in_batch=items).loss
                else:
                    total = total + model(**wide).loss / len(self.batches)
            self.loss = float(total.detach())
            self.dense = flat_hessian(total, params)


FAST = ("llama", "vit")  # the others go the same ways
MARKED = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


@pytest.mark.parametrize("name", MARKED)
def test_training_is_the_same_and_values_are_true(name: str, tmp_path: Path) -> None:
    make, data_of = MODELS[name]
    model, data = make(), data_of(12)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the truth's float64 copy would draw other masks; the test below has dropout
    twin = copy.deepcopy(model)
    trainer = trainer_for(model, data, tmp_path / "with")
    trainer.add_callback(SharpnessCallback(trainer, tol=1e-4, every=2))
    loader = list(trainer.get_train_dataloader())
    truth = Truth(trainer, loader[:2])
    trainer.add_callback(truth)
    trainer.train()
    plain = trainer_for(twin, data, tmp_path / "without")
    plain.train()
    for (key, mine), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), key
    rows = rows_of(tmp_path / "with" / "sharpness.jsonl")
    assert [row["step"] for row in rows] == [1, 3]
    top = float(torch.linalg.eigvalsh(truth.dense)[-1])
    assert rows[0]["loss"] == pytest.approx(truth.loss, rel=1e-5)
    assert rows[0]["sharpness"] == pytest.approx(top, rel=1e-4)
    logged = {entry["step"]: entry["sharpness"] for entry in trainer.state.log_history if "sharpness" in entry}
    assert logged == {1: rows[0]["sharpness"], 3: rows[1]["sharpness"]}
    assert sum("loss" in entry for entry in trainer.state.log_history) == 3  # the Trainer's own logs are all there
    assert "compute_loss" not in vars(trainer)


def test_dropout_masks_and_moments_are_the_steps_own(tmp_path: Path) -> None:
    model, data = gpt2(), text(8)
    assert model.config.resid_pdrop > 0
    twin = copy.deepcopy(model)
    trainer = trainer_for(model, data, tmp_path / "with", max_steps=2)
    seen: list[float] = []

    class Clipped(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters()])))

    trainer.add_callback(SharpnessCallback(trainer, tol=0.05))
    trainer.add_callback(Clipped())
    trainer.train()  # the callback compares its gradient with the Trainer's
    plain = trainer_for(twin, data, tmp_path / "without", max_steps=2)
    plain.train()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert [row["grad_norm"] for row in rows_of(tmp_path / "with" / "sharpness.jsonl")] == pytest.approx(seen, rel=1e-4)


@pytest.mark.slow
def test_mixed_precision_logs_to_tensorboard_and_resumes_its_file(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model, data = llama(), text(8)
    trainer = trainer_for(
        model, data, tmp_path, bf16=True, report_to=["tensorboard"], max_steps=2, gradient_accumulation_steps=1
    )
    trainer.add_callback(SharpnessCallback(trainer, path=tmp_path / "rows.jsonl"))
    trainer.train()
    rows = rows_of(tmp_path / "rows.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and all(row["sharpness"] > 0 for row in rows)
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    board = events.EventAccumulator(str(folder)).Reload()
    values = [event.value for event in board.Scalars("train/sharpness")]
    assert values == pytest.approx([row["sharpness"] for row in rows], rel=1e-5)


def test_another_loss_than_the_trainers_is_refused(tmp_path: Path) -> None:
    data = images(4)
    trainer = trainer_for(vit(), data, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="does not minimise the loss that the model returns"):
        SharpnessCallback(trainer)
    trainer.add_callback(SharpnessCallback(trainer, lambda output, _batch: output.logits.square().mean()))
    with pytest.raises(ValueError, match="not that of the loss given"):
        trainer.train()

    def smoothed(output: Any, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(output.logits, batch["labels"], label_smoothing=0.1)

    trainer = trainer_for(vit(), data, tmp_path, label_smoothing_factor=0.1, max_steps=1)
    trainer.add_callback(SharpnessCallback(trainer, smoothed))
    trainer.train()
    assert len(rows_of(tmp_path / "sharpness.jsonl")) == 1


def test_a_multiple_of_the_trainers_loss_is_refused(tmp_path: Path) -> None:
    def doubled(output: Any, _batch: Any) -> torch.Tensor:
        return 2 * output.loss

    for limit in (0.0, 100.0):  # no clipping, and none at this step
        trainer = trainer_for(vit(), images(4), tmp_path, max_grad_norm=limit)
        trainer.add_callback(SharpnessCallback(trainer, doubled))
        with pytest.raises(ValueError, match=r"the trainer's gradient is 0\.5 times that of the loss given"):
            trainer.train()


def test_every_must_be_a_step(tmp_path: Path) -> None:
    trainer = trainer_for(vit(), images(4), tmp_path)
    trainer.add_callback(SharpnessCallback(trainer, every=0))
    with pytest.raises(ValueError, match="every must be at least 1 step, got 0"):
        trainer.train()


def test_an_offline_run_of_weights_and_biases_gets_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    trainer = trainer_for(vit(), images(12), tmp_path / "out", report_to=["wandb"])
    trainer.add_callback(SharpnessCallback(trainer))
    trainer.train()
    rows = rows_of(tmp_path / "out" / "sharpness.jsonl")
    assert wandb.run.summary["train/sharpness"] == pytest.approx(rows[-1]["sharpness"])
    wandb.finish()


class Noting(transformers.Trainer):
    """Keeps the micro-batches of each step and how many tokens they were said to have; may spoil one of them."""

    spoilt = 0  # from this step on

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        vars(self).setdefault("noted", []).append(({k: t.clone() for k, t in inputs.items()}, num_items_in_batch))
        if self.spoilt and self.state.global_step + 1 >= self.spoilt:
            inputs["pixel_values"] = inputs["pixel_values"] * torch.inf
        return super().training_step(model, inputs, num_items_in_batch)


class Overridden(Noting):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


class Compared(transformers.TrainerCallback):
    """Compares the tracker's gradient with ``p.grad``, which DDP has averaged, at the first step."""

    def __init__(self, trainer: Any, callback: SharpnessCallback) -> None:
        self.trainer, self.callback, self.error = trainer, callback, 1.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            hessian = self.callback._observer.tracker.hessian
            self.gradient = torch.cat([p.grad.flatten() for p in hessian.params.values()])
            self.error = float((hessian.gradient - self.gradient).norm() / self.gradient.norm())


def summed_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Cross-entropy summed over what is predicted, and over how much it is."""
    inputs = {k: t.double() if t.is_floating_point() else t for k, t in batch.items() if k != "labels"}
    logits, labels = model(**inputs).logits, batch["labels"]
    if labels.ndim == 2:  # of each token the next one
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, labels, reduction="sum"), int((labels != -100).sum())


def trained(name: str, folder: Path, start: nn.Module, data: list, kind: Any = Noting, **options: Any) -> dict:
    """Train with the callback and without; compare, also with a float64 dense truth of both processes' batches."""
    model, twin = copy.deepcopy(start), copy.deepcopy(start)
    rank, world = dist.get_rank(), dist.get_world_size()
    options = {"max_steps": 2, "max_grad_norm": 0.0} | options
    trainer = trainer_for(model, data, folder / name / str(rank), kind, **options)
    callback = SharpnessCallback(trainer, tol=1e-4)
    compared = Compared(trainer, callback)
    trainer.add_callback(callback)
    trainer.add_callback(compared)
    trainer.train()
    trainer_for(twin, data, folder / name / "without", kind, **options).train()
    steps = trainer.args.gradient_accumulation_steps
    wide = copy.deepcopy(start).double().train()
    params = list({id(p): p for p in wide.parameters() if p.requires_grad}.values())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        sums = [summed_loss(wide, batch) for batch, _ in trainer.noted[:steps]]
        counts: list = [None] * world
        dist.all_gather_object(counts, [count for _, count in sums])
        if not trainer.model_accepts_loss_kwargs:  # the mean over micro-batches of their means
            local = sum(total / count for total, count in sums) / steps
        elif trainer.args.average_tokens_across_devices:  # the mean over all tokens of all processes
            local = world * sum(total for total, _ in sums) / sum(sum(own) for own in counts)
        else:
            local = sum(total for total, _ in sums) / sum(counts[rank])
        dense, gradient = flat_hessian(local, params), torch.autograd.grad(local, params)
    truth = [local.detach(), dense, torch.cat([g.flatten() for g in gradient])]
    for t in truth:
        dist.all_reduce(t)
    loss, dense, gradient = (t / world for t in truth)
    file = folder / name / str(rank) / "sharpness.jsonl"
    return {
        "same bits": all(
            torch.equal(p.detach().view(torch.int32), q.detach().view(torch.int32))
            for p, q in zip(model.parameters(), twin.parameters(), strict=True)
        ),
        "gradient": compared.error,
        "truth's gradient": float((gradient - compared.gradient).norm() / compared.gradient.norm()),
        "counts": counts,
        "loss": float(loss),
        "top": float(torch.linalg.eigvalsh(dense)[-1]),
        "rows": rows_of(file) if file.exists() else None,
        "logged": [entry["sharpness"] for entry in trainer.state.log_history if "sharpness" in entry],
        "weights": float(torch.cat([p.detach().flatten() for p in model.parameters()]).double().sum()).hex(),
    }


def on_two(rank: int, world: int) -> Path:
    """Set what Accelerate asks for; return a folder for both processes."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # the group is there, so no port is opened
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    return Path(folder[0])


def unlike(examples: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Let the examples have 1, 2, 3, 4, 5, 1, ... tokens to predict: the order of the data is that of one seed."""
    for i, example in enumerate(examples):
        example["labels"] = torch.where(torch.arange(LENGTH) <= 1 + i % (LENGTH - 1), example["input_ids"], -100)
    return examples


def tokens_over_processes(rank: int, world: int) -> dict[str, Any]:
    folder, model, data = on_two(rank, world), llama(), unlike(text(16))
    told = {"all": trained("all", folder, model, data)}
    told["own"] = trained("own", folder, model, data, average_tokens_across_devices=False)
    # A method of one's own that leaves the factor to the Trainer's, and a loss that does not know of it.
    wrong = trainer_for(model, data, folder / "wrong", Overridden, max_steps=1, max_grad_norm=0.0)
    wrong.add_callback(SharpnessCallback(wrong, lambda output, _batch: output.loss))
    with pytest.raises(ValueError, match=r"the trainer's gradient is 2 times that of the loss given"):
        wrong.train()
    told["not finite"] = one_is_not_finite(rank, folder)
    return told


def one_is_not_finite(rank: int, folder: Path) -> list | None:
    """Return the rows of a training in which one process meets losses that are not finite."""
    trainer = trainer_for(vit(), images(12), folder / "infinite" / str(rank), Noting, max_steps=3)
    trainer.spoilt = 2 if rank == 1 else 0
    trainer.add_callback(SharpnessCallback(trainer, tol=0.1))
    trainer.train()
    file = folder / "infinite" / str(rank) / "sharpness.jsonl"
    return rows_of(file) if file.exists() else None


def check_values(told: list[dict[str, Any]]) -> None:
    for own in told:
        assert own["same bits"] and own["weights"] == told[0]["weights"]
        assert max(own["gradient"], own["truth's gradient"]) <= 1e-5, own
        assert own["logged"] == told[0]["logged"] and len(own["logged"]) == 2
    first, second = told
    assert second["rows"] is None, "only the first process writes"
    assert [row["step"] for row in first["rows"]] == [1, 2]
    assert first["rows"][0]["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert first["rows"][0]["sharpness"] == pytest.approx(first["top"], rel=1e-4)
    assert first["logged"] == [row["sharpness"] for row in first["rows"]]


def test_tokens_of_two_processes_are_weighed_as_ddp_weighs_them(seed: int) -> None:
    first, second = results(tokens_over_processes, 2, seed)
    for name in ("all", "own"):
        check_values([first[name], second[name]])
    # Else weights that are wrong could look right.
    assert len({count for own in first["all"]["counts"] for count in own}) > 1
    assert len({sum(own) for own in first["all"]["counts"]}) > 1
    rows = first["not finite"]
    assert rows[0]["sharpness"] > 0
    assert rows[1:] == [{"step": step, "loss": None, "diverged": True} for step in (2, 3)]
    assert second["not finite"] is None


@pytest.mark.slow
@pytest.mark.parametrize("case", ["means_over_processes", "dropout_over_processes"])
def test_means_clipping_and_dropout_of_two_processes(case: str, seed: int) -> None:
    told = results(globals()[case], 2, seed)
    if case == "means_over_processes":
        check_values(told)
    for own in told:
        assert own["same bits"] and own["weights"] == told[0]["weights"]
        assert own["logged"] == told[0]["logged"] and len(own["logged"]) == 2


def means_over_processes(rank: int, world: int) -> dict[str, Any]:
    return trained("means", on_two(rank, world), vit(), images(16))


def dropout_over_processes(rank: int, world: int) -> dict[str, Any]:
    return trained("dropout", on_two(rank, world), gpt2(), text(16), max_grad_norm=0.1)


def test_other_kinds_of_parallelism_are_refused(tmp_path: Path) -> None:
    from sharpkern.integrations.observer import data_parallel

    with pytest.raises(ValueError, match=r"needs a model in DistributedDataParallel, got Linear \(plain\)"):
        data_parallel(nn.Linear(2, 2))
    fsdp1 = type("Wrapped", (nn.Linear,), {"__module__": "torch.distributed.fsdp.fully_sharded_data_parallel"})
    with pytest.raises(ValueError, match=r"got Wrapped \(FSDP1 .* train without FSDP, DeepSpeed"):
        data_parallel(fsdp1(2, 2))
    trainer = trainer_for(vit(), images(4), tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match=r"this one has 2 GPUs \(DataParallel\)"):
        SharpnessCallback(trainer)
