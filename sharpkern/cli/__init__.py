"""The command line: ``sharpkern train | suggest | sweep | report | audit | bench | doctor``; torch is imported late."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

if TYPE_CHECKING:
    from ..train.config import TrainConfig
    from ..train.metrics import Row

USAGE = """usage: sharpkern COMMAND [OPTIONS]

  train    train a reference model, tracking its sharpness at every step
  suggest  measure a reference model, and recommend initial and target learning rate and warmup length
  sweep    train a grid of runs from one TOML file: a phase diagram
  report   draw a sweep's phase diagrams: one HTML page, and PNGs
  audit    check the Hessian-vector products of a reference model against independent truths
  bench    compare with every peer that is installed (needs a source checkout; --quick for a first look)
  doctor   show versions, kernel backends, and why one is missing

sharpkern COMMAND --help explains the options of a command."""
SHORT = {"--data-dir": "--data.dir", "--text-file": "--data.text-file"}
OK, FAILED, USER_ERROR, DIVERGED, INTERRUPTED = 0, 1, 2, 3, 130
_SECONDS_BETWEEN_LINES = 10.0


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
        from .. import __version__

        print(__version__)
        return OK
    commands = {
        "train": _train,
        "suggest": _suggest,
        "sweep": _sweep,
        "report": _report_sweep,
        "audit": _audit,
        "bench": _bench,
        "doctor": _doctor,
    }
    command = commands.get(arguments[0])
    if command is None:
        return _complain(f"unknown command {arguments[0]!r}; known are {', '.join(commands)}.")
    try:
        return command(arguments[1:])
    except (ValueError, OSError, TypeError, RuntimeError) as error:
        return _complain(_one_line(error))
    except KeyboardInterrupt:
        return _complain("interrupted; the run folder keeps what was done, --resume continues.", INTERRUPTED)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return (str(error) or type(error).__name__).splitlines()[0]


def _complain(message: str, code: int = USER_ERROR) -> int:
    print(f"sharpkern: {message}", file=sys.stderr)
    return code


def _doctor(arguments: list[str]) -> int:
    if arguments:
        return _complain(f"doctor takes no options, got {arguments[0]!r}.")
    from .doctor import report

    print("\n".join(report()))
    return OK


def _bench(arguments: list[str]) -> int:
    from .bench import run

    return run(arguments)


def _parse(command: str, description: str, arguments: list[str]) -> tuple[TrainConfig, Path | None]:
    """Combine preset, configuration file and flags, in this order; return the folder to resume, too."""
    try:
        import tyro
    except ImportError as error:
        raise ValueError("the command line needs its extra: pip install 'sharpkern[train]'.") from error
    from ..train.config import PRESETS, TrainConfig, from_toml

    rest, sources = _take(arguments, ("--preset", "--config", "--resume"))
    base = TrainConfig()
    if name := sources.get("--preset"):
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}.")
        base = PRESETS[name]
    if path := sources.get("--config"):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such configuration file.")
        base = from_toml(Path(path).read_text(encoding="utf-8"), path)
    folder = None
    if given := sources.get("--resume"):
        folder = Path(given)
        if not (folder / "config.toml").is_file():
            raise FileNotFoundError(f"{folder} is not a run folder: it has no config.toml.")
        if rest or len(sources) > 1:
            raise ValueError("--resume takes the run's own configuration: give no other option with it.")
        text = (folder / "config.toml").read_text(encoding="utf-8")
        base = dataclasses.replace(from_toml(text, str(folder)), out=folder)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            config: Any = tyro.cli(
                Annotated[TrainConfig, tyro.conf.FlagConversionOff],
                prog=f"sharpkern {command}",
                description=description,
                args=_spelled_out(rest),
                default=base,
            )
    except SystemExit as done:
        if not done.code:  # --help
            raise
        raise ValueError(f"{_sentence(printed.getvalue())}; see sharpkern {command} --help.") from None
    config.validate()
    return config, folder


def _spelled_out(arguments: list[str]) -> list[str]:
    """Replace short names of options by the names of the configuration."""
    split = [(name, equals, value) for name, equals, value in (item.partition("=") for item in arguments)]
    return [SHORT.get(name, name) + equals + value for name, equals, value in split]


def _sentence(printed: str) -> str:
    """Return what stands in tyro's framed message between its title and the next rule."""
    rows = itertools.dropwhile(_is_rule, (line.strip("│╭╮╰╯ ") for line in printed.splitlines()[1:]))
    words = " ".join(itertools.takewhile(lambda row: not _is_rule(row), rows))
    return re.sub(r" +([.,;])", r"\1", words).rstrip(".") or "the options are wrong"


def _is_rule(row: str) -> bool:
    return not any(c.isalnum() for c in row)


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
        "--preset demo, --config FILE.toml (flags override both), --resume RUN_FOLDER; "
        "--data-dir is short for --data.dir, --text-file for --data.text-file."
    )
    config, folder = _parse("train", description, arguments)
    from ..curvature.losses import NonFiniteLossError
    from ..train.loop import Run

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
    """Pass rows on, and show progress: a bar on a terminal, a plain line now and then elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(rows, initial=done, total=total, unit="step", dynamic_ncols=True) as bar:
            for row in bar:
                bar.set_postfix_str(_state(row), refresh=False)
                yield row
        return
    start = last = time.monotonic()
    for row in rows:
        now, step = time.monotonic(), row["step"]
        if now - last >= _SECONDS_BETWEEN_LINES or step == total:
            left = (now - start) / (step - done) * (total - step)
            print(f"step {step}/{total}, {_state(row)}, {left:.0f} s left", file=sys.stderr, flush=True)
            last = now
        yield row


def _state(row: Row) -> str:
    """Say where a run stands, for its progress display."""
    parts = [f"loss {row['loss']:.4g}", f"sharpness x lr {row['sharpness'] * row['lr']:.3g}"]
    if row["preconditioned_sharpness"] is not None:
        parts.append(f"preconditioned x lr {row['preconditioned_sharpness'] * row['lr']:.3g}")
    return ", ".join(parts)


def _report(config: TrainConfig) -> None:
    """Write and print the summary; draw the plot."""
    from ..train.metrics import read

    rows: list[Row] = read(config.out / "metrics.jsonl")
    if not any(row.get("loss") is not None for row in rows):
        return
    from ..train.plots import plot_run
    from ..train.summary import catapults_of, summarise

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


def _sweep(arguments: list[str]) -> int:
    parser = _Parser(prog="sharpkern sweep", description="Train every cell of a grid; a second call goes on.")
    parser.add_argument("file", type=Path, help="a run's configuration with a table [sweep.grid]")
    parser.add_argument(
        "--out", type=Path, help="the sweep's folder; the file's own, or runs/ and its name, by default"
    )
    parser.add_argument("--processes", type=int, help="at once, on this machine; by default one a core")
    parser.add_argument("--executor", choices=("local", "submitit"), default="local", help="where the cells run")
    parser.add_argument(
        "--submitit", metavar="KEY=VALUE", action="append", default=[],
        help="of submitit, as in slurm_partition=cpu, timeout_min=60; may be repeated",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="name the cells, and train none")
    given = parser.parse_args(arguments)
    if given.processes is not None and given.processes < 1:
        raise ValueError(f"--processes must be at least 1, got {given.processes}.")
    from ..sweep import executors
    from ..sweep.collect import result_of, table
    from ..sweep.grid import read_sweep

    sweep = read_sweep(given.file, given.out)
    done = sum(result_of(cell) is not None for cell in sweep.cells)
    if given.list:
        print("\n".join(cell.name for cell in sweep.cells))
        return OK
    if given.executor == "submitit":
        parameters = dict(_pair(item) for item in given.submitit)
        executor, at_once = executors.submitit(sweep.folder / "jobs", **parameters), 1
    else:
        threads = max(cell.config.threads or 1 for cell in sweep.cells)
        at_once = given.processes or executors.processes_for(threads)
        executor = executors.local(at_once)
    print(f"{len(sweep.cells)} cells, {done} of them done; folder: {sweep.folder}")
    outcomes = _with_bar(executors.run_sweep(sweep, executor, at_once=at_once), done, len(sweep.cells))
    try:
        errors = [outcome for outcome in outcomes if outcome.status == "error"]
    except KeyboardInterrupt:
        return _complain("interrupted; the same command goes on from here.", INTERRUPTED)
    statuses = [row["status"] for row in table(sweep)]
    counts = ", ".join(f"{statuses.count(name)} {name}" for name in dict.fromkeys(statuses))
    print(f"{counts}; table: {sweep.folder / 'table.csv'}; next: sharpkern report {sweep.folder}")
    if errors:
        return _complain(
            f"{len(errors)} cells have no result, the first is {errors[0].name}: {errors[0].message} "
            f"(error.txt in its folder tells more; a second call tries again)", FAILED,
        )  # fmt: skip
    return OK


def _with_bar(outcomes: Any, done: int, total: int) -> Any:
    """Pass outcomes on, and show progress: a bar on a terminal, a plain line now and then elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(outcomes, initial=done, total=total, unit="cell", dynamic_ncols=True)
        return
    start = last = time.monotonic()
    for number, outcome in enumerate(outcomes, 1):
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES or done + number == total:
            left = (now - start) / number * (total - done - number)
            print(f"cell {done + number}/{total}, {left:.0f} s left", file=sys.stderr, flush=True)
            last = now
        yield outcome


def _pair(text: str) -> tuple[str, Any]:
    """``timeout_min=60`` becomes ``("timeout_min", 60)``."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--submitit needs KEY=VALUE, got {text!r}.")
    return name, int(value) if value.isdecimal() else value


def _report_sweep(arguments: list[str]) -> int:
    parser = _Parser(prog="sharpkern report", description="Draw a sweep's phase diagrams.")
    parser.add_argument("folder", type=Path, help="of a sweep")
    parser.add_argument("--partial", action="store_true", help="although some cells are not finished")
    given = parser.parse_args(arguments)
    from ..sweep.report import write_report

    print(f"report: {write_report(given.folder, partial=given.partial)}")
    return OK


class _Parser(argparse.ArgumentParser):
    """Complains in one line, like the rest of the command line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help.")


def _suggest(arguments: list[str]) -> int:
    description = (
        "Measure the model, loss, data and optimizer that the same options would train, try short runs on copies, and "
        "recommend a warmup. Besides the options below: --lr-target RATE, the target that you want (else the one that "
        "learnt most); --probe-steps N, the longest warmup tried (64); --preset demo, --config FILE.toml. The "
        "learning rate and schedule of the options are not used. A full batch makes every step of 6 to 16 short runs "
        "cost a full pass: use --data.limit or --batch-size for a first look."
    )
    rest, own = _take(arguments, ("--lr-target", "--probe-steps"))
    config, folder = _parse("suggest", description, rest)
    if folder is not None:
        raise ValueError("suggest starts from the initial state: it does not take --resume.")
    lr_target = _number("--lr-target", own, float)
    probe_steps = _number("--probe-steps", own, int)
    import torch

    from ..train.data import load
    from ..train.loop import batch_at, build_model, build_optimizer
    from ..train.losses import build_loss, loss_targets
    from ..train.moments import draw_second_moment
    from ..warmup.suggest import suggest_warmup

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    d = config.data
    data = load(d.name, data_dir=d.dir, text_file=d.text_file, context=d.context, limit=d.limit)
    targets = loss_targets(config, data.train_targets, data)
    count = len(data.train_inputs) // min(config.batch_size or len(targets), len(targets))
    batches = [batch_at(step, config, data.train_inputs, targets) for step in range(1, count + 1)]
    model, loss_fn = build_model(config, data), build_loss(config)
    optimizer = build_optimizer(config, model)
    draw_second_moment(model, loss_fn, batches[0], optimizer)
    found = suggest_warmup(
        model, loss_fn, batches, optimizer, lr_target=lr_target,
        **({} if probe_steps is None else {"probe_steps": probe_steps}),
    )  # fmt: skip
    print(found)
    print(
        f"To train so: the same options with --optimizer.lr {found.lr_target:.4g} --optimizer.lr-init "
        f"{found.lr_init:.4g} --optimizer.warmup-steps {found.warmup_steps}"
    )
    return OK


def _number(name: str, given: dict[str, str], kind: type) -> Any:
    try:
        return kind(given[name]) if name in given else None
    except ValueError:
        raise ValueError(f"{name} must be {'a number' if kind is float else 'whole'}, got {given[name]!r}.") from None


def _audit(arguments: list[str]) -> int:
    description = "Check the Hessian-vector products of the model, loss and data that the same options would train."
    config, _ = _parse("audit", description, arguments)
    from ..curvature.audit import audit
    from ..train.data import load
    from ..train.loop import batch_at, build_model
    from ..train.losses import build_loss, loss_targets

    d = config.data
    data = load(d.name, data_dir=d.dir, text_file=d.text_file, context=d.context, limit=d.limit)
    batch = batch_at(1, config, data.train_inputs, loss_targets(config, data.train_targets, data))
    size = 64 if config.batch_size is None else config.batch_size
    report = audit(build_model(config, data), build_loss(config), tuple(t[:size] for t in batch))
    print("\n".join(report.lines))
    return OK if report.ok else FAILED
