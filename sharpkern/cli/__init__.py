"""The command line: ``sharpkern train | suggest | sweep | report | audit | bench | doctor``.

A command is a module of this folder with ``DESCRIPTION``, ``add_options(parser)`` and ``run(given) -> exit code``.
Torch is imported in ``run``, so that ``--help`` does not wait for it.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from importlib import import_module

from ..train.signals import ended_like_ctrl_c
from .exits import INTERRUPTED, OK, USER_ERROR, Parser, complain

COMMANDS = {
    "train": "train a reference model or your own, tracking its sharpness at every step",
    "suggest": "measure a model, and recommend initial and target learning rate and warmup length",
    "sweep": "train a grid of runs from one TOML file: a phase diagram",
    "report": "draw a sweep's phase diagrams: one HTML page, and PNGs",
    "audit": "check the Hessian-vector products of a model against independent truths",
    "bench": "compare with every peer that is installed (needs a source checkout; --quick for a first look)",
    "doctor": "show versions, kernel backends, and why one is missing",
}


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
    try:
        # A bare ``sharpkern`` shows its help too, but is a mistake: a script that forgot the command must not go on.
        given = _parse(arguments or ["--help"])
        if given is None:
            return OK if arguments else USER_ERROR
        with ended_like_ctrl_c():
            code: int = given.run(given)
        return code
    # What the package raises for a user's mistake. Anything else is a bug, and keeps its traceback.
    except (ValueError, OSError, TypeError, RuntimeError) as error:
        return complain(_one_line(error))
    except KeyboardInterrupt:
        return complain("interrupted; the run folder keeps what was done, --resume continues.", INTERRUPTED)


def _parse(arguments: list[str]) -> Namespace | None:
    """Parse a command line; None if it was only ``--help`` or ``--version``, which have printed."""
    from .. import __version__

    parser = Parser(prog="sharpkern", description="sharpkern COMMAND --help explains a command's options.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, about in COMMANDS.items():
        command = commands.add_parser(name, help=about)
        if name in arguments:  # the others' options would be made for nothing
            module = import_module(f".{name}", __name__)
            command.description = module.DESCRIPTION
            command.set_defaults(run=module.run)
            module.add_options(command)
    try:
        given, unknown = parser.parse_known_args(arguments)
    # Only --help and --version end so: ``Parser.error`` raises a ValueError instead.
    except SystemExit:
        return None
    if unknown:  # told by the command's parser, whose help lists the known ones
        commands.choices[given.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return given


def _one_line(error: Exception) -> str:
    # Without the number of the error, which str() puts in front.
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return (str(error) or type(error).__name__).splitlines()[0]
