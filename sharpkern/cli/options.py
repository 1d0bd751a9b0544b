"""Options of a run: a preset or a TOML file, and flags that override it. ``train/config.py`` declares all of them.

A flag is made for each option of ``TrainConfig``, so that none has to be declared twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import typer

from ..train.config import PRESETS, TrainConfig, from_toml, read_toml

PROBLEM = ("task", "model", "data", "loss", "batch_size", "seed", "threads")
EVERYTHING = tuple(f.name for f in dataclasses.fields(TrainConfig))
# \b keeps a paragraph's lines as they are, so none is longer than a terminal of 80 columns shows.
TASK_HELP = """\b
Your own model: --task package.module:function calls function(), which returns
(model, loss_fn, data):
  model    a torch.nn.Module
  loss_fn  loss_fn(output, targets) -> scalar
  data     one batch, a tuple (inputs, targets); or a list, DataLoader or other
           finite iterable of batches, read once and kept in memory

The current directory is looked in first, as with python -m. Options of the reference model, its data, its loss and its
batch size are refused beside it."""
# The two that name a user's own files have a shorter spelling, which error messages use.
_SHORT = {"data.dir": ["--data-dir"], "data.text_file": ["--text-file"]}


def with_run_options(*used: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command the options of a run: it is called with the ``TrainConfig`` that they make, and its own options.

    Args:
        used: options of ``TrainConfig`` that the command uses, as in ``loss``, ``optimizer.lr``, or whole tables. The
            others are taken too, but are not in the help: one command line serves for suggest, audit and train.
    """

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        _, *own = signature(command, eval_str=True).parameters.values()

        def parsed(preset: str | None, config: Path | None, **given: Any) -> int:
            mine = {p.name: given.pop(p.name) for p in own}
            # Only those that were given, so that the others keep what the preset or the file says.
            flags = {name.replace("__", "."): value for name, value in given.items() if value is not None}
            return command(read_run_options(flags, preset, config, mine.get("resume")), **mine)

        # typer makes a command's options from its signature.
        sources = [
            _parameter("preset", Literal[tuple(PRESETS)], help="start from a named configuration"),
            _parameter("config", Path, help="start from a TOML file such as a run's config.toml"),
        ]
        parsed.__signature__ = Signature([*sources, *own, *_declared(used)])  # type: ignore[attr-defined]
        return parsed

    return decorate


def read_run_options(
    flags: dict[str, Any], preset: str | None = None, config: Path | None = None, resume: Path | None = None
) -> TrainConfig:
    """Combine preset or file with the flags.

    Args:
        flags: values by key, as in ``optimizer.lr``.
        preset: a name in ``PRESETS``.
        config: a TOML file.
        resume: a run folder, whose configuration is the run's.

    Raises:
        FileNotFoundError: no such file or run folder.
        ValueError: a value is refused, or options were given that exclude each other.
    """
    # None of the three could say which of two whole configurations comes first.
    if preset and config:
        raise ValueError("give --preset or --config, not both.")
    if resume is not None:
        if flags or preset or config:
            raise ValueError("--resume takes the run's own configuration: give no other option with it.")
        config = resume / "config.toml"
        if not config.is_file():
            raise FileNotFoundError(f"{resume} is not a run folder: it has no config.toml.")
        # The folder may have been moved or copied since its config.toml was written.
        flags = {"out": resume}
    if config is not None and not config.is_file():
        raise FileNotFoundError(f"{config}: no such configuration file.")
    run = PRESETS[preset] if preset else TrainConfig()
    if config is not None:
        run = from_toml(read_toml(config), str(config))
    for key, value in flags.items():
        run = _with(run, key, value)
    # Once, when all is put together: a flag may mend what another option made impossible.
    run.validate()
    return run


def _declared(used: Sequence[str], table: Any = TrainConfig, prefix: str = "") -> Iterator[Parameter]:
    """Make a parameter of every field of a dataclass that is annotated with its explanation, or is such a dataclass."""
    # With ``include_extras``, as the explanations are the extras of ``Annotated``.
    hints = get_type_hints(table, include_extras=True)
    tables = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    # Options before tables, as in the TOML file: help lists them in this order.
    for f in (f for f in dataclasses.fields(table) if f.name not in tables):
        kind, about = get_args(hints[f.name])
        key, name = prefix + f.name, f"{prefix}{f.name}".replace("_", "-")
        # With a --no- form, which takes back what a preset or a file has switched on.
        flag = f"--{name}/--no-{name}" if bool in (kind, *get_args(kind)) else f"--{name}"
        about += "" if f.default is None else f"  [default: {f.default}]"
        hidden = not {key, key.partition(".")[0]} & {*used}
        yield _parameter(key, kind, flag, *_SHORT.get(key, ()), help=about, hidden=hidden)
    for name, inner in tables.items():
        yield from _declared(used, inner, f"{name}.")


def _parameter(key: str, kind: Any, *flags: str, **settings: Any) -> Parameter:
    # A parameter's name has no dot. None is the value of an option that is not given.
    kind = Annotated[kind | None, typer.Option(*flags, **settings)]
    return Parameter(key.replace(".", "__"), Parameter.KEYWORD_ONLY, default=None, annotation=kind)


def _with(config: Any, key: str, value: Any) -> Any:
    """Return a configuration with one option changed."""
    # The dataclasses are frozen, so each one on the way down is replaced.
    name, _, rest = key.partition(".")
    return dataclasses.replace(config, **{name: _with(getattr(config, name), rest, value) if rest else value})
