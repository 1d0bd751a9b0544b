"""What the recipes cost: ``python benchmarks/recipes.py`` writes results/recipes.json and the table of the page.

Every contender trains a model of its own; rounds are interleaved. A round of a loop is ten steps, so that ``every=10``
has its share. A round of a trainer is a whole short run, of which the first two steps (export, recording) are left out.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from interleave import interleave, ratio
from report import between
from run import machine, versions
from torch import nn
from workloads import images

import sharpkern as sk

ROOT = Path(__file__).parents[1]
STEPS, MICRO = 10, 4
# Not ``budget=``, which would take the time of the other loops in between for its own step's.
CHOICES: dict[str, dict[str, Any]] = {
    "`observe`": {}, "`observe`, `products=False`": {"products": False}, "`observe`, `every=10`": {"every": 10},
}  # fmt: skip


def network(width: int = 512) -> nn.Module:
    """784-512-512-512-10, ReLU."""
    widths = [784, width, width, width]
    layers = [m for a, b in zip(widths, widths[1:], strict=False) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def loop(batch: Any, make: Callable[[Any], torch.optim.Optimizer], options: dict[str, Any] | None, how: str) -> Any:
    """Return a call of ten training steps: "backward", "accumulate", or "step", which the tracker takes."""
    model, loss_fn = network(), nn.CrossEntropyLoss()
    optimizer = make(model.parameters())
    tracker = None if options is None else sk.SharpnessTracker(model, loss_fn, optimizer, **options)
    parts = sk.MicroBatches.split(batch, len(batch[0]) // MICRO if how == "accumulate" else len(batch[0]))

    def steps() -> None:
        for _ in range(STEPS):
            if how == "step":
                tracker.step(batch)
            else:
                optimizer.zero_grad()
                for (x, y), weight in zip(parts.batches, parts.weights, strict=True):
                    (loss_fn(model(x), y) * weight).backward()
                if tracker is not None:
                    tracker.observe(parts if how == "accumulate" else batch)
            optimizer.step()

    return steps


def hugging_face(options: dict[str, Any] | None) -> Callable[[], float]:
    """Return a call that trains a Llama of two layers and reports the seconds of its steps but the first two."""
    import transformers

    from sharpkern.integrations.transformers import SharpnessCallback

    ids = [torch.randint(0, 256, (64,)) for _ in range(8 * (STEPS + 2))]
    config = transformers.LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                                      num_attention_heads=4)  # fmt: skip

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, _arguments: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 2:
                self.start = time.perf_counter()
            self.seconds = time.perf_counter() - getattr(self, "start", 0.0)

    def train() -> float:
        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                output_dir=folder, max_steps=STEPS + 2, per_device_train_batch_size=8, report_to=[], use_cpu=True,
                disable_tqdm=True, logging_strategy="no", save_strategy="no",
            )  # fmt: skip
            data, clock = [{"input_ids": i, "labels": i} for i in ids], Clock()
            model = transformers.LlamaForCausalLM(config)
            trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
            if options is not None:
                trainer.add_callback(SharpnessCallback(trainer, **options))
                trainer.log = lambda *_: None  # of the console
            trainer.add_callback(clock)
            trainer.train()
        return clock.seconds

    return train


def lightning(batch: Any, options: dict[str, Any] | None) -> Callable[[], float]:
    """Return a call that trains the network and reports the seconds of its steps but the first two."""
    from lightning.pytorch import Callback, LightningModule, Trainer

    from sharpkern.integrations.lightning import SharpnessCallback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any) -> torch.Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    class Clock(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                self.start = time.perf_counter()
            self.seconds = time.perf_counter() - getattr(self, "start", 0.0)

    def train() -> float:
        with tempfile.TemporaryDirectory() as folder:
            clock = Clock()
            added = [] if options is None else [SharpnessCallback(nn.functional.cross_entropy, **options)]
            trainer = Trainer(default_root_dir=folder, max_steps=STEPS + 2, callbacks=[*added, clock],
                              accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                              enable_model_summary=False)  # fmt: skip
            trainer.fit(Module(), torch.utils.data.DataLoader([batch] * (STEPS + 2), batch_size=None))
        return clock.seconds

    return train


def questions() -> dict[str, dict[str, Callable[[], object]]]:
    """Return the contenders of each loop; "without" is the loop alone."""
    x, y = images(512)
    batch, large = (x[:128].flatten(1), y[:128]), (x.flatten(1), y)
    optimizers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "SGD": lambda p: torch.optim.SGD(p, lr=0.02), "Adam": lambda p: torch.optim.Adam(p, lr=1e-4),
    }  # fmt: skip
    found: dict[str, dict[str, Callable[[], object]]] = {}
    for name, make in optimizers.items():
        title = f"plain loop, {name}, batch 128"
        found[title] = {"without": loop(batch, make, None, "backward"), "`step`": loop(batch, make, {}, "step")}
        found[title] |= {choice: loop(batch, make, options, "backward") for choice, options in CHOICES.items()}
    title = f"accumulation, Adam, {MICRO} x 128"
    adam = optimizers["Adam"]
    found[title] = {"without": loop(large, adam, None, "accumulate")}
    found[title] |= {choice: loop(large, adam, options, "accumulate") for choice, options in CHOICES.items()}
    shown = {choice: CHOICES[choice] for choice in list(CHOICES)[:3]}
    found["Hugging Face, Llama of two layers, AdamW"] = {"without": hugging_face(None)} | {
        choice: hugging_face(options) for choice, options in shown.items()
    }
    found["Lightning, Adam, batch 128"] = {"without": lightning(batch, None)} | {
        choice: lightning(batch, options) for choice, options in shown.items()
    }
    return found


def table(result: dict[str, Any]) -> str:
    """Return the table: how many times as long a step takes as without sharpkern."""
    lines = ["| loop | choice | time of a step, over the loop alone (quartiles) |", "|---|---|---|"]
    for entry in result["entries"]:
        for choice in list(entry["seconds"])[1:]:
            r = ratio(entry["seconds"], choice, "without")
            lines.append(f"| {entry['loop']} | {choice} | {r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f}) |")
    m, v = result["machine"], result["versions"]
    where = f"{m['cpu']}, {m['threads']} thread, torch {v['torch']}, commit {v['commit']}, {result['date']}"
    return "\n".join([*lines, "", f"Medians of per-round ratios on {where}; `benchmarks/recipes.py`.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine(), "versions": versions(), "entries": [],
    }  # fmt: skip
    for title, contenders in questions().items():
        seconds = interleave(contenders, options.rounds, untimed=1)
        result["entries"].append({"loop": title, "seconds": seconds})
        print(title, {name: round(min(s), 4) for name, s in seconds.items()}, flush=True)
    (ROOT / "benchmarks" / "results" / "recipes.json").write_text(json.dumps(result))
    between(ROOT / "docs" / "recipes" / "plain-loop.md", table(result))


if __name__ == "__main__":
    main()
