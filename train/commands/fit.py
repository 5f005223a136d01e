"""Start a run, or resume it if its run directory holds one.

The same command, repeated, always leads to the same finished run: after a crash, a stop or a power
cut, run it again. Running it again after the run has finished changes nothing.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from train.checkpoint.damage import became_read_only, refused_files
from train.checkpoint.opening import finished_run
from train.checkpoint.run_directory import RunDirectory
from train.command_line import say
from train.commands.arguments import add_config_arguments
from train.config.changes import allowed_changes
from train.config.load import LoadedConfig, load_config
from train.distributed.world import this_world
from train.exits import Exit, RetryError, RunError, first_line, sys_exit_refused
from train.goodput.clock import PhaseClock
from train.process.diagnose import is_lost_peer
from train.process.stop import StopRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_config_arguments(parser)
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="resume a run although its config has changed in ways that change results; the "
        "changes are recorded",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="try a few steps, an evaluation, a checkpoint, a resume and an export, print the time "
        "and memory of each, and leave nothing",
    )


def run(arguments: argparse.Namespace) -> Exit:
    """Trains. Imports torch only when there is something to train."""
    clock = PhaseClock.of_process()
    loaded = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        from train.commands.dry_run import try_run

        return try_run(loaded)
    stop = StopRequest(loaded.config.stop)
    return start(loaded, stop, allow_changes=arguments.allow_changes, clock=clock).exit


class FitOutcome(NamedTuple):
    """How an attempt at a run ended."""

    exit: Exit
    step: int
    metrics: dict[str, float]
    """The newest evaluation."""


@sys_exit_refused()
def start(
    loaded: LoadedConfig,
    stop: StopRequest,
    *,
    allow_changes: bool = False,
    clock: PhaseClock | None = None,
) -> FitOutcome:
    """Starts the run of a config, or resumes it, and trains to its end or until a stop. ``clock``
    has the time since the start, by default from now."""
    clock = clock or PhaseClock()
    directory = RunDirectory(loaded.run_directory)
    world = this_world()
    if world.world_size == 1:
        directory.acquire()  # with several ranks, rank 0 acquires it once all have joined
    try:
        with refused_files(directory.path):
            changes = allowed_changes(loaded, directory, allow=allow_changes)
            finished = finished_run(directory)
        if finished and not any(change.changes_results for change in changes):
            if world.rank == 0:
                say(
                    f"The run in {loaded.run_directory_as_set} is already finished, at step "
                    f"{finished['step']}; for another run, set another run.name or run.dir."
                )
            return FitOutcome(Exit.DONE, finished["step"], finished.get("metrics", {}))
        from train.loop.fit import fit
        from train.loop.open_run import open_run

        with open_run(
            loaded, directory, changes, stop, allow_changes=allow_changes, clock=clock
        ) as opened:
            try:
                code = fit(opened)
                return FitOutcome(code, opened.progress.step, dict(opened.progress.evaluated))
            except RunError:
                raise
            except Exception as error:
                if is_lost_peer(error):
                    raise
                directory.ensure_in_place()  # code that reads the run directory may have failed
                if became_read_only(error, directory.path):
                    raise RetryError(
                        f"The run directory cannot be written any more ({first_line(error)}); fix "
                        f"the cause. {opened.resume_point()}"
                    ) from error
                if stop.signal is None:
                    raise
                # Launchers signal whole groups of processes: a compiler may have died of it.
                raise RetryError(
                    f"The run was asked to stop ({stop.signal}) and failed before it could save "
                    f"({type(error).__name__}: {first_line(error)}). {opened.resume_point()}"
                ) from error
    finally:
        directory.release()
