"""What a run is: frozen dataclasses, written to and read from TOML."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints


@dataclass(frozen=True)
class ModelConfig:
    """The model."""

    kind: Literal["fcn", "cnn", "gpt"] = "fcn"
    """fully connected, convolutional with layer norm, or a small GPT"""
    depth: int = 4
    """fcn: linear layers, readout included"""
    width: int = 512
    """fcn: hidden width; cnn: channels of the first convolutions; gpt: residual stream"""
    activation: Literal["relu", "gelu", "tanh"] = "relu"
    """fcn: activation"""
    parameterisation: Literal["sp", "ntp", "mup"] = "sp"
    """fcn: standard, neural tangent or maximal update parameterisation"""
    zero_readout: bool = False
    """fcn: start with a readout of zero"""
    heads: int = 4
    """gpt: attention heads"""
    blocks: int = 4
    """gpt: transformer blocks"""
    last_norm: bool = True
    """gpt: layer norm before the readout"""


@dataclass(frozen=True)
class DataConfig:
    """The data."""

    name: Literal["fashion-mnist-5k", "fashion-mnist", "mnist", "cifar-10", "digits", "text"] = "fashion-mnist-5k"
    """data set; fashion-mnist-5k and text need no files"""
    dir: Path | None = None
    """folder with IDX files or CIFAR-10's binary version"""
    text_file: Path | None = None
    """text: a UTF-8 file; Python's language reference by default"""
    context: int = 64
    """text: tokens in a sequence"""
    limit: int | None = None
    """keep the first so many training examples"""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule."""

    name: Literal["sgd", "adam", "gi-adam", "ri-adam"] = "sgd"
    """optimizer"""
    momentum: float = 0.0
    """sgd: momentum"""
    beta1: float = 0.9
    """adam: decay of the first moment"""
    beta2: float = 0.999
    """adam: decay of the second moment"""
    eps: float = 1e-8
    """adam: added to the root"""
    lr: float = 0.1
    """target learning rate"""
    lr_init: float = 0.0
    """where warmup starts"""
    critical_start: bool = False
    """start at the critical learning rate instead, measured on the first batch, with the slope of a start from zero"""
    warmup_steps: int = 1
    """1 is no warmup"""
    power: float = 1.0
    """exponent of the warmup; 1 is linear"""
    decay: Literal["constant", "cosine"] = "constant"
    """after warmup"""


@dataclass(frozen=True)
class TrackingConfig:
    """How the sharpness is tracked."""

    tol: float = 0.01
    """relative residual at which a solve stops"""
    every: int = 1
    """measure every so many steps"""
    max_matvecs: int = 80
    """the most Hessian-vector products per solve"""


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    loss: Literal["mse", "cross-entropy"] = "cross-entropy"
    """mse: half the mean over batch and outputs of (output - one-hot)^2"""
    steps: int = 200
    """optimizer steps"""
    batch_size: int | None = None
    """examples in a mini-batch; full batch by default"""
    seed: int = 0
    """of weights and data order"""
    threads: int | None = None
    """torch threads; torch's own choice by default"""
    eval_every: int = 10
    """measure accuracy every so many steps"""
    checkpoint_every: int = 25
    """steps between checkpoints"""
    out: Path = Path("runs/run")
    """run folder"""

    def validate(self) -> None:
        """Refuse values that no run can have.

        Raises:
            ValueError: which option, its value, and what is needed.
        """
        for name in ("steps", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}.")
        if (self.model.kind == "gpt") != (self.data.name == "text"):
            raise ValueError(f"the model {self.model.kind!r} does not fit the data {self.data.name!r}: gpt needs text.")
        if self.model.kind == "gpt" and self.loss == "mse":
            raise ValueError("the gpt needs --loss cross-entropy.")


# Past the initial threshold at once, and far enough for a second catapult, which is over before the last step.
DEMO = TrainConfig(
    optimizer=OptimizerConfig(lr=0.8, warmup_steps=60),
    loss="mse",
    steps=70,
    out=Path("runs/demo"),
)
PRESETS = {"demo": DEMO}


def to_toml(config: TrainConfig) -> str:
    """Write a configuration; options that are None are left out."""
    tables = [("", config)] + [
        (f.name, v) for f in dataclasses.fields(config) if _is_table(v := getattr(config, f.name))
    ]
    lines: list[str] = []
    for name, table in tables:
        lines += [f"\n[{name}]"] if name else []
        for f in dataclasses.fields(table):
            value = getattr(table, f.name)
            if value is not None and not _is_table(value):
                lines.append(f"{f.name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def from_toml(text: str, source: str = "the configuration") -> TrainConfig:
    """Read a configuration; options that are left out have their defaults.

    Raises:
        ValueError: no TOML, an unknown option, or a value of the wrong type.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{source}: not TOML: {error}.") from error
    result: TrainConfig = build(TrainConfig, tables, source)
    result.validate()
    return result


def build(cls: Any, values: dict[str, Any], where: str) -> Any:
    """Make a configuration, or one of its tables, from what a TOML file holds.

    Args:
        cls: the dataclass.
        values: by option; a whole number will do for a float.
        where: the file, for error messages.

    Raises:
        ValueError: an unknown option, or a value of the wrong type.
    """
    hints = get_type_hints(cls)
    if unknown := values.keys() - hints.keys():
        raise ValueError(f"{where}: unknown option {sorted(unknown)[0]!r}; known are {', '.join(hints)}.")
    arguments = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {name} must be a table, got {value!r}.")
            arguments[name] = build(hint, value, f"{where}, [{name}]")
            continue
        allowed = getattr(hint, "__args__", (hint,))
        if Path in allowed and isinstance(value, str):
            value = Path(value)
        if float in allowed and type(value) is int:
            value = float(value)
        fits = value in allowed if isinstance(allowed[0], str) else type(value) in allowed or isinstance(value, Path)
        if not fits:
            raise ValueError(f"{where}: {name} = {value!r} does not fit {hint}.")
        arguments[name] = value
    return cls(**arguments)


def _is_table(value: Any) -> bool:
    return dataclasses.is_dataclass(value)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    # a JSON string is a basic string of TOML, but for DEL and for pairs of surrogates
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
