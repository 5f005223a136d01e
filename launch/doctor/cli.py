"""The doctor's command line, its output and its exit code."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.contract import (
    Exit,
    Parser,
    RetryError,
    RunError,
    UsageError,
    exit_code_of,
    first_line,
    log,
    path_argument,
    this_world,
    training_config,
    write_error_file,
)
from launch.doctor.findings import (
    Finding,
    Status,
    exit_code,
    infrastructure_failure,
    merged,
    misconfigured,
)
from launch.doctor.guard import bounded
from launch.doctor.place import Place
from launch.doctor.table import result, show

if TYPE_CHECKING:
    from launch.contract import LoadedConfig
    from launch.doctor.examination import Examination
    from launch.doctor.rendezvous import Rendezvous

_CONFIG_SECONDS = 60.0  # a task's module may import much
_ACKNOWLEDGE_SECONDS = 3.0


def parse(argv: Sequence[str], prog: str = "python -m launch.doctor") -> argparse.Namespace:
    """The doctor's own arguments; ``command`` is the training's: the words after ``--``, or from
    the first one that is no option. Raises UsageError."""
    parser = Parser(
        prog=prog,
        description="Checks whether a training can run here. Started on all ranks, by torchrun or "
        "the node agent, it also compares the nodes and tests the network between them.",
        epilog="After -- comes the command of the training: python -m train ...",
    )
    parser.add_argument(
        "--level", choices=("quick", "full"), default="quick",
        help="quick: about a second; full: measures disk, network and devices, and loads a sample",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=path_argument, metavar="FILE", help="write all findings to FILE"
    )
    parser.add_argument(
        "--wait", type=float, default=120.0, metavar="SECONDS",
        help="time for the other ranks to join; default: 120",
    )  # fmt: skip
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not 0 < arguments.wait < math.inf:
        raise UsageError(
            f"--wait is {arguments.wait:g} (command line), but must be finite and above 0."
        )
    if arguments.command[:1] == ["--"]:  # torchrun removes it
        del arguments.command[0]
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = "python -m launch.doctor") -> int:
    """Checks, prints and returns the exit code: 0, 64 or 75."""
    return exit_code_of(
        lambda: _main(parse(sys.argv[1:] if argv is None else argv, prog)), _unexpected
    )


def _unexpected(error: BaseException) -> int | None:
    if not isinstance(error, (OSError, RuntimeError)):
        return None
    # Such as a store whose node is gone.
    text = f"The preflight failed ({type(error).__name__}: {first_line(error)})"
    log(f"error: {text}. Fix the cause, then rerun.")
    return Exit.RETRY


def _main(arguments: argparse.Namespace) -> Exit:
    started = time.monotonic()
    # Findings replace C++ stack traces. torch reads the variable once, when it is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    world = this_world()
    before, loaded = _read_config(arguments.command) if world.local_rank == 0 else ([], None)
    place = Place(world, arguments.level, loaded)
    from launch.doctor.examination import Examination, absent
    from launch.doctor.rendezvous import alone

    try:
        rendezvous = _join(place, arguments.wait)
    except RetryError as error:
        if world.rank != 0:
            raise
        before.append(infrastructure_failure("ranks", str(error), ""))
        rendezvous = alone(place)
    else:
        if world.rank == 0:
            before += absent(world.world_size, rendezvous, arguments.wait)

    examination = Examination(place, rendezvous, before)

    def examine() -> list[Finding]:
        examination.run()
        return []

    examination.note(bounded("preflight", examine, examination.limits.all))
    if world.rank != 0:
        return _wait_for_result(examination, rendezvous)
    findings = merged(examination.findings, rendezvous.nodes)
    code = exit_code(findings)
    seconds = time.monotonic() - started
    with suppress(BrokenPipeError):  # the reader of the table, such as head, has closed it
        show(_title(place, rendezvous, seconds), findings)
    if arguments.json is not None:
        code = _write(arguments.json, place, rendezvous, findings, seconds) or code
    failures = [f"{f.check} on {f.node}: {f.text}" for f in findings if f.code]
    message = "; ".join(failures) or "The report could not be written."
    _leave(code, message)
    with suppress(RuntimeError):  # the node that keeps the store is gone
        # After all output: once the others end, an agent may kill this process.
        rendezvous.publish("result", [code, message])
        others = [rank for rank in rendezvous.members if rank]
        rendezvous.collect("acknowledged", others, _ACKNOWLEDGE_SECONDS)
    return code


def _read_config(command: Sequence[str]) -> tuple[list[Finding], LoadedConfig | None]:
    """The training's config, or findings: it may be wrong on this node only."""
    read: list[LoadedConfig | None] = [None]

    def load() -> list[Finding]:
        try:
            read[0] = training_config(command)
        except RunError as error:
            return [misconfigured("config", line, "") for line in str(error).splitlines()]
        return []

    return bounded("config", load, _CONFIG_SECONDS), read[0]


def _join(place: Place, seconds: float) -> Rendezvous:
    from launch.contract import open_store
    from launch.doctor.rendezvous import join

    started = time.monotonic()
    store = open_store(place.world, seconds, place.environ, log)
    return join(place, store, max(1.0, seconds - (time.monotonic() - started)))


def _wait_for_result(examination: Examination, rendezvous: Rendezvous) -> Exit:
    """Rank 0's result, on another rank. Raises RetryError if rank 0 publishes none."""
    with suppress(RuntimeError):  # rank 0, which keeps the store, is gone
        published = rendezvous.collect("result", [0], examination.limits.all).get(0)
        if published is not None:
            _leave(Exit(published[0]), published[1])
        rendezvous.publish("acknowledged", True)
        if published is not None:
            return Exit(published[0])
    own = [f for f in examination.findings if f.status is Status.FAILED]
    found = "; ".join(f"{f.check}: {f.text}" for f in own) or "found no failure"
    raise RetryError(
        f"Rank {rendezvous.rank} on {rendezvous.label(rendezvous.rank)} got no preflight result "
        f"from rank 0 (own checks: {found}). Check rank 0's log, then rerun."
    )


def _leave(code: Exit, message: str) -> None:
    """Leaves the failure for the agent of each node, whichever of them ends first."""
    if code:
        write_error_file((UsageError if code is Exit.USAGE else RetryError)(message))


def _title(place: Place, rendezvous: Rendezvous, seconds: float) -> str:
    nodes = len(rendezvous.leaders)
    return (
        f"Preflight ({place.level}): {nodes} node{'s' if nodes != 1 else ''}, "
        f"{place.world.world_size} process{'es' if place.world.world_size != 1 else ''}, "
        f"{seconds:.1f} s"
    )


def _write(
    path: Path, place: Place, rendezvous: Rendezvous, findings: Sequence[Finding], seconds: float
) -> Exit | None:
    """Writes the findings as JSON; returns an exit code if the file cannot be written."""
    text: dict[str, Any] = {
        "level": place.level,
        "exit_code": exit_code(findings),
        "result": result(findings),
        "world_size": place.world.world_size,
        "nodes": rendezvous.nodes,
        "members": [asdict(member) for member in rendezvous.members.values()],
        "seconds": round(seconds, 3),
        "findings": [finding.to_json() for finding in findings],
    }
    try:
        path.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        log(
            f"error: --json is {str(path)!r}, which cannot be written: {error.strerror}; name "
            "another file."
        )
        return Exit.USAGE
    return None
