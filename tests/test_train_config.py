"""Configuration: to TOML and back, and what is refused."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from sharpkern.train.config import (
    PRESETS,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrackingConfig,
    TrainConfig,
    from_toml,
    to_toml,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

UNUSUAL = TrainConfig(
    model=ModelConfig(kind="cnn", depth=7, width=33, activation="tanh", parameterisation="mup", zero_readout=True),
    data=DataConfig(name="cifar-10", dir=Path("some/where"), text_file=Path("t.txt"), context=9, limit=77),
    optimizer=OptimizerConfig(name="gi-adam", eps=1e-30, lr=1e16, lr_init=0.1 + 0.2, power=0.5, decay="cosine"),
    tracking=TrackingConfig(tol=0.3, every=4, max_matvecs=11),
    loss="mse",
    steps=3,
    batch_size=5,
    seed=-2,
    threads=1,
)


@pytest.mark.parametrize("setting", [TrainConfig(), UNUSUAL, *PRESETS.values()], ids=["default", "unusual", *PRESETS])
def test_configuration_survives_toml(setting: TrainConfig) -> None:
    assert from_toml(to_toml(setting)) == setting


@pytest.mark.parametrize(
    "name", ['a "b"', "back\\slash", "new\nline\ttab", "caf\u00e9 \U0001f600", "\x7f\x01", "[x] # y = 1"]
)
def test_any_path_survives_toml(name: str) -> None:
    text = to_toml(TrainConfig(out=Path(name)))
    assert tomllib.loads(text)["out"] == name
    assert from_toml(text).out == Path(name)


def test_options_left_out_have_their_defaults() -> None:
    setting = from_toml("steps = 5\n[optimizer]\nlr = 1\n")
    assert setting == dataclasses.replace(TrainConfig(), steps=5, optimizer=OptimizerConfig(lr=1.0))
    assert isinstance(setting.optimizer.lr, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 5", "unknown option 'stepz'"),
        ("[optimizer]\nlearning_rate = 1", "\\[optimizer\\]: unknown option 'learning_rate'"),
        ("steps = 'five'", "steps = 'five' does not fit"),
        ("steps = 1.5", "steps = 1.5 does not fit"),
        ("steps = true", "steps = True does not fit"),
        ("[model]\nzero_readout = 1", "zero_readout = 1 does not fit"),
        ("[optimizer]\nname = 'sgdd'", "name = 'sgdd' does not fit"),
        ("[data]\ndir = 3", "dir = 3 does not fit"),
        ("steps = ", "not TOML"),
        ("model = 3", "model must be a table"),
        ("steps = 0", "steps must be at least 1, got 0"),
        ("batch_size = 0", "batch_size must be at least 1, got 0"),
        ("[model]\nkind = 'gpt'", "gpt needs text"),
        ("[tracking]\ntol = 1", "tracking.tol must lie between 0 and 1, got 1.0"),
        ("[tracking]\ntol = nan", "tracking.tol must lie between 0 and 1, got nan"),
        ("[tracking]\nevery = 0", "tracking.every must be at least 1, got 0"),
        ("[tracking]\nk = 0", "tracking.k must be at least 1, got 0"),
        ("[tracking]\nk = 9\nmax_matvecs = 8", "tracking.max_matvecs must be at least tracking.k = 9, got 8"),
        ("[tracking]\nbudget = 0", "tracking.budget must be a positive and finite fraction, got 0.0"),
        ("[tracking]\nprobe = 0", "tracking.probe must be at least 1, got 0"),
        ("[tracking]\nprobe = 5\ndataset = true", "give tracking.probe or tracking.dataset, not both"),
        ("[tracking]\ntf32 = true\ntol = 0.0049", "tracking.tol must be at least 0.005 with tracking.tf32, got 0.0049"),
        ("[optimizer]\nlr = inf", "optimizer.lr must be positive and finite, got inf"),
        ("[optimizer]\nlr_init = 0.2", "optimizer.lr_init must lie between 0 and optimizer.lr = 0.1, got 0.2"),
        ("[optimizer]\nlr_init = -0.1", "optimizer.lr_init must lie between 0 and"),
        ("[optimizer]\npower = 0", "optimizer.power must be positive and finite, got 0.0"),
        ("[optimizer]\nwarmup_steps = 0", "optimizer.warmup_steps must be at least 1"),
        (
            "steps = 5\n[optimizer]\nwarmup_steps = 5\ndecay = 'cosine'",
            "optimizer.decay must be constant unless steps is above optimizer.warmup_steps = 5, got cosine",
        ),
        ("[optimizer]\nmomentum = -0.1", "optimizer.momentum must be finite and at least 0, got -0.1"),
        ("[optimizer]\nbeta1 = 1", "optimizer.beta1 must be at least 0 and less than 1, got 1.0"),
        ("[optimizer]\nbeta2 = -0.1", "optimizer.beta2 must be at least 0 and less than 1, got -0.1"),
        ("[optimizer]\neps = -1e-8", "optimizer.eps must be finite and at least 0, got -1e-08"),
        ("[model]\ndepth = 1", "model.depth must be at least 2, got 1"),
        ("[model]\nkind = 'cnn'\nwidth = 0", "model.width must be at least 1, got 0"),
        ("[model]\nheads = 0", "model.heads must be at least 1, got 0"),
        ("[model]\nblocks = -1", "model.blocks must be at least 0, got -1"),
        ("[data]\nlimit = 0", "data.limit must be at least 1, got 0"),
        ("[data]\ncontext = 0", "data.context must be at least 1, got 0"),
        ("threads = 0", "threads must be at least 1, got 0"),
        ("task = 'a:b'\nloss = 'mse'", "leave out loss with task = 'a:b'"),
        ("loss = 'mse'\n[model]\nkind = 'gpt'\n[data]\nname = 'text'", "gpt needs --loss cross-entropy"),
    ],
)
def test_wrong_configurations_are_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        from_toml(text, "run.toml")
    assert "\n" not in str(caught.value)


def test_configurations_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().steps = 3  # type: ignore[misc]
