"""What a run is: frozen dataclasses, written to and read from TOML.

Every option's type is annotated with its explanation, which the command line shows.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# The limit is written down twice: importing the tracker for it would import torch, for which --help would wait.
TF32_TOL = 0.005  # the tracker's own limit: below it TF32's rounding would be most of a residual


@dataclass(frozen=True)
class ModelConfig:
    """The reference model. Its kind says which of the other options play a part."""

    kind: Annotated[Literal["fcn", "cnn", "gpt"], "fully connected, convolutional with layer norm, or a small GPT"] = (
        "fcn"
    )
    depth: Annotated[int, "fcn: linear layers, readout included"] = 4
    width: Annotated[int, "fcn: hidden width; cnn: channels of the first convolutions; gpt: residual stream"] = 512
    activation: Annotated[Literal["relu", "gelu", "tanh"], "fcn: activation"] = "relu"
    parameterisation: Annotated[
        Literal["sp", "ntp", "mup"], "fcn: standard, neural tangent or maximal update parameterisation"
    ] = "sp"
    zero_readout: Annotated[bool, "fcn: start with a readout of zero"] = False
    heads: Annotated[int, "gpt: attention heads"] = 4
    blocks: Annotated[int, "gpt: transformer blocks"] = 4
    last_norm: Annotated[bool, "gpt: layer norm before the readout"] = True


@dataclass(frozen=True)
class DataConfig:
    """The data, of which the test set gives the accuracy."""

    name: Annotated[
        Literal["fashion-mnist-5k", "fashion-mnist", "mnist", "cifar-10", "digits", "text"],
        "data set; fashion-mnist-5k and text need no files",
    ] = "fashion-mnist-5k"
    dir: Annotated[Path | None, "folder with IDX files or CIFAR-10's binary version"] = None
    text_file: Annotated[Path | None, "text: a UTF-8 file; Python's language reference by default"] = None
    context: Annotated[int, "text: tokens in a sequence"] = 64
    limit: Annotated[int | None, "keep the first so many training examples"] = None


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule."""

    name: Annotated[Literal["sgd", "adam", "gi-adam", "ri-adam"], "optimizer"] = "sgd"
    momentum: Annotated[float, "sgd: momentum"] = 0.0
    beta1: Annotated[float, "adam: decay of the first moment"] = 0.9
    beta2: Annotated[float, "adam: decay of the second moment"] = 0.999
    eps: Annotated[float, "adam: added to the root"] = 1e-8
    lr: Annotated[float, "target learning rate"] = 0.1
    lr_init: Annotated[float, "where warmup starts; at most lr"] = 0.0
    critical_start: Annotated[
        bool,
        "start at the critical learning rate instead, measured on the first batch, with the slope of a start from zero",
    ] = False
    warmup_steps: Annotated[int, "steps until the target is reached; 1 is no warmup"] = 1
    power: Annotated[float, "exponent of the warmup; 1 is linear"] = 1.0
    decay: Annotated[
        Literal["constant", "cosine"], "after warmup; cosine ends at a tenth of the target, at the last step"
    ] = "constant"


@dataclass(frozen=True)
class TrackingConfig:
    """How the sharpness is tracked."""

    tol: Annotated[float, "relative residual at which a solve stops"] = 0.01
    every: Annotated[int, "measure every so many steps"] = 1
    max_matvecs: Annotated[int, "the most Hessian-vector products per solve"] = 80
    k: Annotated[int, "how many of the largest eigenvalues to track"] = 1
    budget: Annotated[
        float | None,
        "spend at most this fraction of the steps' own time on tracking; the steps measured then depend on the clock. "
        "With mini-batches, without probe or dataset, the Hessian is that of the first examples of the first batch, as "
        "many as the budget pays for",
    ] = None
    probe: Annotated[
        int | None,
        "track the Hessian of the first so many training examples, instead of that of each step's own batch",
    ] = None
    dataset: Annotated[bool, "track the Hessian of the whole training set, added up over its batches"] = False
    block: Annotated[
        Literal["no", "yes", "auto"],
        "multiply three vectors at a time: half the products one after the other, and more memory; auto measures at "
        "the first step whether that pays",
    ] = "no"
    tf32: Annotated[bool, "on a GPU, let the products round to TF32; needs a tol of at least 0.005"] = False
    chunk: Annotated[int | None, "differentiate at most so many examples of a batch at a time, to save memory"] = None
    recompute: Annotated[
        bool, "keep a part of the forward pass only, and compute the rest again: less memory, twice a product's time"
    ] = False
    products: Annotated[
        bool, "track the sharpness; without, only batch sharpness and update curvature are measured, at every step"
    ] = True
    directions: Annotated[
        bool | None,
        "measure batch sharpness and update curvature at every step, or at none; by default only what costs half a "
        "product at steps where the sharpness is measured",
    ] = None


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    task: Annotated[
        str | None,
        "your own model instead of a reference one: package.module:function, which returns (model, loss_fn, data)",
    ] = None
    loss: Annotated[
        Literal["mse", "cross-entropy"], "mse: half the mean over batch and outputs of (output - one-hot)^2"
    ] = "cross-entropy"
    steps: Annotated[int, "number of optimizer steps"] = 200
    batch_size: Annotated[int | None, "examples in a mini-batch; full batch by default"] = None
    seed: Annotated[int, "of weights and data order"] = 0
    threads: Annotated[int | None, "torch threads; torch's own choice by default"] = None
    eval_every: Annotated[int, "measure accuracy every so many steps"] = 10
    checkpoint_every: Annotated[int, "steps between checkpoints"] = 25
    out: Annotated[Path, "run folder"] = Path("runs/run")

    def validate(self) -> None:
        """Refuse values that no run can have.

        Raises:
            ValueError: which option, its value, and what is needed.
        """
        # Flags and files come here alike, and before data and model are made: a wrong value costs no time.
        for key, is_right, need in limits(self):
            if not is_right:
                raise ValueError(f"{key} must {need}, got {value_of(self, key)}.")
        if self.task is not None:
            self._validate_task()
        elif (self.model.kind == "gpt") != (self.data.name == "text"):
            raise ValueError(f"the model {self.model.kind!r} does not fit the data {self.data.name!r}: gpt needs text.")
        if self.model.kind == "gpt" and self.loss == "mse":
            raise ValueError("the gpt needs --loss cross-entropy.")
        if self.tracking.dataset and self.tracking.probe is not None:
            raise ValueError("give tracking.probe or tracking.dataset, not both.")

    def _validate_task(self) -> None:
        """Refuse options that a task would silently ignore."""
        # Compared with the defaults, not with what was given: the config.toml that a run leaves holds every option, and
        # must be good to resume from.
        plain = TrainConfig()
        for name in ("model", "data", "loss", "batch_size"):
            if getattr(self, name) != getattr(plain, name):
                raise ValueError(
                    f"a task brings its own model, data and loss: leave out {name} with task = {self.task!r}."
                )


Limit = tuple[str, bool, str]  # key, whether its value is right, what it must do


def limits(config: TrainConfig) -> list[Limit]:
    """List what the values of options must do, and whether a configuration's own do."""
    return [
        *_run_limits(config),
        *_problem_limits(config),
        *_optimizer_limits(config),
        *_tracking_limits(config.tracking),
    ]


def _run_limits(config: TrainConfig) -> list[Limit]:
    at_least = "be at least 1"
    return [
        ("steps", config.steps >= 1, at_least),
        ("eval_every", config.eval_every >= 1, at_least),
        ("checkpoint_every", config.checkpoint_every >= 1, at_least),
        ("batch_size", config.batch_size is None or config.batch_size >= 1, at_least),
        ("threads", config.threads is None or config.threads >= 1, at_least),
    ]


def _problem_limits(config: TrainConfig) -> list[Limit]:
    model, data = config.model, config.data
    return [
        ("model.depth", model.kind != "fcn" or model.depth >= 2, "be at least 2"),
        ("model.width", model.width >= 1, "be at least 1"),
        ("model.heads", model.heads >= 1, "be at least 1"),
        ("model.blocks", model.blocks >= 0, "be at least 0"),
        ("data.context", data.context >= 1, "be at least 1"),
        ("data.limit", data.limit is None or data.limit >= 1, "be at least 1"),
    ]


def _optimizer_limits(config: TrainConfig) -> list[Limit]:
    # WarmupLR refuses the last five too, but speaks of its arguments and not of options.
    o, fraction = config.optimizer, "be at least 0 and less than 1"
    return [
        ("optimizer.momentum", 0 <= o.momentum < math.inf, "be finite and at least 0"),
        ("optimizer.beta1", 0 <= o.beta1 < 1, fraction),
        ("optimizer.beta2", 0 <= o.beta2 < 1, fraction),
        ("optimizer.eps", 0 <= o.eps < math.inf, "be finite and at least 0"),
        ("optimizer.lr", 0 < o.lr < math.inf, "be positive and finite"),
        ("optimizer.lr_init", 0 <= o.lr_init <= o.lr, f"lie between 0 and optimizer.lr = {o.lr}"),
        ("optimizer.warmup_steps", o.warmup_steps >= 1, "be at least 1, which is no warmup"),
        ("optimizer.power", 0 < o.power < math.inf, "be positive and finite"),
        (
            "optimizer.decay",
            o.decay == "constant" or config.steps > o.warmup_steps,
            f"be constant unless steps is above optimizer.warmup_steps = {o.warmup_steps}",
        ),
    ]


def _tracking_limits(t: TrackingConfig) -> list[Limit]:
    return [
        ("tracking.tol", 0 < t.tol < 1, "lie between 0 and 1"),
        ("tracking.tol", not t.tf32 or t.tol >= TF32_TOL, f"be at least {TF32_TOL} with tracking.tf32"),
        ("tracking.every", t.every >= 1, "be at least 1"),
        ("tracking.k", t.k >= 1, "be at least 1"),
        ("tracking.max_matvecs", t.max_matvecs >= t.k, f"be at least tracking.k = {t.k}"),
        ("tracking.budget", t.budget is None or 0 < t.budget < math.inf, "be a positive and finite fraction"),
        ("tracking.probe", t.probe is None or t.probe >= 1, "be at least 1"),
        ("tracking.chunk", t.chunk is None or t.chunk >= 1, "be at least 1"),
        ("tracking.products", t.products or t.directions is not False, "be true where tracking.directions is false"),
    ]


# Past the initial threshold at once, and far enough for a second catapult, which is over before the last step.
DEMO = TrainConfig(
    optimizer=OptimizerConfig(lr=0.8, warmup_steps=60),
    loss="mse",
    steps=70,
    out=Path("runs/demo"),
)
PRESETS = {"demo": DEMO}


def value_of(config: TrainConfig, key: str) -> Any:
    """Return an option's value by its key.

    Args:
        config: where to look.
        key: as in ``loss`` or ``optimizer.lr``.

    Raises:
        AttributeError: no such option.
    """
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def to_toml(config: TrainConfig) -> str:
    """Write a configuration; options that are None are left out."""
    # The plain options come first: in TOML a key below a table's head belongs to that table.
    tables = [("", config)] + [
        (f.name, v) for f in dataclasses.fields(config) if _is_table(v := getattr(config, f.name))
    ]
    lines: list[str] = []
    for name, table in tables:
        lines += [f"\n[{name}]"] if name else []
        # None has no form in TOML. Leaving it out is right, because None is the default of every option that may be
        # None.
        for f in dataclasses.fields(table):
            value = getattr(table, f.name)
            if value is not None and not _is_table(value):
                lines.append(f"{f.name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def from_toml(text: str, source: str = "the configuration") -> TrainConfig:
    """Read a configuration; options that are left out have their defaults.

    Args:
        text: TOML.
        source: the file, for error messages.

    Raises:
        ValueError: no TOML, an unknown option, a value of the wrong type, or one that ``validate`` refuses.
    """
    result: TrainConfig = build(TrainConfig, parse_toml(text, source), source)
    validate(result, source)
    return result


def validate(config: TrainConfig, source: str) -> None:
    """Refuse values that no run can have, as ``TrainConfig.validate``; the error names the file."""
    try:
        config.validate()
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """Parse TOML into nested dictionaries; ``source`` names the text in the error.

    Raises:
        ValueError: no TOML.
    """
    try:
        return tomllib.loads(text)
    # Not TOMLDecodeError alone: numbers of thousands of digits and brackets as deep as that raise errors of Python's.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not TOML: {error}.") from error


def read_toml(path: Path) -> str:
    """Return the text of a TOML file.

    Raises:
        ValueError: it is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not TOML: no UTF-8 at byte {error.start}.") from error


def build(cls: Any, values: dict[str, Any], where: str) -> Any:
    """Make a configuration, or one of its tables, from what a TOML file holds.

    Args:
        cls: the dataclass.
        values: by option; a whole number will do for a float.
        where: the file, for error messages.

    Raises:
        ValueError: an unknown option, or a value of the wrong type.
    """
    # Resolves the annotations, which are strings in this file, and drops the explanations from ``Annotated``.
    hints = get_type_hints(cls)
    # Refused, for a misspelt option would silently train something else.
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
        # The values of a Literal, the members of a union, or the one type: the three forms that options have.
        allowed = getattr(hint, "__args__", (hint,))
        if Path in allowed and isinstance(value, str):
            value = Path(value)
        # By type() and not isinstance(): True is an int for isinstance(), and ``lr = true`` must not become 1.0.
        if float in allowed and type(value) is int:
            value = _as_float(value)
        # A Path is asked for by isinstance(), because its type is PosixPath, which no annotation names.
        fits = value in allowed if isinstance(allowed[0], str) else type(value) in allowed or isinstance(value, Path)
        if not fits:
            raise ValueError(f"{where}: {name} = {value!r} does not fit {hint}.")
        arguments[name] = value
    return cls(**arguments)


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf  # as TOML's own 1e999, which ``validate`` then refuses where it has no meaning


def _is_table(value: Any) -> bool:
    return dataclasses.is_dataclass(value)


def _toml(value: Any) -> str:
    # Before int, of which bool is a subclass.
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        # repr() of a float is the shortest text that reads back as the same float: a resumed run has the same numbers.
        return repr(value)
    # a JSON string is a basic string of TOML, but for DEL and for pairs of surrogates
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
