"""Where ``isorun tune`` runs its trials, by the options of its command line."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.contract import UsageError, import_extra, whole_number

if TYPE_CHECKING:
    from launch.torchx.submission import JobOptions
    from launch.torchx.trial_jobs import JobsBackend
    from launch.tune.trial import LocalBackend


@dataclass(frozen=True)
class OnThisMachine:
    """Trials are processes of this machine."""

    processes: int

    @property
    def world_size(self) -> int:
        """Ranks of a trial."""
        return self.processes

    def backend(self, parallel: int, name: str, directory: Path) -> LocalBackend:
        """What starts the trials. Raises UsageError for too few GPUs."""
        from launch.tune.devices import shares
        from launch.tune.trial import LocalBackend

        return LocalBackend(self.processes, shares(parallel, self.processes, os.environ))

    def __str__(self) -> str:
        return f"{self.processes} {'process' if self.processes == 1 else 'processes'} each"


@dataclass(frozen=True)
class AsJobs:
    """Trials are jobs of a scheduler."""

    options: JobOptions
    world_size: int
    """Ranks of a trial; 1 if that is unknown before it starts."""

    def backend(self, parallel: int, name: str, directory: Path) -> JobsBackend:
        """What submits the trials. Raises UsageError for wrong options of the scheduler."""
        from launch.torchx.trial_jobs import JobsBackend

        return JobsBackend(self.options, parallel, name, directory)

    def __str__(self) -> str:
        return f"each a job of {self.options.scheduler}"


def place_of(arguments: argparse.Namespace) -> OnThisMachine | AsJobs:
    """Where the trials run. Raises UsageError."""
    if arguments.scheduler is None:
        return _here(arguments)
    import_extra("torchx", "launch", "tune --scheduler", "run the trials on this machine")
    from launch.torchx.shape import parse
    from launch.torchx.submission import JobOptions

    if arguments.processes is not None:
        raise UsageError(
            f"--processes {arguments.processes} is for trials on this machine; with --scheduler "
            f"give -j NODESxPROCESSES, such as -j 1x{arguments.processes}."
        )
    world_size = (parse(arguments.j).world_size if arguments.j else None) or 1
    options = JobOptions(arguments.scheduler, arguments.cfg or "", arguments.j or "", arguments.job)
    return AsJobs(options, world_size)


def _here(arguments: argparse.Namespace) -> OnThisMachine:
    for option, value in (("-cfg", arguments.cfg), ("--job", arguments.job and arguments.job[0])):
        if value:
            raise UsageError(f"{option} {value} is for trials that are jobs; give --scheduler too.")
    if arguments.j is None:
        return OnThisMachine(number("processes", arguments.processes or "1", 1))
    if arguments.processes is not None:
        raise UsageError("-j and --processes are both given; remove one of them.")
    nodes, _, processes = arguments.j.rpartition("x")
    count = whole_number(processes)
    if nodes not in ("", "1") or not count:
        raise UsageError(
            f"-j is {arguments.j!r}, but a trial on this machine has one node and a number of "
            "processes, such as 1x4; give --scheduler to submit the trials as jobs."
        )
    return OnThisMachine(count)


def number(name: str, text: str, least: int) -> int:
    """The value of an option. Raises UsageError."""
    found = whole_number(text)
    if found is None or found < least:
        raise UsageError(f"--{name} must be a whole number of at least {least}, but is {text!r}.")
    return found
