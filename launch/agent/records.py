"""What an agent records of a failure, and where people and programs look for it: the termination
message of its container, and the run directory."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launch.agent.command import is_doctor
from launch.agent.failure import Outcome, RankFailure, write_record, write_termination
from launch.agent.options import AgentOptions
from launch.contract import (
    AGENT_RANK,
    RUN_ID,
    RunError,
    first_line,
    log,
    redact_command,
    run_directory,
    write_error_file,
)
from launch.failure_record import last_record, sentence

_SAME = 30.0  # seconds within which the nodes of a run meet the same error


def tell_last_failure(command: Sequence[str], before: float = math.inf) -> None:
    """Logs the last failure of the run before a time (seconds since the epoch): in a container, the
    log and the termination message of the attempt that failed may no longer exist."""
    directory = directory_of(command)
    if directory and (record := last_record(directory, before)):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["time"]))
        log(f"Last failure of this run, at {when}: {sentence(record)}")


def directory_of(command: Sequence[str]) -> Path | None:
    """The run directory of a command; None if it is not a training, or its config cannot be
    read."""
    return run_directory(command) if command and not is_doctor(command) else None


def record_outcome(
    options: AgentOptions,
    command: Sequence[str],
    outcome: Outcome,
    number: int | None,
    *,
    in_run_directory: bool,
) -> None:
    """Prints how ranks ended, and records it; ``number``: that of the round."""
    log(outcome.paragraph())
    write_error_file(RunError(outcome.paragraph()))  # read by TorchX, if it started this agent
    _keep(options, command, outcome, number, in_run_directory=in_run_directory)


def record_own_end(options: AgentOptions, code: int, text: str) -> None:
    """Records an end of this agent while it had no ranks: nodes that did not join, a stop while it
    waited. The text is printed elsewhere."""
    if options.preflight_only:
        return
    host, pid = socket.gethostname(), os.getpid()
    own = RankFailure(AGENT_RANK, AGENT_RANK, host, pid, code, text, time.time(), [])
    _keep(options, options.command, Outcome(own, [own], []), None, in_run_directory=True)


def _keep(
    options: AgentOptions,
    command: Sequence[str],
    outcome: Outcome,
    number: int | None,
    *,
    in_run_directory: bool,
) -> None:
    record = outcome.record(
        run_id=os.environ.get(RUN_ID),
        command=redact_command(command),
        agent=socket.gethostname(),
        round=number,
    )
    if options.termination_log:
        try:
            write_termination(options.termination_log, record)
        except OSError as error:
            log(f"Cannot write the termination message (--termination-log): {error}.")
    directory = directory_of(command) if in_run_directory else None
    if directory is None:
        return
    try:
        # Also before the first attempt has created it, in a container, whose log and termination
        # message may go with it. Not if only another command can succeed: its path may be wrong.
        if options.termination_log and record["retry"] and directory.parent.is_dir():
            directory.mkdir(exist_ok=True)
        if directory.is_dir() and not _is_known(directory, outcome):
            write_record(directory, record)
    except OSError as error:
        log(f"Cannot write the failure record: {first_line(error)}.")


def _is_known(directory: Path, outcome: Outcome) -> bool:
    """Whether the agent of another node has just recorded the same error of its own."""
    if outcome.first.rank != AGENT_RANK:
        return False  # the nodes have agreed on which of them records it
    with suppress(KeyError, TypeError):
        last = last_record(directory) or {"time": 0.0}
        recent = abs(time.time() - last["time"]) < _SAME
        return bool(recent and last["first"]["error"] == outcome.first.error)
    return False
