"""Run one config on several placements of this machine and compare the results.

A placement is PROCESSES or PROCESSES:STRATEGY, such as 1 2:ddp 4:fsdp2 2:zero3; the first is the
reference. They run one after another, each from the beginning, without hooks, sinks and a mirror.
Prints a table and plots the loss curves. The exit code is 0 if all results agree within the
tolerances, else 65.
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path

from train.checkpoint.run_directory import RunDirectory
from train.command_line import say
from train.commands.arguments import add_config_arguments
from train.commands.placements import Placement, environment, failure, parse
from train.config.load import LoadedConfig, load_config
from train.exits import Exit, UsageError
from train.imports import import_extra
from train.process.child import run_child
from train.process.diagnose import fault_of

_DEFAULT = ["1", "2:ddp", "2:fsdp2"]
# Settings that a comparison needs, and others that are disabled for speed.
_SETTINGS = [
    "track.log_every_steps=1", "track.tensorboard=false", "track.wandb=disabled",
    "track.console=plain", "checkpoint.every_steps=null", "checkpoint.every_minutes=null",
    "checkpoint.asynchronous=false", "checkpoint.keep_best=null",
    "evaluate.every_steps=null", "evaluate.every_epochs=null",
    "evaluate.at_start=false", "early_stop=null",
    # A mirror would be restored, and written. Hooks and sinks are those of the run itself.
    "checkpoint.mirror=null", "hooks=[]", "track.sinks=[]",
]  # fmt: skip
_MARKER = ".parity"
"""An empty file in each run directory that parity made, and may remove."""
_WARNING = "warning: "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_config_arguments(parser)
    parser.add_argument("--steps", type=int, default=50, help="steps of each run (default 50)")
    parser.add_argument(
        "--out", type=Path, help="directory of the runs and the plot (default runs/parity-NAME)"
    )
    parser.add_argument(
        "--loss-tolerance", type=float, default=1e-5, metavar="REL", help="default 1e-5"
    )
    parser.add_argument(
        "--norm-tolerance", type=float, default=1e-4, metavar="REL", help="default 1e-4"
    )
    parser.add_argument(
        "--evaluation-tolerance",
        type=float,
        default=1e-4,
        metavar="REL",
        help="of each metric of the evaluation after the last step (default 1e-4)",
    )
    parser.add_argument(
        "--weights-tolerance", type=float, default=1e-4, metavar="REL", help="default 1e-4"
    )


def run(arguments: argparse.Namespace) -> Exit:
    """Runs all placements, then prints the comparison and writes the plot."""
    placements = [parse(word) for word in arguments.overrides if "=" not in word]
    placements = placements or [parse(word) for word in _DEFAULT]
    overrides = [word for word in arguments.overrides if "=" in word]
    if arguments.steps < 1:
        raise UsageError(f"--steps must be at least 1, but is {arguments.steps}.")
    if len(placements) < 2 or len(set(placements)) < len(placements):
        named = " ".join(map(str, placements))
        raise UsageError(
            f"parity needs at least two different placements, but got {named!r}; name others."
        )
    loaded = load_config(arguments.config, overrides, runs=False)
    import_extra("matplotlib", "plot", "parity")  # fails before the runs, not after them
    out = arguments.out or Path("runs") / f"parity-{loaded.config.run.name}"
    settings = [*overrides, *_SETTINGS, *_length(loaded, arguments.steps)]
    settings += _micro_batch(loaded, placements)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        wrong = UsageError(
            f"--out is {str(out)!r}, which cannot be created ({error.strerror}); choose another."
        )
        raise fault_of(error, wrong) from None
    directories = {str(p): out / str(p).replace(":", "-") for p in placements}
    for directory in directories.values():
        _clear(directory)
    warnings: dict[str, list[str]] = {}
    for placement in placements:
        log = _start(arguments.config, settings, placement, directories[str(placement)])
        for warning in warnings_in(log):
            warnings.setdefault(warning, []).append(str(placement))
    for warning, by in warnings.items():
        say(f"warning ({', '.join(by)}): {warning}")
    return _report(directories, out, loaded, arguments)


def _length(loaded: LoadedConfig, steps: int) -> list[str]:
    schedule = loaded.config.schedule
    warmup = min(schedule.warmup_steps, steps // 5)
    settings = [f"length.steps={steps}", "length.epochs=null", f"schedule.warmup_steps={warmup}"]
    if schedule.decay_steps is not None:
        settings.append(f"schedule.decay_steps={min(schedule.decay_steps, steps - warmup)}")
    return settings


def _micro_batch(loaded: LoadedConfig, placements: list[Placement]) -> list[str]:
    """Sets the same micro-batch size on all placements if possible, so that the model's random
    numbers are equal as well."""
    batch = loaded.config.batch
    cells = math.lcm(*(placement.processes for placement in placements))
    if batch.micro_batch_size != "auto":
        return []
    if batch.global_batch_size % cells:
        say(
            f"batch.global_batch_size, {batch.global_batch_size}, is not a multiple of {cells}, so "
            "micro-batches differ between placements; a model with dropout will differ."
        )
        return []
    size = batch.global_batch_size // cells
    say(f"All placements use batch.micro_batch_size={size}, so that dropout is the same as well.")
    return [f"batch.micro_batch_size={size}"]


def _clear(directory: Path) -> None:
    """Removes the run of an earlier comparison, and marks the directory as parity's.

    Raises UsageError for a directory that parity has not made, and ResumeRefusedError where another
    process uses it.
    """
    try:
        if directory.exists():
            if not (directory / _MARKER).exists() or directory.is_symlink():
                raise UsageError(
                    f"{directory} exists, but parity has not made it (it has no {_MARKER}); remove "
                    "it, or choose another --out."
                )
            run = RunDirectory(directory)
            run.acquire()
            shutil.rmtree(directory)
            run.release()
        directory.mkdir()
        (directory / _MARKER).touch()
    except OSError as error:
        wrong = UsageError(
            f"{directory} cannot be replaced ({error.strerror}); choose another --out."
        )
        raise fault_of(error, wrong) from None


def _start(files: list[str], settings: list[str], placement: Placement, directory: Path) -> str:
    """Runs one placement in new processes, with its output in a log file; returns the output.

    Raises RunError with the exit code of a failed run.
    """
    words = [word for file in files for word in ("--config", file)]
    words += [*settings, f"run.dir={directory}", f"strategy={placement.strategy}"]
    command = placement.command("fit", *words)
    log = directory.with_name(f"{directory.name}.log")
    say(f"{placement}: {directory}")
    with log.open("w", encoding="utf-8") as output:
        code = run_child(command, stdout=output, stderr=output, env=environment())
    text = log.read_text(encoding="utf-8", errors="replace")
    if code:
        raise failure(placement, text, code, f"see {log}")
    return text


def warnings_in(log: str) -> list[str]:
    """The warnings that a run has printed, each once."""
    lines = (line.partition(_WARNING) for line in log.splitlines())
    return list(dict.fromkeys(text.strip() for before, mark, text in lines if mark and not before))


def _report(
    directories: dict[str, Path], out: Path, loaded: LoadedConfig, arguments: argparse.Namespace
) -> Exit:
    from train.parity.compare import Tolerance, compare, plot

    tolerance = Tolerance(
        loss=arguments.loss_tolerance,
        norm=arguments.norm_tolerance,
        evaluation=arguments.evaluation_tolerance,
        weights=arguments.weights_tolerance,
    )
    reference, *others = directories
    say(
        f"\nMaximum relative difference from {reference} over {arguments.steps} steps "
        f"(tolerances: loss {tolerance.loss:g}, gradient norm {tolerance.norm:g}, "
        f"evaluation {tolerance.evaluation:g}, weights {tolerance.weights:g}):\n"
    )
    header = (
        "placement", "loss", "gradient norm", "weights", "evaluation", "learning rate", "ledger", ""
    )  # fmt: skip
    line = "{:<12}{:>12}{:>15}{:>12}{:>12}{:>15}{:>12}  {}"
    say(line.format(*header))
    passed, named = True, []
    for name in others:
        found = compare(directories[reference], directories[name])
        within = found.within(tolerance)
        passed = passed and within
        say(
            line.format(
                name, f"{found.loss:.1e}", f"{found.norm:.1e}", f"{found.weights:.1e}",
                f"{found.evaluation:.1e}",
                "identical" if found.rate == 0 else f"{found.rate:.1e}",
                "identical" if found.same_ledger else "DIFFERS",
                ("same" if within else "NOT the same")
                + ("" if found.same_skips else ", skipped steps differ"),
            )
        )  # fmt: skip
        if not found.weights <= tolerance.weights and found.tensor:
            named.append(f"{name}: of all weights, {found.tensor} differs most")
    if named:
        say("\n" + "\n".join(named))
    picture = out / "parity.png"
    plot(directories, picture, f"{loaded.config.run.name} on {len(directories)} placements")
    say(f"\ncurves: {picture}")
    return Exit.DONE if passed else Exit.DATA
