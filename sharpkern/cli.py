"""The command line: ``sharpkern train | audit | doctor``. torch is imported only by what needs it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    from .train.config import TrainConfig
    from .train.metrics import Row

USAGE = """usage: sharpkern COMMAND [OPTIONS]

  train    train a reference model, tracking its sharpness at every step
  audit    check the Hessian-vector products of a reference model against independent truths
  doctor   show versions, kernel backends, and why one is missing

sharpkern COMMAND --help explains the options of a command."""
OK, FAILED, USER_ERROR, DIVERGED, INTERRUPTED = 0, 1, 2, 3, 130


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 1 if an audit failed; 2 after a user's error, in one line; 3 if the loss was not finite; 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return OK if arguments else USER_ERROR
    if arguments[0] == "--version":
        from . import __version__

        print(__version__)
        return OK
    command = {"train": _train, "audit": _audit, "doctor": _doctor}.get(arguments[0])
    if command is None:
        return _complain(f"unknown command {arguments[0]!r}; known are train, audit, doctor.")
    try:
        return command(arguments[1:])
    except (ValueError, FileNotFoundError, TypeError, RuntimeError) as error:
        return _complain(str(error).splitlines()[0])
    except KeyboardInterrupt:
        return _complain("interrupted; the run folder keeps what was done, --resume continues.", INTERRUPTED)


def _complain(message: str, code: int = USER_ERROR) -> int:
    print(f"sharpkern: {message}", file=sys.stderr)
    return code


def _doctor(arguments: list[str]) -> int:
    if arguments:
        return _complain(f"doctor takes no options, got {arguments[0]!r}.")
    from .doctor import report

    print("\n".join(report()))
    return OK


def _parse(command: str, description: str, arguments: list[str]) -> tuple[TrainConfig, Path | None]:
    """Combine preset, configuration file and flags, in this order; return the folder to resume, too."""
    try:
        import tyro
    except ImportError as error:
        raise ValueError("the command line needs its extra: pip install 'sharpkern[train]'.") from error
    from .train.config import PRESETS, TrainConfig, from_toml

    rest, sources = _take(arguments, ("--preset", "--config", "--resume"))
    base = TrainConfig()
    if name := sources.get("--preset"):
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}.")
        base = PRESETS[name]
    if path := sources.get("--config"):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such configuration file.")
        base = from_toml(Path(path).read_text(), path)
    folder = None
    if given := sources.get("--resume"):
        folder = Path(given)
        if not (folder / "config.toml").is_file():
            raise FileNotFoundError(f"{folder} is not a run folder: it has no config.toml.")
        if rest or len(sources) > 1:
            raise ValueError("--resume takes the run's own configuration: give no other option with it.")
        base = dataclasses.replace(from_toml((folder / "config.toml").read_text(), str(folder)), out=folder)
    config: Any = tyro.cli(
        Annotated[TrainConfig, tyro.conf.FlagConversionOff],
        prog=f"sharpkern {command}",
        description=description,
        args=rest,
        default=base,
    )
    config.validate()
    return config, folder


def _take(arguments: list[str], names: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """Split ``--name value`` and ``--name=value`` of the given names off the arguments."""
    rest: list[str] = []
    taken: dict[str, str] = {}
    items = iter(arguments)
    for item in items:
        name, equals, value = item.partition("=")
        if name not in names:
            rest.append(item)
            continue
        if not equals:
            value = next(items, "")
        if not value:
            raise ValueError(f"{name} needs a value.")
        taken[name] = value
    return rest, taken


def _train(arguments: list[str]) -> int:
    description = (
        "Train a reference model and track its sharpness at every step. Besides the options below: "
        "--preset demo, --config FILE.toml (flags override both), --resume RUN_FOLDER."
    )
    config, folder = _parse("train", description, arguments)
    from .operators import NonFiniteLossError
    from .train.loop import Run

    run = Run(config, resume=folder is not None)
    print(f"data: {run.data.note}, {len(run.data.train_inputs)} training examples; run folder: {config.out}")
    code = OK
    try:
        for _ in _with_progress(run.steps(), run.done, config.steps):
            pass
    except NonFiniteLossError as error:
        code = _complain(f"{error} The run folder keeps what was done.", DIVERGED)
    finally:
        _report(config)
    return code


def _with_progress(rows: Any, done: int, total: int) -> Any:
    from tqdm import tqdm

    interval = 0.1 if sys.stderr.isatty() else 15.0
    with tqdm(rows, initial=done, total=total, unit="step", mininterval=interval, dynamic_ncols=True) as bar:
        for row in bar:
            state = {"loss": f"{row['loss']:.4g}", "sharpness x lr": f"{row['sharpness'] * row['lr']:.3g}"}
            if row["preconditioned_sharpness"] is not None:
                state["preconditioned x lr"] = f"{row['preconditioned_sharpness'] * row['lr']:.3g}"
            bar.set_postfix(state, refresh=False)
            yield row


def _report(config: TrainConfig) -> None:
    """Write and print the summary; draw the plot."""
    from .train.metrics import read

    rows: list[Row] = read(config.out / "metrics.jsonl")
    if not any(row.get("loss") is not None for row in rows):
        return
    from .train.plots import plot_run
    from .train.summary import catapults_of, summarise

    lines = summarise(rows)
    (config.out / "summary.txt").write_text("\n".join(lines) + "\n")
    model = config.model.kind.upper()
    batch = "full batch" if config.batch_size is None else f"batch {config.batch_size}"
    title = (
        f"{model}, {config.data.name}, {config.optimizer.name}, {batch}, warmup {config.optimizer.warmup_steps} steps"
    )
    finite = [row for row in rows if row.get("loss") is not None]
    plot_run(finite, config.optimizer, catapults_of(finite), config.out / "sharpness.png", title)
    print("\n".join(lines))
    print(f"plot: {config.out / 'sharpness.png'}")


def _audit(arguments: list[str]) -> int:
    description = "Check the Hessian-vector products of the model, loss and data that the same options would train."
    config, _ = _parse("audit", description, arguments)
    from .auditing import audit
    from .train.data import load
    from .train.loop import batch_at, build_loss, build_model, training_targets

    d = config.data
    data = load(d.name, data_dir=d.dir, text_file=d.text_file, context=d.context, limit=d.limit)
    batch = batch_at(1, config, data.train_inputs, training_targets(config, data))
    size = 64 if config.batch_size is None else config.batch_size
    report = audit(build_model(config, data), build_loss(config), tuple(t[:size] for t in batch))
    print("\n".join(report.lines))
    return OK if report.ok else FAILED


if __name__ == "__main__":
    sys.exit(main())
