"""Options of a run: a preset or a TOML file, and flags that override it. ``train/config.py`` declares all of them.

A flag is made for each option of ``TrainConfig`` that a command uses, so that none has to be declared twice.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..train.config import PRESETS, TrainConfig, from_toml, read_toml

PROBLEM = ("task", "model", "data", "loss", "batch_size", "seed", "threads")
EVERYTHING = tuple(f.name for f in dataclasses.fields(TrainConfig))
TASK_HELP = """your own model:
  --task package.module:function calls function(), which returns (model, loss_fn, data):
    model    a torch.nn.Module
    loss_fn  loss_fn(output, targets) -> scalar
    data     one batch, a tuple (inputs, targets); or a list, DataLoader or other finite
             iterable of batches, which is read once and kept in memory
  The current directory is looked in first, as with python -m. Options of the reference
  model, its data, its loss and its batch size are refused beside it."""
# The two that name a user's own files have a shorter spelling, which error messages use.
_SHORT = {"data.dir": "--data-dir", "data.text_file": "--text-file"}
_METAVARS = {int: "N", float: "X", Path: "PATH", str: "MODULE:FUNCTION"}


def add_run_options(parser: argparse.ArgumentParser, keys: Sequence[str], *, resume: bool = False) -> None:
    """Add the options of a run.

    Args:
        parser: of a command.
        keys: options of ``TrainConfig`` that the command uses, as in ``loss``, ``optimizer.lr``, or whole tables. The
            others are taken too, but are not in the help: one command line serves for suggest, audit and train.
        resume: add ``--resume`` too.
    """
    # Exclusive, for none of the three could say which of two whole configurations comes first.
    sources = parser.add_argument_group("where options come from").add_mutually_exclusive_group()
    sources.add_argument("--preset", choices=list(PRESETS), help="start from a named configuration")
    sources.add_argument(
        "--config", type=Path, metavar="FILE.toml", help="start from a file such as a run's config.toml"
    )
    if resume:
        sources.add_argument(
            "--resume", type=Path, metavar="FOLDER", help="go on with the run in this folder; takes no other option"
        )
    # argparse would list some forty options there, before it says what the command does.
    parser.usage = "%(prog)s [OPTIONS]"
    tables = get_type_hints(TrainConfig)
    groups: dict[str, Any] = {"": parser.add_argument_group("run")}
    for option in declared():
        table = option.key.rpartition(".")[0]
        if option.key not in keys and table not in keys:
            # Taken, so that one command line serves for several commands; not shown, as it has no effect here.
            option.add_to(parser, hidden=True)
            continue
        if table not in groups:
            groups[table] = parser.add_argument_group(f"[{table}]", tables[table].__doc__)
        option.add_to(groups[table])


def read_run_options(given: argparse.Namespace) -> TrainConfig:
    """Combine preset or file with the flags.

    Args:
        given: of a parser with ``add_run_options``.

    Raises:
        FileNotFoundError: no such file or run folder.
        ValueError: a value is refused, or ``--resume`` was given with other options.
    """
    # Only flags that were given: the others left no value (``SUPPRESS``), so a preset or a file keeps its own.
    flags = {o.key: vars(given)[o.key] for o in declared() if o.key in given}
    folder: Path | None = getattr(given, "resume", None)
    if folder is not None:
        if flags:
            raise ValueError("--resume takes the run's own configuration: give no other option with it.")
        if not (folder / "config.toml").is_file():
            raise FileNotFoundError(f"{folder} is not a run folder: it has no config.toml.")
        # The folder may have been moved or copied since its config.toml was written.
        flags["out"] = folder
    path = given.config if folder is None else folder / "config.toml"
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file.")
    config = PRESETS[given.preset] if given.preset else TrainConfig()
    if path is not None:
        config = from_toml(read_toml(path), str(path))
    for key, value in flags.items():
        config = _with(config, key, value)
    # Once, when all is put together: a flag may mend what another option made impossible.
    config.validate()
    return config


@dataclasses.dataclass(frozen=True)
class Option:
    """A flag for one option.

    Attributes:
        key: as in ``optimizer.lr``; also the name of its value in the parser's result, absent if it is not given.
        type: its annotation.
        help: its explanation.
        default: without preset, file and flag.
    """

    key: str
    type: Any
    help: str
    default: Any

    def add_to(self, group: Any, *, hidden: bool = False) -> None:
        """Add the flag to a parser or its group; it leaves no value behind where it is not given."""
        # ``int | None`` gives int first; None is the default and cannot be asked for.
        kinds = get_args(self.type) or (self.type,)
        keywords: dict[str, Any] = {"type": kinds[0], "metavar": _METAVARS.get(kinds[0])}
        if get_origin(self.type) is Literal:
            keywords = {"choices": kinds}
        elif kinds[0] is bool:
            # With a --no- form, which takes back what a preset or a file has switched on.
            keywords = {"action": argparse.BooleanOptionalAction}
        flags = ["--" + self.key.replace("_", "-"), *filter(None, [_SHORT.get(self.key)])]
        about = self.help if self.default is None else f"{self.help} (default: {self.default})"
        # argparse formats help with %, so one in a sentence is doubled.
        about = argparse.SUPPRESS if hidden else about.replace("%", "%%")
        group.add_argument(*flags, dest=self.key, default=argparse.SUPPRESS, help=about, **keywords)


def declared(table: Any = TrainConfig, prefix: str = "") -> Iterator[Option]:
    """List every option of a run.

    Args:
        table: a dataclass whose fields are annotated with their explanations, or are such dataclasses themselves.
        prefix: of the keys, for the tables inside.
    """
    # With ``include_extras``, as the explanations are the extras of ``Annotated``.
    hints = get_type_hints(table, include_extras=True)
    tables = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    # Options before tables, as in the TOML file: help lists them in this order.
    for f in dataclasses.fields(table):
        if f.name not in tables:
            kind, explanation = get_args(hints[f.name])
            yield Option(prefix + f.name, kind, explanation, f.default)
    for name, inner in tables.items():
        yield from declared(inner, f"{prefix}{name}.")


def _with(config: Any, key: str, value: Any) -> Any:
    """Return a configuration with one option changed."""
    # The dataclasses are frozen, so each one on the way down is replaced.
    name, _, rest = key.partition(".")
    return dataclasses.replace(config, **{name: _with(getattr(config, name), rest, value) if rest else value})
