"""The command line: ``sharpkern train | suggest | sweep | report | audit | bench | doctor``.

A command is a module of this folder: ``DESCRIPTION``, and ``run``, from whose annotations typer makes the options and
which returns the exit code. Torch is imported in ``run``, so that ``--help`` does not wait for it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from .. import __version__
from ..train.signals import ended_like_ctrl_c
from .exits import EXIT_CODES, OK, USER_ERROR, complain

if TYPE_CHECKING:
    import typer

COMMANDS = {
    "train": "train a reference model or your own, tracking its sharpness at every step",
    "suggest": "measure a model, and recommend initial and target learning rate and warmup length",
    "sweep": "train a grid of runs from one TOML file: a phase diagram",
    "report": "draw a sweep's phase diagrams: one HTML page, and PNGs",
    "audit": "check the Hessian-vector products of a model against independent truths",
    "bench": "compare with every peer that is installed (needs a source checkout; --quick for a first look)",
    "doctor": "show versions, kernel backends, and why one is missing",
}
HELP = "\n".join(
    [
        "usage: sharpkern COMMAND [OPTIONS]\n",
        *(f"  {name:9}{about}" for name, about in COMMANDS.items()),
        "\nsharpkern COMMAND --help explains a command's options.\n",
        EXIT_CODES,
    ]
)


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: command and options; None for the process's own.

    Returns:
        0; 1 if an audit failed or cells of a sweep have no result; 2 after a user's error, in one line, and where a
        run's folder is in use, was removed or is on a full disk; 3 if the loss was not finite; 130 after Ctrl-C,
        SIGTERM or SIGHUP.
    """
    arguments = sys.argv[1:] if argv is None else argv
    # These two do without typer, whose import would take most of their time.
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        # A bare ``sharpkern`` shows its help too, but is a mistake: a script that forgot the command must not go on.
        return OK if arguments else USER_ERROR
    if arguments[0] == "--version":
        print(__version__)
        return OK
    import typer

    try:
        with ended_like_ctrl_c():
            code: int = _command(arguments[0]).main(arguments, prog_name="sharpkern", standalone_mode=False)
        return code
    except typer.TyperException as error:
        # No context: an option without its value, of the command that was named.
        context = getattr(error, "ctx", None)
        help_of = context.command_path if context else f"sharpkern {arguments[0]}"
        message = " ".join(error.format_message().split()).rstrip(".")
        return complain(f"{message} - see {help_of} --help.")
    # What the package raises for a user's mistake. Anything else is a bug, and keeps its traceback.
    except (ValueError, OSError, TypeError, RuntimeError) as error:
        return complain(_one_line(error))


def _command(name: str) -> typer.core.TyperGroup:
    import typer

    # ``main`` shows its --help. Plain text, because rich breaks long names and choices apart on 80 columns.
    app = typer.Typer(add_completion=False, add_help_option=False, rich_markup_mode=None)
    # The others' options would be made for nothing; but typer needs all names to propose one for a wrong one.
    for known in [name] if name in COMMANDS else COMMANDS:
        module = import_module(f".{known}", __name__)
        app.command(
            known, help=module.DESCRIPTION, epilog=f"\b\n{EXIT_CODES}",
            context_settings={"help_option_names": ["-h", "--help"]},
        )(module.run)  # fmt: skip
    return typer.main.get_group(app)


def _one_line(error: Exception) -> str:
    # Without the number of the error, which str() puts in front.
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return (str(error) or type(error).__name__).splitlines()[0]
